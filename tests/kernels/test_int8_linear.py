"""int8_linear: every path against float64 and to the bit against each other, odd shapes, all dtypes, traps of CPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import compress_kernels.int8_linear as kernel
from compress.nn.int8_linear import Int8Linear
from compress.outputs import relative_error, run
from compress.transforms.quantize.int8 import Int8
from compress.view import View
from compress_kernels.int8_linear import SCHEMA, int8_linear, plain
from compress_kernels.int8_linear.reference import quantize_rows, reference
from compress_kernels.int8_linear.source import OPERATOR, SOURCES
from compress_kernels.int8_linear.torch_path import FUNCTIONS, integer_product
from compress_kernels.native import build
from compress_kernels.timing import paired, right, trusted
from models import MODELS

SHAPES = [(1, 3, 5), (2, 1, 4), (3, 17, 1), (17, 63, 129), (63, 64, 32), (300, 33, 65), (2, 1537, 7), (97, 100, 200)]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
C_KERNELS = dict(zip(("wide", "narrow"), SOURCES, strict=True))


def layer(depth, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (width, depth), generator=generator).to(torch.int8)
    return weight, torch.rand(width, 1, generator=generator) * 0.01, torch.randn(width, generator=generator)


def rows(count, depth, seed=1):
    return torch.randn(count, depth, generator=torch.Generator().manual_seed(seed))


def extras(depth):
    """What a layer may have beside weight and bias: nothing, a factor, the scale of all activations, or groups."""
    factor = torch.rand(depth, generator=torch.Generator().manual_seed(2)) + 0.5
    fixed = torch.tensor(0.02)
    fixed_zero = torch.tensor(90, dtype=torch.int32)
    groups = {"group": 64}
    return [((), {}), ((factor,), groups), ((None, fixed), {}), ((factor, fixed, fixed_zero), {}), ((), groups)]


def through_torch(x, weight, scale, bias=None, *rest, **group):
    return plain(x, weight, scale, bias, *rest, *[None] * (3 - len(rest)), **group)


@pytest.fixture(params=list(C_KERNELS))
def through_c(request):
    """The operator of one C kernel, whichever this processor would take."""
    name = f"int8_linear_{request.param}"
    if not hasattr(torch.ops.compress, name):
        library = build(C_KERNELS[request.param] + OPERATOR)
        if library is None:
            pytest.skip("no C compiler, or a processor without these instructions")
        torch.library.define(f"compress::{name}", SCHEMA)
        assert library.install(name.encode()) == 0

    def call(x, weight, scale, bias=None, *rest, activation=0, group=0):
        fixed = *rest, *[None] * (3 - len(rest))
        return getattr(torch.ops.compress, name)(x, weight, scale, bias, *fixed, activation, group)

    return call


@pytest.fixture
def poisoned(monkeypatch):
    """What torch's path leaves unwritten is NaN."""
    original = torch.Tensor.new_empty

    def new_empty(self, *args, **options):
        made = original(self, *args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def same(left, right):
    return left.dtype == right.dtype and torch.equal(left.nan_to_num(7e7), right.nan_to_num(7e7))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_agrees_with_the_reference(shape, integers, monkeypatch):
    count, depth, width = shape
    if not integers:
        monkeypatch.setattr("compress_kernels.int8_linear.torch_path.integer_product", lambda device: False)
    x, (weight, scale, bias) = rows(count, depth), layer(depth, width)
    for rest, group in extras(depth):
        for offset in (bias, None):
            got = through_torch(x, weight, scale, offset, *rest, **group)
            assert relative_error(got, reference(x, weight, scale, offset, *rest, **group)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, *((count, 70, 130) for count in range(1, 18))])
def test_the_c_kernels_equal_torch_to_the_bit(shape, dtype, threads, through_c):
    count, depth, width = shape
    x, (weight, scale, bias) = rows(count, depth).to(dtype), layer(depth, width)
    x[0] = x[0].abs()
    for rest, group in extras(depth):
        for offset in (bias, bias.to(dtype), None):
            got = through_c(x, weight, scale.to(dtype), offset, *rest, **group)
            assert same(got, through_torch(x, weight, scale.to(dtype), offset, *rest, **group))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 140), st.integers(-99, 99), st.integers(0, 5))
