"""Simulated few-bit layers: rounding stays within half a step, reparametrizing changes nothing but the ranges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.emit import probe_inputs
from compress.folds import find_folds
from compress.nn.probabilities import probabilities
from compress.nn.simulated import SimulatedAttention, SimulatedLinear, round_powers, round_to, round_tokens
from compress.outputs import relative_error, run
from compress.ranges import balanced, clipped, evened, static_range
from compress.transforms.quantize.reparam import Reparam, even
from compress.view import View
from models import MODELS

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 1000)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def answer(model, batch):
    with torch.no_grad():
        return run(model, batch)


def changed(model, batch, **options):
    view, method = View(model), Reparam(**options)
    plan = method.calibrate(view, method.plan(view), [batch])
    expected = answer(model, batch)
    method.apply(view, plan)
    return plan, expected


@given(BITS, SEEDS, st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_a_token_is_rounded_by_half_a_step_and_keeps_zero_and_the_sign(bits, seed, offset):
    x = noise(5, 16, seed=seed) + offset
    x[:, 3] = 0
    rounded = round_tokens(x, bits)
    step = (x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)) / (2**bits - 1)
    assert ((rounded - x).abs() <= step[:, None] * (1 + 1e-9)).all()  # half, and half for the whole zero point
    assert (rounded[:, 3] == 0).all()
    assert (rounded * x >= -1e-12).all()


@given(BITS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_static_grid_is_idempotent_and_off_by_half_a_step_within_its_range(bits, seed):
    x = noise(64, 8, seed=seed, dtype=torch.float32)
    scale, zero = static_range(x, bits)
    rounded = round_to(x, scale, zero, bits)
    inside = (x > -zero * scale) & (x < (2**bits - 1 - zero) * scale)
    assert inside.float().mean() > 0.9
    assert ((rounded - x).abs()[inside] <= scale * 0.5001).all()
    assert torch.allclose(round_to(rounded, scale, zero, bits), rounded, atol=1e-6)


@given(BITS, SEEDS, st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_powers_are_near_in_ratio_keep_order_and_are_idempotent(bits, seed, steps):
    share = noise(3, 32, seed=seed).mul(3).softmax(-1)
    rounded = round_powers(share, bits, steps)
    kept = rounded > 0
    assert (rounded.max(-1).values == share.max(-1).values).all()
    assert ((rounded / share - 1).abs()[kept] <= 2 ** (0.5 / steps) - 1 + 1e-9).all()
    order = share.argsort(-1)
    assert (rounded.gather(-1, order).diff(dim=-1) >= 0).all()
    assert torch.allclose(round_powers(rounded, bits, steps), rounded, rtol=1e-9)


def test_a_share_of_zero_stays_zero():
    share = torch.tensor([[0.75, 0.25, 0.0]])
    assert round_powers(share, 4, 2)[0, 2] == 0
    assert torch.isfinite(round_powers(torch.zeros(1, 3), 4, 1)).all()


@pytest.mark.parametrize("name", ["vit", "gpt2", "clip"])
def test_reparametrizing_is_exact_in_float64(name, monkeypatch):
    monkeypatch.setattr("compress.ranges.SHARES", (0.9,))
    model, batch = MODELS[name]()
    model, batch = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    view = View(model)
    places = [place for place in find_folds(view, probe_inputs(model, batch)) if place.kind == "norm"]
    assert places
    before, done = answer(model, batch), []
    for place in places:
        width = model.get_submodule(place.producer).weight.shape[0]
        rows = dict.fromkeys(place.consumers, noise(64, width, dtype=torch.float32) * torch.linspace(0.1, 9, width) + 3)
        done.append(even(view, place, rows, 8, 4))
        spread = rows[place.consumers[0]].amax(0) - rows[place.consumers[0]].amin(0)
        assert done[-1] is None or spread.max() < 20 * spread.min()  # 90 before
    assert 0.9 in done
    assert relative_error(answer(model, batch), before) < 1e-10


def test_channels_are_evened_and_extreme_ones_cut():
    low, high = -torch.arange(1.0, 101), 2 * torch.arange(1.0, 101)
    ratio, shift = evened(low, high)
    assert torch.allclose(low / ratio - shift, (low / ratio).mean())
    assert torch.allclose((high - low) / ratio, torch.full((100,), (high - low).mean()))
    low[7] = -1e6
    assert clipped(low, high, 0.95)[0].min() > -101
    assert torch.equal(clipped(low, high, 1.0)[0], low)


def test_a_factor_is_taken_only_where_it_helps():
    weight, rows = noise(8, 16, dtype=torch.float32), noise(200, 16, seed=1, dtype=torch.float32)
    rows[:, 2] *= 100
    assert balanced(weight, rows, 8, 8)[2] < 0.5 * balanced(weight, rows, 8, 8).median()
    assert balanced(weight, torch.ones(4, 16), 8, 8).log().mean().abs() < 1e-5


@pytest.mark.parametrize("scale", ["token", "tensor"])
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_the_layer_computes_what_was_simulated_while_calibrating(name, scale):
    model, batch = MODELS[name]()
    original = answer(model, batch)
    plan, _ = changed(model, batch, weights=8, activations=8, activations_scale=scale)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, SimulatedLinear)}
    assert layers.keys() == plan.edits.keys()
    assert all((layer.input_scale is None) == (scale == "token") for layer in layers.values())
    assert relative_error(answer(model, batch), original) < 0.05


def test_fewer_bits_cost_more_and_the_rounding_is_no_kernel_but_told():
    errors = []
    for bits in (8, 4, 2):
        model, batch = MODELS["vit"]()
        original = answer(model, batch)
        plan, _ = changed(model, batch, weights=bits, activations=bits)
        assert "no kernel" in plan.notes["simulated"]
        errors.append(relative_error(answer(model, batch), original))
    assert errors == sorted(errors)


def test_codes_are_stored_packed():
    model, batch = MODELS["vit"]()
    changed(model, batch, weights=4)
    layer = next(m for m in model.modules() if isinstance(m, SimulatedLinear) and m.in_features == 64)
    assert layer.packed.weight_packed.nbytes == layer.out_features * 64 // 2


def test_the_cores_shares_are_those_of_the_host():
    query, key, value = (noise(2, 4, 7, 8, seed=seed) for seed in range(3))
    key, value = key[:, :2], value[:, :2]
    mask = noise(2, 1, 7, 7) > 0
    mask[0, 0, 3] = False
    for options in ({}, {"causal": True}, {"mask": mask}, {"mask": noise(7, 7), "scale": 0.3}):
        share = probabilities(query, key, **options)
        expected = nn.functional.scaled_dot_product_attention(
            query, key, value, options.get("mask"), is_causal=options.get("causal", False),
            scale=options.get("scale"), enable_gqa=True,
        )  # fmt: skip
        assert torch.allclose(share @ value.repeat_interleave(2, 1), expected, atol=1e-12)


@pytest.mark.parametrize("grid", ["uniform", "log2", "log_sqrt2"])
def test_attention_is_rounded_on_each_grid(grid):
    model, batch = MODELS["vit"]()
    original = answer(model, batch)
    plan, _ = changed(model, batch, weights=8, activations=8, attention=grid)
    assert sum(isinstance(m, SimulatedAttention) for m in model.modules()) == 2
    assert 0 < relative_error(answer(model, batch), original) < 0.5
    assert plan.edits["vit.layers.0.attention"] == {"activations": 8, "attention": grid}


def test_an_attention_that_is_compressed_already_is_refused():
    model, batch = MODELS["vit"]()
    changed(model, batch, attention="log2", only=("vit.layers.0.attention",))
    plan = Reparam(attention="log2", only=("vit.layers.0.attention",)).plan(View(model))
    assert "another method" in plan.notes["refused"]["vit.layers.0.attention"]


def test_a_layer_that_no_token_reaches_is_left_with_the_reason():
    model, batch = MODELS["dinov2"]()
    model.spare = nn.Linear(32, 32)
    plan, _ = changed(model, batch)
    assert "no token" in plan.notes["refused"]["spare"]
    assert isinstance(model.spare, nn.Linear)
