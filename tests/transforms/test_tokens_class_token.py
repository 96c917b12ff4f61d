"""Fewer tokens before a last block that computes its class token only (heads.exact): the answers stay."""

import pytest
import torch
import transformers

import compress
from compress.checkpoint import load
from compress.emit import write
from compress.errors import CompressError
from compress.flops import count
from compress.outputs import relative_error, run
from compress.recipe import Emit
from compress.transforms.tokens.merge import Merge
from compress.view import View
from models import IMAGE, TEXT, noise, seeded, tokens

MODELS = {"ViT": IMAGE | {"num_hidden_layers": 4}, "Bert": TEXT | {"num_hidden_layers": 4}}
KIND = {"ViT": "ViTForImageClassification", "Bert": "BertForSequenceClassification"}
STEPS = {  # nothing that goes by keys or values, whose biases heads.exact takes out, and nothing refit by answers
    "merge": {"use": "tokens.merge", "ratio": 0.3, "metric": "features", "repair": False},
    "merge, energy": {
        "use": "tokens.merge",
        "ratio": (0.3, 0.3, 0.2, 0.0),
        "metric": "features",
        "match": "energy",
        "repair": False,
    },
    "prune": {"use": "tokens.prune", "keep": 0.5, "score": "class_attention", "proportional": True, "repair": False},
    "pool": {"use": "tokens.pool", "repair": False},
}


def classifier(name):
    """In float64, with a padded batch where it reads text."""
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = seeded(lambda: getattr(transformers, KIND[name])._from_config(config)).double()
    if name == "ViT":
        return model, {"pixel_values": noise(3, 3, 32, 32).double()}
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 11:] = mask[2, 6:] = 0
    return model, {"input_ids": tokens(20, batch=3), "attention_mask": mask}


def after(name, *steps):
    model, batch = classifier(name)
    return compress.compress(model, {"steps": list(steps)}, calibration=[batch], validation=[batch]), batch


def step(kind, blocks=4):
    """Shares for as many blocks as there are to merge in: the last is one where all of its tokens are computed."""
    found = dict(STEPS[kind])
    if isinstance(found.get("ratio"), tuple):
        found["ratio"] = found["ratio"][:blocks]
    return found


CASES = [(name, kind) for name in MODELS for kind in STEPS if (name, kind) != ("Bert", "pool")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_class_token_alone_gives_the_same_answers_for_less_work(name, kind):
    alone, batch = after(name, step(kind))
    both, _ = after(name, {"use": "heads.exact"}, step(kind, 3))
    stock, _ = classifier(name)
    expected = run(alone.model, batch)
    assert relative_error(run(both.model, batch), expected) < 1e-10
    assert relative_error(expected, run(stock, batch)) > 1e-4, "the reduction itself must show"
    assert count(both.model, batch) < count(alone.model, batch)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_asked_for_more_it_computes_every_token_and_brings_all_back(name, kind):
    alone, batch = after(name, step(kind))
    both, _ = after(name, {"use": "heads.exact"}, step(kind, 3))
    with torch.no_grad():
        found, wanted = (one.model(**batch, output_hidden_states=True) for one in (both, alone))
    assert relative_error(found.logits, wanted.logits) < 1e-10
    assert found.hidden_states[-1].shape == wanted.hidden_states[0].shape
    if kind != "merge":  # which merges once more in the last block, where all of it is computed
        assert relative_error(found.hidden_states[-1], wanted.hidden_states[-1]) < 1e-10
    inner = both.model.base_model(**batch).last_hidden_state
    assert inner.shape == wanted.hidden_states[0].shape, "without the classifier, too"
    assert relative_error(run(both.model, batch), run(alone.model, batch)) < 1e-10, "and then the class token again"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_saved_and_loaded_it_answers_bit_for_bit(name, kind, tmp_path):
    both, batch = after(name, {"use": "heads.exact"}, step(kind, 3))
    write(both.source, tmp_path, both.steps, batch, Emit(), {})
    with torch.no_grad():
        assert torch.equal(run(load(tmp_path).eval(), batch), run(both.model, batch))


def test_the_search_counts_the_last_block_as_it_is():
    both, batch = after("ViT", {"use": "heads.exact"}, {"use": "tokens.merge", "flops": 0.8})
    stock, _ = after("ViT", {"use": "heads.exact"})
    assert (
        0.6
        < count(both.model, {key: value[:1] for key, value in batch.items()})
        / count(stock.model, {key: value[:1] for key, value in batch.items()})
        <= 0.8
    )


def test_the_class_token_itself_must_not_merge():
    both, _ = after("ViT", {"use": "heads.exact"})
    assert "last of its stack" in Merge().plan(View(both.model)).notes["refused"]["vit.layers.3"]
    with pytest.raises(CompressError, match="protect is 0, it must be at least 1"):
        Merge(protect=0).plan(View(both.model))


@pytest.mark.parametrize("use", ["tokens.pack", "tokens.slim"])
def test_what_needs_every_token_at_its_place_is_refused_there(use):
    with pytest.raises(CompressError, match="class_token: false"):
        after("ViT", {"use": "heads.exact"}, {"use": use})
