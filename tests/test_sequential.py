"""Calibration block by block: what layers see, chains told from other orders, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.outputs import inputs, relative_error
from compress.quick import exact, quick_products
from compress.sequential import Meter, stages
from compress.stacks import Call, chain, stacks
from compress.view import View
from models import MODELS


def whole(view, layers, batches):
    """Second moments from one pass over the whole model."""
    meter = Meter(view, list(layers), batches, 0)
    with torch.no_grad(), meter:
        for meter.batch, batch in enumerate(batches):
            view.model(**inputs(batch))
    return meter.read()[0]


def shifted(batch):
    """Another batch of the same shapes."""
    return {key: value.roll(1, -1) if key != "attention_mask" else value for key, value in batch.items()}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dit"])
def test_layers_see_what_they_see_in_the_whole_model(name):
    model, batch = MODELS[name]()
    view = View(model)
    layers, batches = view.linears(), [batch, shifted(batch)]
    expected = whole(view, layers, batches)
    got = {path: moment for stage in stages(view, layers, batches) for path, moment in stage.moments.items()}
    assert got.keys() == expected.keys()
    for path, moment in got.items():
        assert relative_error(moment, expected[path]) < 1e-5, path


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "swin", "t5", "dit", "sd3", "flux"])
def test_blocks_of_transformers_are_chains(name):
    model, batch = MODELS[name]()
    assert all(chain(model, stack, [batch]) for stack in stacks(View(model)))


def test_blocks_with_other_layers_between_them_are_no_chain():
    model, batch = MODELS["unet2d"]()
    assert not all(chain(model, stack, [batch]) for stack in stacks(View(model)))


class Adds(nn.Linear):
    """A block that adds something to what it gives."""

    def forward(self, x, also):
        return super().forward(x) + also


class Three(nn.Module):
    """Three blocks; `also(x, seen)` makes the second argument of the last two from input and answers so far."""

    def __init__(self, also):
        super().__init__()
        self.blocks, self.also = nn.ModuleList(Adds(8, 8) for _ in range(3)), also

    def forward(self, x):
        seen = [self.blocks[0](x, torch.ones(8))]
        for block in self.blocks[1:]:
            seen.append(block(seen[-1], self.also(x, seen)))
        return seen[-1]


@pytest.mark.parametrize(
    ("also", "expected"),
    [
        (lambda x, seen: x.mean(), True),
        (lambda x, seen: seen[-1], True),
        (lambda x, seen: seen[-1].mean(), False),
        (lambda x, seen: seen[0], False),
    ],
)
def test_what_is_derived_from_the_answers_of_earlier_blocks_breaks_the_chain(also, expected):
    torch.manual_seed(0)
    stack = [f"blocks.{index}" for index in range(3)]
    assert bool(chain(Three(also), stack, [{"x": torch.randn(5, 8)}])) is expected


def test_the_next_stage_sees_the_changes_of_the_last():
    model, batch = MODELS["llama"]()
    view = View(model)
    layers = [path for path in view.linears() if "layers" in path]
    seen = []
    for stage in stages(view, layers, [batch], targets=True):
        seen.append(stage)
        with torch.no_grad():
            view.module(f"{stage.block}.mlp.down_proj").weight.mul_(0.5)
    assert [stage.block for stage in seen] == ["model.layers.0", "model.layers.1"]
    model_then, _ = MODELS["llama"]()
    original, changed = whole(View(model_then), layers, [batch]), whole(view, layers, [batch])
    path = "model.layers.1.self_attn.q_proj"
    assert relative_error(seen[1].moments[path], changed[path]) < 1e-5
    assert relative_error(seen[1].moments[path], original[path]) > 1e-2
    with torch.no_grad():
        hidden = model_then(**batch, output_hidden_states=True).hidden_states
    assert relative_error(seen[0].targets[0][0], hidden[1]) < 1e-6


def test_layers_with_the_same_input_share_its_moment_and_padding_does_not_count():
    model, batch = MODELS["llama"]()
    view = View(model)
    stage = next(stages(view, view.linears(), [batch]))
    q, k, v, o = (stage.moments[f"model.layers.0.self_attn.{name}_proj"] for name in "qkvo")
    assert q is k is v and o is not q
    other = dict(batch, input_ids=batch["input_ids"].where(batch["attention_mask"] > 0, 7))
    again = next(stages(view, view.linears(), [other])).moments
    assert relative_error(again["model.layers.0.self_attn.q_proj"], q) < 1e-6


class Forked(nn.Module):
    """Two layers that read one tensor, or equal ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, one):
        return self.first(x) + self.second(x if one else x.clone())


@pytest.mark.parametrize("ones", [(True, True), (True, False), (False, True)])
def test_layers_that_share_inputs_only_now_and_then_count_each_once(ones):
    model, batches = Forked(), [{"x": torch.randn(5, 8), "one": one} for one in ones]
    got, expected = whole(View(model), ["first", "second"], batches), sum(b["x"].T @ b["x"] for b in batches)
    assert all(relative_error(got[path], expected) < 1e-6 for path in ("first", "second"))


def test_a_layer_that_is_called_twice_is_heard_twice():
    model, x = Forked(), torch.randn(5, 8)
    model.second = model.first
    meter = Meter(View(model), ["first"], [{}, {}], 0)
    with meter:
        for _ in range(2):
            meter.through(model, Call((x, False), {}))
    assert relative_error(meter.read()[0]["first"], 4 * x.T @ x) < 1e-6


def test_quick_products_are_exact_and_leave_no_trace():
    before, x = torch.backends.mkldnn.matmul.fp32_precision, torch.randn(300, 300)
    with pytest.raises(ValueError), quick_products():
        assert relative_error(x @ x, x.double() @ x.double()) < 1e-6
        assert (torch.backends.mkldnn.matmul.fp32_precision != before) == exact()
        raise ValueError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_batches_set_apart_do_not_count_twice():
    model, batch = MODELS["bert"]()
    view = View(model)
    both = next(stages(view, view.linears(), [batch, shifted(batch)]))
    apart = next(stages(view, view.linears(), [batch, shifted(batch)], held=1))
    for path, moment in both.moments.items():
        assert relative_error(apart.moments[path] + apart.held[path], moment) < 1e-6


def test_no_batch_and_broken_answers_are_refused_in_one_line():
    model, batch = MODELS["llama"]()
    view = View(model)
    with pytest.raises(CompressError, match=r"^calibration: there is no batch, there must be at least one$"):
        next(stages(view, view.linears(), []))
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    with pytest.raises(CompressError, match=r"q_proj: the calibration data gives it infinite or NaN inputs$"):
        next(stages(view, view.linears(), [batch]))
