"""weight_only_linear against its float64 reference, and the packed layout on all widths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.nn.weight_only_linear import WeightOnlyLinear, quantize_groups
from compress.outputs import relative_error
from compress_kernels.weight_only_linear import weight_only_linear
from compress_kernels.weight_only_linear.cpu import FEW, fast_bits, few, linear, plain
from compress_kernels.weight_only_linear.reference import dequantize, pack, reference, unpack

# rows, in, out, group: with and without a fast product
SHAPES = [
    (1, 64, 16, 32),
    (3, 64, 48, 64),
    (17, 96, 32, 0),
    (63, 66, 5, 33),
    (1, 3, 7, 0),
    (200, 64, 16, 32),
    (2, 40, 16, 0),
]
# bf16 products for few rows; what x itself can hold for many and for float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 8e-3}


def layer(bits, depth, width, group, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (width, depth), generator=generator).to(torch.int8)
    scale = (torch.randn(width, depth // group if group else 1, generator=generator) * 0.01).bfloat16().float()
    return pack(codes, bits), scale, torch.randn(width, generator=generator)


def rows(count, depth, seed=1):
    return torch.randn(count, depth, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 140), st.integers(0, 99))
def test_unpack_inverts_pack(bits, count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (count, width), generator=generator).to(torch.int8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (count, -(-width * bits // 32))
    assert torch.equal(unpack(words, bits, width), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_that_of_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (3, 77)).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))


def test_layout_by_hand():
    assert pack(torch.tensor([[-8, 7, 0, -1, 1, -8, -8, 7]], dtype=torch.int8), 4).view(torch.uint8).tolist() == [
        [0xF0, 0x78, 0x09, 0xF0]
    ]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([4, 8]), st.sampled_from([0, 16, 32]), st.integers(-20, 20), st.integers(0, 99))
def test_codes_are_off_by_half_a_step_or_a_step_at_the_far_end(bits, group, power, seed):
    weight = rows(5, 64, seed) * 2.0**power
    codes, scale = quantize_groups(weight, bits, group)
    steps = weight.unflatten(1, (scale.shape[1], -1)) / scale[..., None]
    error = (steps - codes.unflatten(1, (scale.shape[1], -1))).abs()
    inside = steps <= (1 << bits - 1) - 0.5  # the code of the extreme has no twin of the other sign
    assert (error[inside] <= 0.5001 + 2**-9 * (1 << bits - 1)).all() and (
        error <= 1.0001 + 2**-9 * (1 << bits - 1)
    ).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([4, 8]), st.sampled_from([0, 16]), st.integers(0, 99))
def test_quantizing_twice_changes_nothing(bits, group, seed):
    weight = rows(6, 32, seed)
    weight[2] = 0
    codes, scale = quantize_groups(weight, bits, group)
    again = dequantize(pack(codes, bits), scale, bits, 32, torch.float32)
    for got, expected in zip(quantize_groups(again, bits, group), (codes, scale), strict=True):
        assert torch.equal(got, expected)


def test_signed_scale_beats_the_symmetric_range():
    weight = rows(64, 512)
    codes, scale = quantize_groups(weight, 4, 64)
    signed = (dequantize(pack(codes, 4), scale, 4, 512, torch.float32) - weight).norm()
    groups = weight.unflatten(1, (-1, 64))
    step = groups.abs().amax(-1, keepdim=True) / 7
    assert signed < 0.95 * ((groups / step).round() * step - groups).norm()
    assert (scale < 0).any() and (scale > 0).any()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape, bits, dtype):
    count, depth, width, group = shape
    x, (words, scale, bias) = rows(count, depth).to(dtype), layer(bits, depth, width, group)
    for offset in (bias.to(dtype), None):
        got = weight_only_linear(x, words, scale, offset, bits)
        assert got.dtype == dtype and got.shape == (count, width)
        assert relative_error(got, reference(x, words, scale, offset, bits)) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_keep_the_precision_of_the_input(bits):
    x, (words, scale, bias) = rows(FEW[bits] + 1, 64), layer(bits, 64, 16, 0 if bits == 8 else 32)
    assert (
        relative_error(weight_only_linear(x, words, scale, bias, bits), reference(x, words, scale, bias, bits)) < 1e-6
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_take_the_packed_product_only_where_it_fits(bits, monkeypatch):
    import compress_kernels.weight_only_linear.cpu as cpu

    if bits not in fast_bits():
        pytest.skip("not on this machine")
    seen = []
    monkeypatch.setattr(cpu, "few", lambda x, *rest: seen.append(tuple(x.shape)) or few(x, *rest))
    for count, depth, width, group in SHAPES:
        words, scale, bias = layer(bits, depth, width, group)
        linear(rows(count, depth), words, scale, bias, bits)
    assert seen == {4: [(1, 64), (3, 64), (17, 96)], 8: [(3, 64), (17, 96)]}[bits]


def test_any_leading_dimensions_and_strides():
    words, scale, bias = layer(4, 64, 16, 32)
    wide = rows(6 * 7, 128).view(6, 7, 128)
    for x in (wide[..., :64], wide[..., ::2], wide[:, ::3, :64], wide.view(42, 128)[:64, :42].t()[:0], wide[0, 0, :64]):
        x = x if x.shape[-1] == 64 else wide.view(84, 64)[::5]
        got = weight_only_linear(x, words, scale, bias, 4)
        assert got.shape == (*x.shape[:-1], 16)
        assert relative_error(got, reference(x, words, scale, bias, 4)) < 5e-3


def test_no_rows():
    words, scale, bias = layer(4, 64, 16, 32)
    assert weight_only_linear(torch.empty(2, 0, 64), words, scale, bias, 4).shape == (2, 0, 16)


def test_packed_weights_follow_the_weight():
    words, scale, bias = layer(4, 64, 16, 32)
    words = nn.Parameter(words, requires_grad=False)
    for seed in (0, 1):
        with torch.no_grad():
            words.copy_(layer(4, 64, 16, 32, seed)[0])
        x = rows(2, 64)
        assert relative_error(weight_only_linear(x, words, scale, bias, 4), reference(x, words, scale, bias, 4)) < 5e-3


def test_gradients():
    words, scale, bias = layer(4, 64, 16, 32)
    x, bias = rows(200, 64).requires_grad_(), bias.requires_grad_()
    direction = rows(200, 16)
    grads = torch.autograd.grad((weight_only_linear(x, words, scale, bias, 4) * direction).sum(), (x, bias))
    expected = torch.autograd.grad((plain(x, words, scale, bias, 4) * direction).sum(), (x, bias))
    torch.testing.assert_close(grads, expected)


def test_stays_one_operator_under_compile():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    layer_ = WeightOnlyLinear.from_linear(nn.Linear(64, 16), 4, 32)
    with torch.no_grad():
        got = torch.compile(layer_, backend=backend, fullgraph=True)(rows(3, 64))
        assert torch.equal(got, layer_(rows(3, 64)))
    assert seen == ["compress.weight_only_linear.default"]


def test_meta():
    words, scale, bias = (tensor.to("meta") for tensor in layer(4, 64, 16, 32))
    assert weight_only_linear(torch.empty(2, 3, 64, device="meta"), words, scale, bias, 4).shape == (2, 3, 16)
