"""weight_only_linear against its float64 reference, the packed layout of all widths, and the layer around them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.nn.weight_only_linear import WeightOnlyLinear, quantize_groups
from compress.outputs import relative_error
from compress_kernels.weight_only_linear import library, weight_only_linear
from compress_kernels.weight_only_linear.cpu import fast_bits, in_bf16, linear, plain
from compress_kernels.weight_only_linear.reference import (
    dequantize,
    pack,
    pack_zeros,
    reference,
    unpack,
    unpack_zeros,
)

BITS = (2, 3, 4, 6, 8)
# rows, in, out, group: with and without a fast product
SHAPES = [
    (1, 64, 16, 32),
    (3, 64, 48, 64),
    (17, 96, 32, 0),
    (2, 66, 5, 33),
    (1, 3, 7, 0),
    (5, 1, 4, 0),
    (97, 64, 16, 32),
    (300, 64, 16, 32),
    (2, 40, 16, 0),
    (1, 1100, 19, 0),
    (2, 1088, 33, 64),
    (7, 272, 21, 16),
    (1, 240, 9, 48),
    (4, 1280, 3, 128),
]
# bf16 products for few rows; what x itself can hold for many and for float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 8e-3}


def random_codes(bits, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=generator).to(torch.int8)


def layer(bits, depth, width, group, seed=0, asymmetric=False, factor=False):
    """Everything but x that weight_only_linear takes."""
    generator, groups = torch.Generator().manual_seed(seed), depth // group if group else 1
    scale = (torch.randn(width, groups, generator=generator) * 0.01).bfloat16().float()
    bias = torch.randn(width, generator=generator)
    zeros = pack_zeros(random_codes(bits, width, groups, seed=seed + 1), bits) if asymmetric else None
    factors = torch.rand(depth, generator=generator) + 0.5 if factor else None
    return [pack(random_codes(bits, width, depth, seed=seed), bits), scale, zeros, bias, factors, bits]


def rows(count, depth, seed=1):
    return torch.randn(count, depth, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(1, 140), st.integers(0, 99))
def test_unpack_inverts_pack(bits, count, width, seed):
    codes = random_codes(bits, count, width, seed=seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (count, -(-width * bits // 32))
    assert torch.equal(unpack(words, bits, width), codes)
    zeros = pack_zeros(codes, bits)
    assert zeros.is_contiguous() and zeros.shape == (-(-count * bits // 32), width)
    assert torch.equal(unpack_zeros(zeros, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_that_of_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, 5, 77)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))
    assert torch.equal(helpers.unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)
    assert torch.equal(pack_zeros(codes, bits), helpers.pack_to_int32(codes, bits, packed_dim=0))
    assert torch.equal(helpers.unpack_from_int32(pack_zeros(codes, bits), bits, codes.shape, packed_dim=0), codes)


def test_layout_by_hand():
    assert pack(torch.tensor([[-8, 7, 0, -1, 1, -8, -8, 7]], dtype=torch.int8), 4).view(torch.uint8).tolist() == [
        [0xF0, 0x78, 0x09, 0xF0]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_reads_the_weight_that_the_layer_stands_for(bits, symmetric, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    made = WeightOnlyLinear.from_linear(nn.Linear(96, 13, dtype=dtype), bits, 32, symmetric)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    state = {name: value.detach() for name, value in made.state_dict().items() if name != "bias"}
    read = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))
    assert read["weight"].dtype == dtype and torch.equal(read["weight"], made.weight)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(BITS), st.sampled_from([0, 16, 32]), st.booleans(), st.integers(-20, 20), st.integers(0, 99))
def test_codes_are_off_by_half_a_step_or_a_step_at_the_far_end(bits, group, symmetric, power, seed):
    weight = rows(5, 64, seed) * 2.0**power
    codes, scale, zeros = quantize_groups(weight, bits, group, symmetric)
    groups = weight.unflatten(1, (scale.shape[1], -1))
    steps = groups / scale[..., None] + (0 if symmetric else zeros[..., None])
    error = (steps - codes.unflatten(1, (scale.shape[1], -1))).abs()
    slack = 2**-8 * (1 << bits - 1) + 1e-3  # the scale is rounded to bf16
    # The code of the extreme has no twin of the other sign; a zero point is rounded by up to half a step.
    inside = (steps <= (1 << bits - 1) - 0.5) & (steps >= -(1 << bits - 1) - 0.5)
    assert (error[inside] <= 0.5 + slack).all() and (error <= 1 + slack).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.sampled_from([0, 16]), st.integers(0, 99))
def test_quantizing_twice_changes_nothing(bits, group, seed):
    weight = rows(6, 32, seed)
    weight[2] = 0
    codes, scale, _ = quantize_groups(weight, bits, group, True)
    again = dequantize(pack(codes, bits), scale, None, bits, 32, torch.float32)
    for got, expected in zip(quantize_groups(again, bits, group, True), (codes, scale, None), strict=True):
        assert got is expected is None or torch.equal(got, expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_signed_scale_beats_the_even_range_and_zero_points_beat_both_on_skewed_weights(bits):
    def error(weight, symmetric):
        codes, scale, zeros = quantize_groups(weight, bits, 64, symmetric)
        zeros = None if zeros is None else pack_zeros(zeros, bits)
        return (dequantize(pack(codes, bits), scale, zeros, bits, 512, torch.float32) - weight).norm()

    weight = rows(64, 512)
    groups = weight.unflatten(1, (-1, 64))
    step = groups.abs().amax(-1, keepdim=True) / ((1 << bits - 1) - 1)
    assert error(weight, True) < 0.97 * ((groups / step).round() * step - groups).norm()
    assert error(weight + 1, False) < 0.95 * error(weight + 1, True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_channels_and_constant_groups(symmetric):
    weight = rows(4, 64)
    weight[1], weight[2], weight[3, 32:] = 0, 0.25, -0.5
    with torch.no_grad():
        linear = nn.Linear(64, 4)
        linear.weight.copy_(weight)
    made = WeightOnlyLinear.from_linear(linear, 4, 32, symmetric).weight
    assert torch.equal(made[1], weight[1])
    torch.testing.assert_close(made[2:], weight[2:], rtol=0.01 if symmetric else 0.02, atol=0.25)
    torch.testing.assert_close((made[2], made[3, 32:]), (weight[2], weight[3, 32:]), rtol=0.01, atol=0)


@pytest.fixture
def poisoned():
    """Memory that is allocated and never written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("bits", "asymmetric"), [(bits, asymmetric) for bits in BITS for asymmetric in (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape, bits, asymmetric, dtype, poisoned):
    count, depth, width, group = shape
    for factor in (False, True):
        x, weight = rows(count, depth).to(dtype), layer(bits, depth, width, group, 0, asymmetric, factor)
        weight[3] = weight[3].to(dtype) if factor else None
        expected = reference(x, *weight)
        for product, slack in ((weight_only_linear, 1 if library() else 2), (linear, 2)):
            got = product(x, *weight)
            assert got.dtype == dtype and got.shape == (count, width)
            assert relative_error(got, expected) < slack * TOLERANCE[dtype]


def native():
    return library() or pytest.skip("no C compiler, or a processor without AVX-512")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_c_kernel_dequantizes_exactly(shape, dtype, poisoned):
    _, depth, width, group = shape
    for bits, asymmetric in [(bits, asymmetric) for bits in BITS for asymmetric in (False, True)]:
        words, scale, zeros, *_ = layer(bits, depth, width, group, 0, asymmetric)
        got = in_bf16(native(), words, scale.to(dtype), zeros, bits, depth)
        expected = dequantize(words, scale, zeros, bits, depth, torch.float32).bfloat16()
        assert got is None if group == 33 else torch.equal(got, expected)


@pytest.mark.parametrize("bits", BITS)
def test_one_or_two_rows_keep_more_than_bf16_does(bits):
    native()
    for (count, depth, width, group), asymmetric in [(shape, bits % 2) for shape in SHAPES if shape[3] != 33]:
        x, weight = rows(count, depth)[:2], layer(bits, depth, width, group, 0, asymmetric, True)
        assert relative_error(weight_only_linear(x, *weight), reference(x, *weight)) < 2e-4


@pytest.mark.parametrize("group", [0, 64, 16])
def test_bits_depend_neither_on_threads_nor_on_the_other_rows(group):
    native()
    x, weight = rows(8, 1024), layer(4, 1024, 2048, group)
    expected = weight_only_linear(x, *weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    again = weight_only_linear(x, *weight)
    torch.set_num_threads(threads)
    assert torch.equal(again, expected)
    assert torch.equal(weight_only_linear(x[2:7], *weight), expected[2:7])
    pair = weight_only_linear(x[:2], *weight)
    assert torch.equal(weight_only_linear(x[1], *weight), pair[1])


@pytest.mark.parametrize("count", [2, 3, 300])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(count, value):
    x, weight = rows(count, 96), layer(4, 96, 20, 32)
    clean = weight_only_linear(x, *weight)
    x[0, 77] = value
    got = weight_only_linear(x, *weight)
    assert not got[0].isfinite().any() and torch.equal(got[1:], clean[1:])


@pytest.mark.parametrize("size", [0, 1e-38, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("count", [2, 3])
def test_small_and_large_rows(count, size):
    x, weight = rows(count, 96), layer(8, 96, 20, 0)
    x[1] *= size
    for got, expected in zip(weight_only_linear(x, *weight), reference(x, *weight), strict=True):
        assert relative_error(got, expected) < 5e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_products_get_only_what_fits_them_and_only_bf16(bits, monkeypatch):
    if bits not in fast_bits():
        pytest.skip("not on this machine")
    seen = []
    name = "_weight_int8pack_mm" if bits == 8 else "_weight_int4pack_mm_for_cpu"
    product = getattr(torch.ops.aten, name)
    monkeypatch.setattr(torch.ops.aten, name, lambda x, *rest: seen.append((*x.shape, x.dtype)) or product(x, *rest))
    for count, depth, width, group in SHAPES:
        linear(rows(count, depth), *layer(bits, depth, width, group))
    fitting = {
        4: [(1, 64), (3, 64), (17, 96)],
        8: [(3, 64), (17, 96)],
    }
    assert seen == [(*shape, torch.bfloat16) for shape in fitting[bits]]


def test_any_leading_dimensions_and_strides():
    weight = layer(4, 64, 16, 32)
    wide = rows(6 * 7, 128).view(6, 7, 128)
    for x in (wide[..., :64], wide[..., ::2], wide[:, ::3, :64], wide.view(84, 64)[::5], wide[0, 0, :64]):
        got = weight_only_linear(x, *weight)
        assert got.shape == (*x.shape[:-1], 16)
        assert relative_error(got, reference(x, *weight)) < 5e-3


@pytest.mark.parametrize("count", [1, 4, 300])
def test_tensors_of_several_types_and_strides(count):
    words, scale, zeros, bias, factor, bits = layer(4, 64, 16, 32, 0, True, True)
    x = rows(count, 64).bfloat16()
    expected = reference(x, words, scale, zeros, bias, factor, bits)
    strided = [tensor.t().contiguous().t() for tensor in (words, scale, zeros)]
    for packed in ((words, scale.bfloat16(), zeros), (words, scale, zeros), strided):
        assert relative_error(weight_only_linear(x, *packed, bias, factor, bits), expected) < 8e-3


def test_no_rows():
    assert weight_only_linear(torch.empty(2, 0, 64), *layer(4, 64, 16, 32)).shape == (2, 0, 16)


def test_another_width_is_refused():
    with pytest.raises(AssertionError, match="40 inputs of 4 bits are 5 words, not 8"):
        weight_only_linear(rows(2, 40), *layer(4, 64, 16, 32))


@pytest.mark.parametrize("product", [weight_only_linear, linear])
def test_the_weight_may_change(product):
    weight = layer(4, 64, 16, 32)
    weight[0] = nn.Parameter(weight[0], requires_grad=False)
    for seed in (0, 1):
        with torch.no_grad():
            weight[0].copy_(layer(4, 64, 16, 32, seed)[0])
        x = rows(2, 64)
        assert relative_error(product(x, *weight), reference(x, *weight)) < 5e-3


@pytest.mark.parametrize("factor", [False, True])
def test_gradients(factor):
    weight = layer(4, 64, 16, 32, 0, True, factor)
    x, weight[3] = rows(200, 64).requires_grad_(), weight[3].requires_grad_()
    direction = rows(200, 16)
    grads = torch.autograd.grad((weight_only_linear(x, *weight) * direction).sum(), (x, weight[3]))
    expected = torch.autograd.grad((plain(x, *weight) * direction).sum(), (x, weight[3]))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("count", [1, 30])
def test_stays_one_operator_under_compile(count, grad):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    made, x = WeightOnlyLinear.from_linear(nn.Linear(64, 16), 4, 32), rows(count, 64)
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        assert torch.equal(torch.compile(made, backend=backend, fullgraph=True)(x), made(x))
    assert seen == ["compress.weight_only_linear" + ("_autograd.default" if grad else ".default")]


def test_lowers_through_the_whole_compiler():
    made = WeightOnlyLinear.from_linear(nn.Linear(64, 16), 4, 32)
    with torch.no_grad():
        for count in (1, 3, 30):
            x = rows(count, 64)
            compiled = torch.compile(made, backend="aot_eager", fullgraph=True, dynamic=True)
            assert torch.equal(compiled(x), made(x))


@pytest.mark.parametrize("bits", BITS)
def test_meta(bits):
    factor = torch.ones(64, device="meta")
    made = WeightOnlyLinear.from_linear(nn.Linear(64, 13, device="meta"), bits, 32, False, factor)
    assert made(torch.empty(2, 3, 64, device="meta")).shape == (2, 3, 13)
    real = WeightOnlyLinear.from_linear(nn.Linear(64, 13), bits, 32, False, torch.ones(64))
    assert {name: value.shape for name, value in made.state_dict().items()} == {
        name: value.shape for name, value in real.state_dict().items()
    }


def test_an_input_factor_changes_only_the_grid():
    linear, x = nn.Linear(64, 16, dtype=torch.bfloat16), rows(3, 64).bfloat16()
    factor = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        made = WeightOnlyLinear.from_linear(linear, 8, 0, input_factor=factor)
        assert made.weight_scale.dtype == torch.bfloat16
        assert relative_error(made.weight * factor, linear.weight) < 8e-3
        assert relative_error(made(x), linear(x)) < 2e-2
