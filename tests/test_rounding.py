"""Grids and solvers on layers made up for them: what must hold exactly, and who must beat whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.awq import best_boost, boosted, boosts
from compress.errors import CompressError
from compress.gptq import gptq, gram_error, lower_root, ordered_root
from compress.outputs import relative_error
from compress.rounding import dequantize, grid, hqq, rtn, searched, span
from compress.signround import mean_loss, signround
from compress.stacks import Call

GRIDS = [(bits, group, symmetric) for bits in range(2, 9) for group in (0, 16) for symmetric in (True, False)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(rows: int = 48, columns: int = 128, tokens: int = 512):
    """A weight, and the second moment of inputs that are correlated and of uneven size, as layers have them."""
    x = random(tokens, columns, seed=1) @ (torch.eye(columns) + random(columns, columns, seed=2) / columns**0.5)
    x = x * (3 * torch.rand(columns, generator=torch.Generator().manual_seed(3))).exp()
    return random(rows, columns), x.T @ x


def off(weight, codes, made, moment):
    """The error of the outputs."""
    return gram_error(weight, dequantize(codes, made), moment).sum().item()


@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_values_inside_the_range_are_at_most_half_a_step_away(bits, group, symmetric):
    weight, _ = layer()
    made = grid(weight, bits, group, symmetric)
    codes = rtn(weight, made)
    assert codes.dtype == torch.int8 and span(bits) == (made.low, made.high)
    assert made.low <= codes.min() and codes.max() <= made.high
    steps = made.grouped(dequantize(codes, made) - weight).abs() / made.scale.abs()[..., None]
    inside = (made.grouped(codes) > made.low) & (made.grouped(codes) < made.high)
    assert steps[inside].max() <= 0.5 + 1e-4
    # at the ends: a positive twin of the lowest code is missing, a zero point is whole, a scale is a bfloat16 number
    assert steps.max() <= (1 if symmetric else 0.5) + 0.5 + 2**bits * 2**-8


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.sampled_from((0, 8, 16)), st.booleans(), st.integers(1, 5), st.integers(0, 99))
def test_what_was_rounded_is_rounded_to_itself(bits, group, symmetric, rows, seed):
    weight = random(rows, 16, seed=seed)
    made = grid(weight, bits, group, symmetric)
    codes = rtn(weight, made)
    assert torch.equal(rtn(dequantize(codes, made), made), codes)
    if not symmetric:
        assert torch.equal(dequantize(rtn(0 * weight, made), made), 0 * weight)


@pytest.mark.parametrize("make", [grid, searched, hqq])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_single_columns(make, symmetric):
    weight = random(6, 32)
    weight[2] = 0
    weight[:, 16:] = 0
    made = make(weight, 4, 16, symmetric)
    got = dequantize(rtn(weight, made), made)
    assert got.isfinite().all() and torch.equal(got[2], weight[2]) and torch.equal(got[:, 16:], weight[:, 16:])
    column = random(6, 1)
    made = make(column, 4, 0, symmetric)
    assert (dequantize(rtn(column, made), made) - column).norm() < 0.02 * column.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [grid, searched, hqq])
def test_scales_are_what_a_layer_stores(make, dtype):
    made = make(layer()[0].to(dtype), 3, 16, False)
    assert torch.equal(made.scale.to(dtype).to(torch.bfloat16).float(), made.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_only_gets_better_and_more_so_where_it_counts(bits, symmetric):
    weight, moment = layer()
    plain, found = grid(weight, bits, 16, symmetric), searched(weight, bits, 16, symmetric, norm=2)
    weighed = searched(weight, bits, 16, symmetric, importance=moment.diagonal(), norm=2)
    errors = [(weight - dequantize(rtn(weight, made), made)).square() for made in (plain, found, weighed)]
    assert errors[1].sum() < errors[0].sum()
    assert (errors[2] * moment.diagonal()).sum() < (errors[1] * moment.diagonal()).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_to_nearest_and_the_order_of_inputs_helps(bits, symmetric):
    weight, moment = layer()
    made = grid(weight, bits, 16, symmetric)
    nearest = off(weight, rtn(weight, made), made, moment)
    plain = off(weight, gptq(weight, moment, made, act_order=False), made, moment)
    ordered = off(weight, gptq(weight, moment, made), made, moment)
    assert ordered < 0.9 * plain < 0.8 * nearest


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [1, 16, 144, 256])
def test_gptq_of_inputs_that_have_nothing_in_common_is_rounding_to_nearest(columns, act_order):
    weight = random(8, columns)
    made = grid(weight, 3, 16 if columns % 16 == 0 else 0, False)
    assert torch.equal(gptq(weight, torch.eye(columns), made, act_order=act_order), rtn(weight, made))


def test_gptq_in_blocks_is_gptq_in_one():
    weight, moment = layer()
    made = grid(weight, 3, 16, True)
    whole, blocks = gptq(weight, moment, made, block=128), gptq(weight, moment, made, block=24)
    assert (whole != blocks).float().mean() < 0.02  # sums in another order round differently now and then


def test_gptq_of_rows_is_that_of_each_row():
    weight, moment = layer()
    made = grid(weight, 3, 16, True)
    halves = [gptq(half, moment, part) for half, part in zip(weight.split([20, 28]), made.split([20, 28]), strict=True)]
    assert (torch.cat(halves) != gptq(weight, moment, made)).float().mean() < 0.02


def test_inputs_that_were_always_zero_are_rounded_alone():
    weight, moment = layer()
    moment[5], moment[:, 5] = 0, 0
    made = grid(weight, 3, 16, False)
    assert torch.equal(gptq(weight, moment, made)[:, 5], rtn(weight, made)[:, 5])
    assert torch.equal(gptq(weight, 0 * moment, made), rtn(weight, made))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("damp", [0, 1e-12, 0.01])
def test_singular_moments_are_damped_until_they_work(tokens, damp):
    x = random(tokens, 64)
    root = lower_root(x.T @ x, damp)
    assert root.isfinite().all() and root.diagonal().min() > 0 and torch.equal(root, root.tril())
    weight = random(8, 64)
    made = grid(weight, 4, 16, True)
    assert off(weight, gptq(weight, x.T @ x, made, damp=damp), made, x.T @ x) < off(
        weight, rtn(weight, made), made, x.T @ x
    )


def test_moments_that_are_not_finite_are_refused_in_one_line():
    weight, moment = layer()
    moment[0, 0] = torch.inf
    with pytest.raises(CompressError, match=r"^gptq: the second moments .* they must be$"):
        gptq(weight, moment, grid(weight, 4, 16, True))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_leaves_most_weights_nearer_than_the_full_range_does(bits, symmetric):
    weight = random(48, 128)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.02] *= 6
    errors = [(weight - dequantize(rtn(weight, made), made)).abs() for made in (
        grid(weight, bits, 64, symmetric), hqq(weight, bits, 64, symmetric))]  # fmt: skip
    assert errors[1].median() < errors[0].median() and errors[1].pow(0.7).sum() < errors[0].pow(0.7).sum()


def salient():
    """A layer with a few inputs twenty times as large as the others."""
    x = random(512, 128, seed=1)
    x[:, ::29] *= 20
    return random(48, 128), x.T @ x


def test_boosts_of_salient_inputs_beat_rounding_to_nearest():
    weight, moment = salient()

    def rounded(rows, factor=1):
        made = grid(rows * factor, 3, 32, False)
        return dequantize(rtn(rows * factor, made), made) / factor

    factor = best_boost(weight, moment, moment, rounded, lambda values: values)
    assert factor[::29].min() > 2 * factor[1]
    plain = gram_error(weight, rounded(weight), moment).sum()
    assert gram_error(weight, rounded(weight, factor), moment).sum() < 0.5 * plain
    assert best_boost(weight, torch.eye(128), torch.eye(128), rounded, lambda values: values) is None


def test_the_root_of_a_boosted_moment_follows_from_that_of_the_moment():
    _, moment = layer()
    factor = boosts(moment, lambda values: values)[3]
    order, root = ordered_root(moment, damp=0)
    assert relative_error(root.T @ root, moment[order][:, order]) < 1e-6
    expected = lower_root(boosted(moment, factor)[order][:, order], damp=0)
    assert relative_error(root / factor[order], expected) < 1e-3


def test_boosted_moments_are_those_of_the_divided_inputs():
    x = random(64, 16)
    factor = boosts(x.T @ x, lambda values: values)[3]
    expected = (x / factor).T @ (x / factor)
    assert (boosted(x.T @ x, factor) - expected).abs().max() < 1e-4 * expected.abs().max()


class Gated(nn.Module):
    """A block of two layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_signround_is_better_than_its_start_or_equal(symmetric):
    torch.manual_seed(0)
    block = Gated()
    calls = [Call((random(40, 32, seed=seed),), {}) for seed in range(4)]
    with torch.no_grad():
        targets = [[block(*call.args)] for call in calls]
    start = {}
    for name, module in (("up", block.up), ("down", block.down)):
        made = grid(module.weight, 3, 16, symmetric)
        start[name] = (module.weight.detach(), rtn(module.weight.detach(), made), made)
    before = mean_loss(block, {name: dequantize(*rest) for name, (_, *rest) in start.items()}, calls, targets)
    found = signround(block, start, calls, targets, torch.float32, steps=60)
    after = mean_loss(block, {name: dequantize(*rest) for name, rest in found.items()}, calls, targets)
    assert after < 0.7 * before
    assert all(parameter.grad is None for parameter in block.parameters())
    kept = signround(block, start, calls, targets, torch.float32, steps=0)
    assert all(torch.equal(kept[name][0], start[name][1]) for name in start)