def test_the_c_kernels_equal_torch_at_any_size_and_scale(through_c, count, depth, width, power, group):
    x, (weight, scale, bias) = rows(count, depth) * 2.0**power, layer(depth, width)
    group = {"group": 64 * group}
    assert same(through_c(x, weight, scale, bias, **group), through_torch(x, weight, scale, bias, **group))


@pytest.mark.parametrize("count", [1, 9, 70])
def test_the_c_kernels_activate_alike(count, through_c):
    x, (weight, scale, bias) = 3 * rows(count, 70), layer(70, 130)
    for kind, function in enumerate(FUNCTIONS.values()):
        expected = function(through_torch(x, weight, scale, bias))
        assert (through_c(x, weight, scale, bias, activation=kind) - expected).abs().max() < 5e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_c_kernels_keep_broken_rows_apart(value, through_c):
    for count in (4, 20):
        x, (weight, scale, bias) = rows(count, 70), layer(70, 130)
        x[1, 69] = value
        for rest in ((), (None, torch.tensor(0.02))):
            assert same(through_c(x, weight, scale, bias, *rest), through_torch(x, weight, scale, bias, *rest))


@pytest.mark.parametrize("count", [1, 8, 100])
def test_the_c_kernels_write_all_of_their_output_and_nothing_else(count, through_c):
    x, (weight, scale, bias) = rows(count, 70), layer(70, 130)
    pieces = [torch.full((count * 130,), torch.nan) for _ in range(8)]
    del pieces  # the memory that the next tensors of this size get
    for _ in range(8):
        assert through_c(x, weight, scale, bias).isfinite().all()
    guarded = torch.full((3, count, 70), torch.nan)
    guarded[1] = x
    assert same(through_c(guarded[1], weight, scale, bias), through_c(x, weight, scale, bias))
    around = torch.full((3, 130, 70), 127, dtype=torch.int8)
    around[1] = weight
    assert same(through_c(x, around[1], scale, bias), through_c(x, weight, scale, bias))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_has_the_dtype_of_the_input(dtype, shape):
    count, depth, width = shape
    x, (weight, scale, bias) = rows(count, depth).to(dtype), layer(depth, width)
    for rest in ((), (torch.ones(depth, dtype=dtype), torch.tensor(0.05, dtype=dtype))):
        got = int8_linear(x, weight, scale.to(dtype), bias.to(dtype), *rest)
        assert got.dtype == dtype and got.shape == (count, width)
        expected = reference(x, weight, scale.to(dtype), bias.to(dtype), *rest)
        assert relative_error(got, expected) < TOLERANCE[dtype]


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
    assert through_torch(torch.empty(2, 0, 8), weight, scale, bias).shape == (2, 0, 5)


@pytest.mark.parametrize("count", [1, 5])
def test_a_depth_of_one(count):
    weight, scale, bias = layer(1, 6)  # torch's own _int_mm is wrong on a weight with one column
    x = rows(count, 1)
    for path in (int8_linear, through_torch):
        assert relative_error(path(x, weight, scale, bias), reference(x, weight, scale, bias)) < 1e-5


@pytest.mark.parametrize("depth", [16384, 65536, 65600])
@pytest.mark.parametrize("count", [2, 9])
def test_saturation_is_exact(count, depth, through_c):
    x = torch.ones(count, depth)
    x[-1] = -1
    weight = torch.full((3, depth), 127, dtype=torch.int8)
    weight[1], weight[2] = -127, -128
    scale = torch.ones(3, 1)
    for zero in (None, 0, 255):
        fixed = () if zero is None else (None, torch.tensor(1 / 255), torch.tensor(zero, dtype=torch.int32))
        expected = reference(x, weight, scale, None, *fixed)
        assert expected.abs().max() > 0.99 * 127 * depth
        assert relative_error(through_c(x, weight, scale, None, *fixed), expected) < 1e-6
        if depth <= 16384:
            got, plainly = (way(x, weight, scale, None, *fixed) for way in (through_c, through_torch))
            assert same(got, plainly)


@pytest.mark.parametrize("path", [int8_linear, through_torch])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_zero_rows_give_the_bias_and_broken_ones_stay_among_themselves(count, path):
    weight, scale, bias = layer(16, 4)
    for x in (torch.zeros(count, 16), torch.full((count, 16), 1e-35)):
        assert torch.equal(path(x, weight, scale, bias), bias.expand(count, 4))
    fixed = (None, torch.tensor(0.1))
    assert torch.equal(path(torch.zeros(count, 16), weight, scale, bias, *fixed), bias.expand(count, 4))
    for value in (torch.nan, torch.inf, -torch.inf):
        for rest in ((), fixed):
            clean = rows(count, 16)
            x = clean.clone()
            x[0, 3] = value
            got = path(x, weight, scale, bias, *rest)
            assert not got[0].isfinite().any()
            assert torch.equal(got[1:], path(clean, weight, scale, bias, *rest)[1:])


