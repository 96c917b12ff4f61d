"""heads.exact: the answers stay, the work becomes less, and what cannot be proven stays as it is."""

import copy

import pytest
import torch
import transformers

from compress.attend import attend_through
from compress.errors import CompressError
from compress.flops import count
from compress.nn.window import TextWindow
from compress.outputs import relative_error, run
from compress.transforms.heads.exact import Exact
from compress.transforms.linear.window import Window
from compress.view import View
from models import IMAGE, MODELS, TEXT, seeded

CLASSIFIERS = ("Bert", "Roberta", "DistilBert", "Electra")


def wide(batch):
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def model_of(kind, **options):
    """A classifier whose weights are large enough that a wrong token would show."""
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")(**options)
    return seeded(lambda: getattr(transformers, kind)._from_config(config)).double()


def done(model, **options):
    plan = Exact(**options).plan(View(model))
    Exact(**options).apply(View(model), plan)
    return plan


@pytest.mark.parametrize("name", MODELS)
def test_the_error_is_rounding_and_the_plan_is_that_of_meta(name):
    model, batch = MODELS[name]()
    model, batch = model.double(), wide(batch)
    before, empty = run(model, batch), copy.deepcopy(model).to("meta")
    plan = done(model)
    assert Exact().plan(View(empty)).edits == plan.edits
    assert relative_error(run(model, batch), before) < 1e-14


def test_the_work_of_a_vision_transformer_of_twelve_blocks():
    model = model_of("ViTForImageClassification", **IMAGE | {"num_hidden_layers": 12, "image_size": 128})
    batch = {"pixel_values": torch.randn(2, 3, 128, 128, dtype=torch.float64)}
    before, flops = run(model, batch), count(model, batch)
    plan = done(model)
    assert "vit.layers.11" in plan.edits
    assert relative_error(run(model, batch), before) < 1e-14
    assert 0.9 < count(model, batch) / flops < 0.94


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_of_texts_with_padding(kind):
    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64} if kind == "DistilBert" else {}
    model = model_of(f"{kind}ForSequenceClassification", **TEXT | small)
    _, batch = MODELS["bert"]()
    before = run(model, batch)
    plan = done(model)
    assert sum("norm" in edit for edit in plan.edits.values()) == 1
    assert relative_error(run(model, batch), before) < 1e-14


def test_asked_for_more_the_last_block_computes_every_token():
    model, batch = MODELS["vit"]()
    states = model(**batch, output_hidden_states=True)
    tokens = model.vit(**batch).last_hidden_state
    done(model)
    for found, wanted in zip(
        model(**batch, output_hidden_states=True).hidden_states, states.hidden_states, strict=True
    ):
        assert found.shape == wanted.shape and relative_error(found, wanted) < 1e-5
    assert relative_error(model.vit(**batch).last_hidden_state, tokens) < 1e-5
    model.config.output_hidden_states = True
    assert model(**batch).hidden_states[-1].shape == tokens.shape
    model.config.output_hidden_states = False
    assert model.train()(**batch).logits.isfinite().all()
    assert model.vit(**batch).last_hidden_state.shape == tokens.shape


def test_a_forward_that_fails_leaves_nothing_behind():
    model, batch = MODELS["vit"]()
    done(model)
    with pytest.raises(ValueError, match="size"):
        model(pixel_values=torch.zeros(1, 3, 8, 8))
    assert model.vit(**batch).last_hidden_state.shape[1] == 17


@pytest.mark.parametrize("kind", ["Dinov2ForImageClassification", "BeitForImageClassification"])
def test_models_that_read_patches_too_keep_their_last_block(kind):
    plan = Exact().plan(View(model_of(kind, **IMAGE)))
    assert all("biases" in edit for edit in plan.edits.values())
    assert "reads all its tokens" in next(why for path, why in plan.notes["refused"].items() if path.endswith("1"))


def test_text_and_image_with_key_biases_of_their_own_keep_them():
    plan = Exact().plan(View(MODELS["sd3"]()[0]))  # what tells keys apart is no constant
    assert plan.edits == {} and "tried alone" in plan.notes["refused"]["transformer_blocks.0.attn"]


def test_values_of_grouped_heads_fold_once_for_each_query_head():
    model = model_of("LlamaForCausalLM", **TEXT, num_key_value_heads=2, attention_bias=True)
    _, batch = MODELS["llama"]()
    before = run(model, batch)
    plan = done(model, only=("model.layers.0",))
    assert plan.edits == {"model.layers.0.self_attn": {"biases": ["value"]}}
    assert "bias of the keys stays" in plan.notes["refused"]["model.layers.0.self_attn"]
    assert relative_error(run(model, batch), before) < 1e-14


def test_other_attentions_are_refused_where_only_the_class_token_is_left():
    model, _ = MODELS["vit"]()
    done(model)
    view = View(model)
    assert "class token only" in Window(radius=1).plan(view).notes["refused"]["vit.layers.1.attention"]
    with pytest.raises(CompressError, match="class token only"):
        attend_through(view, view.attention("vit.layers.1.attention"), TextWindow(1, 0, False))


def test_without_class_token_the_block_stays():
    model, _ = MODELS["vit"]()
    plan = done(model, class_token=False)
    assert all("biases" in edit for edit in plan.edits.values()) and plan.edits
    assert not hasattr(model.vit.layers[1].attention, "attend")
    again = Exact(class_token=False).plan(View(model))
    assert again.edits == {}, "what is gone cannot go again"
