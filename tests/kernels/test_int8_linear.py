"""int8_linear against its float64 reference: every path, odd shapes, all dtypes, and the traps of CPUs."""

from __future__ import annotations

from time import sleep

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.nn.int8_linear import Int8Linear
from compress.outputs import relative_error
from compress_kernels.int8_linear import int8_linear
from compress_kernels.int8_linear.cpu import DEEPEST, blocks, linear, paths, plain, single
from compress_kernels.int8_linear.reference import quantize_rows, reference
from compress_kernels.packing import packed
from compress_kernels.timing import paired, trusted

SHAPES = [(1, 3, 5), (1, 1, 4), (3, 17, 1), (17, 63, 129), (63, 64, 32), (300, 33, 65), (2, 1537, 7)]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def layer(depth, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (width, depth), generator=generator).to(torch.int8)
    return weight, torch.rand(width, 1, generator=generator) * 0.01, torch.randn(width, generator=generator)


def rows(count, depth, seed=1):
    return torch.randn(count, depth, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def poisoned(monkeypatch):
    """What an operator leaves unwritten is NaN."""
    original = torch.Tensor.new_empty

    def new_empty(self, *args, **options):
        made = original(self, *args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", [blocks, plain, single])
def test_every_path_agrees_with_the_reference(path, shape):
    count, depth, width = shape
    count = 1 if path is single else count
    if path is single and depth == 1:
        pytest.skip("never taken: see test_a_depth_of_one")
    if path is not plain and path not in paths():
        pytest.skip("not on this machine")
    x, (weight, scale, bias) = rows(count, depth), layer(depth, width)
    for offset in (bias, None):
        got = path(x, weight, scale.flatten(), offset)
        assert relative_error(got, reference(x, weight, scale, offset)) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_has_the_dtype_of_the_input(dtype, shape):
    count, depth, width = shape
    x, (weight, scale, bias) = rows(count, depth).to(dtype), layer(depth, width)
    got = int8_linear(x, weight, scale.to(dtype), bias.to(dtype))
    assert got.dtype == dtype and got.shape == (count, width)
    assert relative_error(got, reference(x, weight, scale.to(dtype), bias.to(dtype))) < TOLERANCE[dtype]


def test_any_leading_dimensions_and_strides():
    weight, scale, bias = layer(24, 10)
    wide = rows(6 * 7, 48).view(6, 7, 48)
    for x in (wide[..., :24], wide[..., ::2], wide[:, ::3, :24], wide.view(42, 48)[:24].t(), wide[0, 0, :24]):
        got = int8_linear(x, weight, scale, bias)
        assert got.shape == (*x.shape[:-1], 10)
        assert relative_error(got, reference(x, weight, scale, bias)) < 1e-5


def test_no_rows():
    weight, scale, bias = layer(8, 5)
    assert int8_linear(torch.empty(2, 0, 8), weight, scale, bias).shape == (2, 0, 5)


@pytest.mark.parametrize("count", [1, 5])
def test_a_depth_of_one(count):
    weight, scale, bias = layer(1, 6)  # torch's own _int_mm is wrong on a weight with one column
    x = rows(count, 1)
    assert relative_error(linear(x, weight, scale, bias), reference(x, weight, scale, bias)) < 1e-5


@pytest.mark.parametrize("count", [1, 5])
def test_saturation_is_exact(count):
    depth = DEEPEST
    x = torch.ones(count, depth)
    x[-1] = -1
    weight = torch.full((3, depth), 127, dtype=torch.int8)
    weight[1] = -127
    scale = torch.ones(3, 1)
    got, expected = linear(x, weight, scale, None), reference(x, weight, scale)
    assert relative_error(got, expected) < 1e-6
    deeper = linear(x.repeat(1, 2), weight.repeat(1, 2), scale, None)  # beyond int32: sums of floats
    assert relative_error(deeper, 2 * expected) < 1e-4


@pytest.mark.parametrize("count", [1, 4])
def test_zero_rows_give_the_bias_and_broken_ones_stay_among_themselves(count):
    weight, scale, bias = layer(16, 4)
    x = torch.zeros(count, 16)
    assert torch.equal(int8_linear(x, weight, scale, bias), bias.expand(count, 4))
    for value in (torch.nan, torch.inf):
        x = rows(count, 16)
        x[0, 3] = value
        got = int8_linear(x, weight, scale, bias)
        assert not got[0].isfinite().any()
        assert torch.equal(got[1:], int8_linear(x[1:], weight, scale, bias) if count > 2 else got[1:])


def test_zero_channels_give_the_bias():
    linear = nn.Linear(16, 4)
    with torch.no_grad():
        linear.weight[1] = 0
    got = Int8Linear.from_linear(linear)(rows(3, 16))
    assert torch.equal(got[:, 1], linear.bias[1].expand(3))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(-20, 20), st.integers(0, 99))
def test_rows_are_off_by_at_most_half_a_step(count, depth, power, seed):
    x = rows(count, depth, seed) * 2.0**power
    codes, scale = quantize_rows(x)
    assert ((x - codes * scale).abs() <= scale * 0.5001).all()


def test_many_blocks_equal_one():
    weight, scale, bias = layer(32, 16)
    x = rows(1000, 32)
    pieces = torch.cat([int8_linear(piece, weight, scale, bias) for piece in x.split(123)])
    assert torch.equal(int8_linear(x, weight, scale, bias), pieces)


def test_packed_weights_follow_the_weight():
    weight, scale, bias = layer(32, 16)
    weight = nn.Parameter(weight, requires_grad=False)
    x = rows(9, 32)

    def right():
        return relative_error(int8_linear(x, weight, scale, bias), reference(x, weight, scale, bias)) < 1e-5

    assert right()
    with torch.no_grad():
        weight.copy_(-weight)
    assert right()
    weight.data = layer(32, 16, seed=5)[0]
    assert right()
    built = []
    for _ in range(2):
        packed(weight, lambda: built.append(1))
    assert not built  # the form that int8_linear built is still there


def test_works_in_inference_mode():
    with torch.inference_mode():
        weight, scale, bias = layer(8, 5)
        x = rows(3, 8)
        assert relative_error(int8_linear(x, weight, scale, bias), reference(x, weight, scale, bias)) < 1e-5


def test_gradients_pass_straight_through():
    weight, scale, bias = layer(8, 5)
    x, bias = rows(3, 8).requires_grad_(), bias.requires_grad_()
    direction = rows(3, 5)
    (int8_linear(x, weight, scale, bias) * direction).sum().backward()
    torch.testing.assert_close(x.grad, direction @ (weight * scale))
    torch.testing.assert_close(bias.grad, direction.sum(0))


def test_stays_one_opaque_operator_under_compile():
    """Inductor's freezing rewrites a visible `_int_mm` into s8 activations, hundreds of times slower."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    layer_ = Int8Linear.from_linear(nn.Linear(16, 8))
    x = rows(3, 16)
    with torch.no_grad():
        got = torch.compile(layer_, backend=backend, fullgraph=True)(x)
        assert torch.equal(got, layer_(x))
    assert seen == ["compress.int8_linear.default"]


@pytest.mark.skipif(blocks not in paths(), reason="not on this machine")
def test_activations_are_unsigned_for_onednn(monkeypatch):
    """With s8 activations oneDNN takes a reference kernel on CPUs without AMX."""
    seen = []
    original = torch.ops.onednn.qlinear_pointwise

    def spy(x, *args):
        seen.append((x.dtype, args[1]))
        return original(x, *args)

    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", spy)
    weight, scale, bias = layer(16, 8)
    linear(rows(3, 16), weight, scale, bias)
    assert seen == [(torch.uint8, 128)]


def test_falls_back_without_fast_paths(monkeypatch):
    import compress_kernels.int8_linear.cpu as cpu

    monkeypatch.setattr(cpu, "paths", lambda: frozenset())
    weight, scale, bias = layer(16, 8)
    for x in (rows(1, 16), rows(5, 16)):
        assert relative_error(linear(x, weight, scale, bias), reference(x, weight, scale, bias)) < 1e-5


def test_only_right_and_fast_paths_are_trusted():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def missing():
        return torch.ops.compress.there_is_no_such_operator(x)

    def slow():
        sleep(0.05)
        return x @ x

    def plain():
        return x @ x

    assert trusted(plain, plain, x @ x, 1e-6)
    assert not trusted(lambda: x, plain, x @ x, 1e-6)
    assert not trusted(lambda: plain() * torch.nan, plain, x @ x, 1e-6)
    assert not trusted(missing, plain, x @ x, 1e-6)
    assert not trusted(slow, plain, x @ x, 1e-6)


def test_paired_times_every_function():
    times = paired({"a": lambda: None, "b": lambda: sum(range(1000))}, rounds=3, seconds=0.003)
    assert set(times) == {"a", "b"} and all(value >= 0 for value in times.values())


def test_meta():
    weight, scale, bias = (tensor.to("meta") for tensor in layer(8, 5))
    assert int8_linear(torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16), weight, scale, bias).shape == (
        2,
        3,
        5,
    )