def test_values_beyond_a_fixed_scale_saturate(through_c):
    weight, scale, _ = layer(4, 3)
    fixed = torch.tensor(0.01)
    for path in (through_c, through_torch):
        for sign, code in ((1, 127), (-1, -128)):
            got = path(torch.full((2, 4), sign * 1e30), weight, scale, None, None, fixed)
            assert (
                relative_error(got, (code * 0.01 * weight.double().sum(1) * scale.double().flatten()).expand(2, 3))
                < 1e-5
            )


def test_zero_channels_give_the_bias():
    linear = nn.Linear(16, 4)
    with torch.no_grad():
        linear.weight[1] = 0
    got = Int8Linear.from_linear(linear)(rows(3, 16))
    assert torch.equal(got[:, 1], linear.bias[1].expand(3))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(-20, 20), st.floats(-3, 3), st.integers(0, 99))
def test_rows_are_off_by_at_most_a_step(count, depth, power, middle, seed):
    x = (rows(count, depth, seed) + middle) * 2.0**power
    codes, scale, zero = quantize_rows(x)
    off = (x - (codes - zero) * scale).abs()
    # Rounding is off by half a step; the zero point's own rounding may cut another half off the longer side.
    assert (off <= scale * 1.001).all() and (off <= scale * 0.5001).double().mean() >= 1 - 1 / depth
    assert codes.min() >= 0 and codes.max() <= 255 and zero.min() >= 0 and zero.max() <= 255


def test_rows_of_one_sign_use_all_codes():
    codes, _, zero = quantize_rows(torch.linspace(0, 7, 300)[None])
    assert zero.item() == 0 and codes.unique().numel() == 256
    codes, _, zero = quantize_rows(-torch.linspace(0, 7, 300)[None])
    assert zero.item() == 255 and codes.unique().numel() == 256


def test_many_rows_equal_pieces_of_them(threads):
    weight, scale, bias = layer(32, 16)
    x = rows(1000, 32)
    for piece in (1, 7, 123):
        assert torch.equal(
            int8_linear(x, weight, scale, bias),
            torch.cat([int8_linear(part, weight, scale, bias) for part in x.split(piece)]),
        )


def test_a_changed_weight_is_seen():
    weight, scale, bias = layer(32, 16)
    x = rows(9, 32)
    for change in (lambda: None, lambda: weight.neg_(), lambda: weight.fill_(3)):
        change()
        assert relative_error(int8_linear(x, weight, scale, bias), reference(x, weight, scale, bias)) < 1e-5


def test_works_in_inference_mode():
    with torch.inference_mode():
        weight, scale, bias = layer(8, 5)
        x = rows(3, 8)
        assert relative_error(int8_linear(x, weight, scale, bias), reference(x, weight, scale, bias)) < 1e-5


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_activations_of_the_output(name, count):
    values = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-20, 3e4, -3e4, 1e30, -1e30])])
    weight = torch.zeros(len(values), 4, dtype=torch.int8)
    got = int8_linear(torch.ones(count, 4), weight, torch.ones(len(values), 1), values, activation=name)
    expected = FUNCTIONS[name](values.double()).expand_as(got)
    assert ((got - expected).abs() <= 1.5e-6 + 3e-7 * expected.abs()).all()
    broken = int8_linear(torch.full((count, 4), torch.nan), weight, torch.ones(len(values), 1), values, activation=name)
    assert broken.isnan().all()


