"""The repair of models with merged tokens: what it aims at, what it sees of a block, that it helps or is undone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from compress.merge_search import Trial
from compress.outputs import run
from compress.stacks import Call, chain
from compress.token_repair import Flow, added, along, means, repair_tokens
from compress.token_stacks import stacks
from compress.transforms.heads.exact import Exact
from compress.transforms.tokens.merge import Merge
from compress.view import View


def trial_of(model, batches, **options):
    """A view of the model, a copy that merges and shares its weights, and how many leading tokens are special."""
    view, method = View(model), Merge(**options)
    edits = method.plan(view).edits
    return view, Trial.of(view, edits, batches, method.apply), max(edit["rule"]["first"] for edit in edits.values())


def images(count, size=32):
    """Batches of smooth images, of which neighbouring patches are alike."""
    small = torch.randn(count, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": torch.nn.functional.interpolate(each, size, mode="bilinear")} for each in small]


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 12), left=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_means_are_those_of_a_partition(batch, tokens, left, seed):
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 3, generator=chance, dtype=torch.float64)
    slot = torch.randint(0, left, (batch, tokens), generator=chance)
    weight = torch.randint(0, 2, (batch, tokens), generator=chance).double()
    part = torch.nn.functional.one_hot(slot, left).double() * weight[..., None]
    size = part.sum(1)
    expected = part.transpose(1, 2) @ x / size.clamp(min=1)[..., None]
    torch.testing.assert_close(means(x, slot, weight, size), expected)


@pytest.mark.parametrize(("name", "linear"), [("vit", True), ("dinov2", True), ("bert", False)])
def test_it_is_seen_how_an_mlp_enters_its_block(name, linear):
    model, batch = models.MODELS[name]()
    if name == "dinov2":
        layer = next(module for module in model.modules() if hasattr(module, "layer_scale2"))
        scale = torch.linspace(-1, 2, layer.layer_scale2.lambda1.numel())
        layer.layer_scale2.lambda1.data = scale
    block = next(iter(stacks(View(model)).values()))[0]
    ((call,),) = chain(model, [block.path], [batch])
    down = next(mlp.down for mlp in View(model).mlps() if mlp.path in block.mlps)
    found = added(model.get_submodule(block.path), model.get_submodule(down), Call(*call))
    assert (found is not None) == linear
    if linear:
        expected = scale if name == "dinov2" else torch.ones_like(found)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_the_streams_come_nearer_to_the_means_of_the_original(name):
    model, _ = models.MODELS[name]()
    batches = images(8)
    view, trial, first = trial_of(model, batches, ratio=(0.3, 0.0))
    (blocks,) = stacks(view).values()
    original = copy.deepcopy(model)
    last = blocks[-1].path

    def apart():
        """Of the last block: the mean over the places of every token against what the original has there."""
        return sum(
            (hidden(trial.model, last, batch) - hidden(original, last, batch)).square().sum() for batch in batches
        )

    before = apart()
    calls = chain(view.model, [block.path for block in blocks], batches)
    flows = [Flow(each, None) for each in calls]
    along(view, trial.model, blocks[:-1], flows, first)
    places = hidden(original, last, batches[0]).shape[1]
    for flow in flows:
        assert (flow.tokens["size"].sum(1) == places).all() and (flow.tokens["size"][:, :first] == 1).all()
    assert along(view, trial.model, blocks, [Flow(each, None) for each in calls], first)
    assert apart() < before


def hidden(model, path, batch):
    """What a block gives."""
    heard = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: heard.append(output))
    run(model, batch)
    hook.remove()
    return heard[0][0] if isinstance(heard[0], tuple) else heard[0]


@pytest.mark.parametrize("name", ["vit", "dinov2", "bert"])
def test_it_helps_on_data_held_out_or_is_undone(name):
    model, batch = models.MODELS[name]()
    batches = images(10) if "pixel_values" in batch else [batch] * 5
    view, trial, first = trial_of(model, batches, ratio=0.3)
    old, judge = copy.deepcopy(model.state_dict()), trial.answers
    before = judge.off(trial.model)
    said = repair_tokens(view, trial.model, batches, first)
    same = all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    assert same == ("not refit" in said)
    if not same:
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, old[key])}
        downs = tuple(mlp.down for mlp in view.mlps())
        assert changed and all(key.startswith(downs) for key in changed)
        assert judge.off(trial.model) < before


def test_a_repair_that_does_not_help_is_undone_to_the_bit(monkeypatch):
    model, _ = models.MODELS["vit"]()
    batches = images(5)
    view, trial, first = trial_of(model, batches, ratio=0.3)
    old = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("compress.token_repair.refit", lambda moments, old, stay, bias: (old * 3 + 1, 1.0, 0.0))
    assert "not refit" in repair_tokens(view, trial.model, batches, first)
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())


def test_a_last_block_of_the_class_token_alone_is_left_as_it_is():
    model, _ = models.MODELS["vit"]()
    batches = images(10)
    view = View(model)
    Exact().apply(view, Exact().plan(view))
    view, trial, first = trial_of(model, batches, ratio=0.3)
    (blocks,) = stacks(view).values()
    old = copy.deepcopy(model.get_submodule(blocks[-1].path).state_dict())
    repair_tokens(view, trial.model, batches, first)
    now = model.get_submodule(blocks[-1].path).state_dict()
    assert all(torch.equal(value, old[key]) for key, value in now.items())


def test_padding_weighs_nothing():
    """Rows of a padded batch are counted as the rows alone are."""
    found = {}
    for width in (8, 12):
        model, _ = models.MODELS["bert"]()
        ids = torch.randint(5, 90, (6, 4, 8), generator=torch.Generator().manual_seed(0))
        batches = []
        for each in ids:
            mask = torch.zeros(4, width, dtype=torch.long)
            mask[:, :8] = 1
            batches.append({"input_ids": torch.nn.functional.pad(each, (0, width - 8)), "attention_mask": mask})
        view, trial, first = trial_of(model, batches, ratio=0.3)
        (blocks,) = stacks(view).values()
        calls = chain(view.model, [block.path for block in blocks], batches)
        flows = [Flow(each, batch["attention_mask"]) for each, batch in zip(calls, batches)]
        along(view, trial.model, blocks, flows, first)
        found[width] = [view.module(mlp.down).weight.clone() for mlp in view.mlps()]
    for one, two in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2)