def test_the_gradient_of_an_activation():
    weight, scale, bias = layer(8, 5)
    x = rows(3, 8).requires_grad_()
    int8_linear(x, weight, scale, bias, activation="gelu").sum().backward()
    other = x.detach().clone().requires_grad_()
    nn.functional.gelu(int8_linear(other, weight, scale, bias)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_gradients_pass_straight_through():
    weight, scale, bias = layer(8, 5)
    x, bias, factor = rows(3, 8).requires_grad_(), bias.requires_grad_(), torch.rand(8)
    direction = rows(3, 5)
    (int8_linear(x, weight, scale, bias, factor) * direction).sum().backward()
    torch.testing.assert_close(x.grad, direction @ (weight * scale * factor))
    torch.testing.assert_close(bias.grad, direction.sum(0))


def graph_of(layer_, x):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        got = torch.compile(layer_, backend=backend, fullgraph=True)(x)
        assert torch.equal(got, layer_(x))
    return seen


def test_stays_one_opaque_operator_under_compile():
    """Inductor's freezing rewrites a visible `_int_mm` into s8 activations, hundreds of times slower."""
    layer_ = Int8Linear.from_linear(nn.Linear(16, 8), torch.rand(16) + 0.5)
    assert graph_of(layer_, rows(3, 16)) == ["compress.int8_linear.default"]


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_a_whole_model_compiles_without_a_break(name):
    model, batch = MODELS[name]()
    view, method = View(model), Int8()
    method.apply(view, method.plan(view))
    layers = sum(isinstance(module, Int8Linear) for module in model.modules())
    seen = []

    def backend(graph, _):
        seen.append(sum("int8_linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        got = run(torch.compile(model, backend=backend, fullgraph=True), batch)
        assert torch.equal(got, run(model, batch)) and seen == [layers] and layers > 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
def test_freezing_leaves_the_operator():
    from torch._inductor import config

    torch._dynamo.reset()
    layer_, x = Int8Linear.from_linear(nn.Linear(16, 8)).eval(), rows(3, 16)
    with torch.no_grad(), config.patch(freezing=True):
        compiled = torch.compile(layer_, fullgraph=True)
        assert torch.equal(compiled(x), layer_(x))
        with torch.profiler.profile() as seen:
            compiled(x)
    names = {event.key for event in seen.key_averages()}
    assert "compress::int8_linear" in names and not any("qlinear" in name for name in names)
    torch._dynamo.reset()


def test_operators_are_registered_as_torch_wants_them():
    weight, scale, bias = layer(8, 5)
    arguments = (rows(3, 8), weight, scale, bias, torch.rand(8), None, None, 0, 0)
    assert set(torch.library.opcheck(torch.ops.compress.int8_linear.default, arguments).values()) == {"SUCCESS"}
    arguments = (rows(3, 8).requires_grad_(), *arguments[1:])
    assert set(torch.library.opcheck(torch.ops.compress.int8_linear_autograd.default, arguments).values()) == {
        "SUCCESS"
    }


@pytest.mark.skipif(not integer_product("cpu"), reason="not on this machine")
def test_activations_never_reach_onednn_as_signed_codes(monkeypatch):
    """With s8 activations oneDNN's qlinear takes a reference kernel on CPUs without AMX; `_int_mm` does not."""
    called = []
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda *args: called.append(args))
    original = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *args: called.append("int_mm") or original(*args))
    through_torch(rows(3, 16), *layer(16, 8))
    assert called == ["int_mm"]


def test_every_bit_of_the_codes_is_used():
    """torch.ao's reduce_range leaves 7 bits, whose steps are twice as wide."""
    weight, scale, _ = layer(256, 64)
    x = rows(8, 256)
    exact = x.double() @ (weight.double() * scale).t()
    wide = (x.amax() - x.amin()) / 127
    coarse = ((x / wide).round() * wide).double() @ (weight.double() * scale).t()
    assert relative_error(int8_linear(x, weight, scale), exact) < 0.6 * relative_error(coarse, exact)


def test_falls_back_without_a_c_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "accelerated", lambda: False)
    weight, scale, bias = layer(16, 8)
    for x in (rows(1, 16), rows(5, 16)):
        got = kernel._default(x, weight, scale, bias, None, None, None, 0, 0)
        assert relative_error(got, reference(x, weight, scale, bias)) < 1e-5


def test_only_right_and_fast_paths_are_trusted():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def missing():
        return torch.ops.compress.there_is_no_such_operator(x)

    def slow():
        sum(range(10**6))
        return x @ x

    def fast():
        return x @ x

    assert trusted(fast, fast, x @ x, 1e-6)
    assert not trusted(lambda: x, fast, x @ x, 1e-6)
    assert not trusted(lambda: fast() * torch.nan, fast, x @ x, 1e-6)
    assert not trusted(missing, fast, x @ x, 1e-6)
    assert not trusted(slow, fast, x @ x, 1e-6)
    assert right(slow, x @ x, 1e-6), "no clock is asked of our own kernels"


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
