"""quantize.fp8: nearest codes, nothing overflows, and a speed that is not there is not claimed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress import compress
from compress.errors import CompressError
from compress.nn.fp8_linear import Fp8Linear
from compress.outputs import relative_error, run
from compress.transforms.quantize.fp8 import Fp8
from compress.view import View
from compress_kernels.fp8_linear import emulated, fp8_linear
from compress_kernels.fp8_linear.reference import (
    FP8,
    MOST,
    dequantize_rows,
    dequantize_weight,
    quantize_rows,
    quantize_weight,
    reference,
)
from models import MODELS

KINDS = ["channel", "tensor", "block"]
CODES = torch.arange(256, dtype=torch.uint8).view(FP8).float()
CODES = CODES[CODES.isfinite()].sort().values


def weights(rows=64, columns=96, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)


def applied(model, **options):
    method, view = Fp8(**options), View(model)
    plan = method.plan(view)
    method.apply(view, plan)
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", KINDS)
def test_every_code_is_the_nearest_of_all(scales, dtype):
    weight = weights(dtype=dtype)
    codes, scale = quantize_weight(weight, scales, 32 if scales == "block" else 0)
    assert codes.dtype == FP8 and scale.dtype == dtype and codes.shape == weight.shape
    assert scale.shape == {"channel": (64, 1), "tensor": (1,), "block": (2, 3)}[scales]
    steps = dequantize_weight(torch.ones_like(codes), scale, 32 if scales == "block" else 0, torch.float32)
    scaled = (weight.float() / steps).clamp(-MOST, MOST)
    assert torch.equal((codes.float() - scaled).abs(), (CODES - scaled[..., None]).abs().amin(-1))


@pytest.mark.parametrize("scales", KINDS)
def test_quantizing_again_changes_nothing(scales):
    block = 32 if scales == "block" else 0
    weight = dequantize_weight(*quantize_weight(weights(), scales, block), block, torch.float32)
    again = dequantize_weight(*quantize_weight(weight, scales, block), block, torch.float32)
    assert torch.equal(again, weight)


@given(st.floats(1e-30, 3e38), st.sampled_from([torch.float32, torch.bfloat16]))
def test_nothing_overflows_to_nan(largest, dtype):
    x = torch.tensor([[largest, -largest, largest / 3]]).clamp(-3e38, 3e38).to(dtype)
    for codes, scale in (quantize_weight(x, "channel", 0), quantize_rows(x, 0)):
        assert codes.float().isfinite().all()
        if scale.float() > torch.finfo(dtype).tiny:  # below, the scale itself has few bits
            assert relative_error(codes.float() * scale.float(), x) < 0.07


def test_zeros_and_single_columns():
    weight = torch.zeros(3, 1)
    weight[1] = -7.0
    codes, scale = quantize_weight(weight, "channel", 0)
    assert torch.equal(dequantize_weight(codes, scale, 0, torch.float32), weight)
    assert torch.equal(dequantize_rows(*quantize_rows(torch.zeros(2, 4), 0)), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("scales", KINDS)
def test_the_layer_is_its_reference(scales, activations, dtype):
    block = 32 if scales == "block" else 0
    codes, scale = quantize_weight(weights(dtype=dtype), scales, block)
    x, bias = torch.randn(2, 5, 96).to(dtype), torch.randn(64).to(dtype)
    out = fp8_linear(x, codes, scale, bias, block, activations)
    assert out.dtype == dtype and out.shape == (2, 5, 64)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(out, reference(x, codes, scale, bias, block, activations)) < tolerance
    assert relative_error(out, reference(x, weights(), torch.ones(1), bias, 0, False)) < 0.06


def test_rows_do_not_see_each_other():
    codes, scale = quantize_weight(weights(), "channel", 0)
    x = torch.randn(7, 96) * torch.logspace(-4, 4, 7)[:, None]
    whole = emulated(x, codes, scale, None, 0, True)
    for row in range(7):
        torch.testing.assert_close(emulated(x[row], codes, scale, None, 0, True), whole[row], rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_the_rounding():
    codes, scale = quantize_weight(weights(), "channel", 0)
    x = torch.randn(4, 96, requires_grad=True)
    fp8_linear(x, codes, scale, None).sum().backward()
    torch.testing.assert_close(x.grad, dequantize_weight(codes, scale, 0, torch.float32).sum(0).expand(4, -1))


def test_it_compiles_without_a_break():
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    applied(net)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


def test_blocks_where_they_fit_and_channels_where_not():
    net = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 96), nn.Linear(96, 256))
    plan = applied(net, scales="block")
    assert [edit["scales"] for edit in plan.edits.values()] == ["block", "channel", "channel"]
    assert [tuple(layer.weight_scale.shape) for layer in net] == [(1, 2), (96, 1), (256, 1)]
    assert "2 layers do not divide by 128" in plan.notes["remarks"][1]
    assert net(torch.randn(2, 256)).shape == (2, 256)


@pytest.mark.parametrize(("name", "error"), [("llama", 0.06), ("vit", 0.06), ("gpt2", 0.06), ("dit", 0.06)])
def test_errors_on_models(name, error):
    model, batch = MODELS[name]()
    with torch.no_grad():
        expected = run(model, batch)
        applied(model)
        assert 1e-3 < relative_error(run(model, batch), expected) < error
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) > 7


def test_what_must_stay_in_float32_stays():
    model, _ = MODELS["t5"]()
    plan = Fp8().plan(View(model))
    assert plan.edits and plan.notes["refused"]["encoder.block.0.layer.1.DenseReluDense.wo"].endswith("float32")
    with pytest.raises(CompressError, match=r"wo: the model keeps it"):
        Fp8(only=("*.wo",)).plan(View(model))


def test_weights_that_are_not_finite_are_refused():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight.data[1, 2] = torch.inf
    with pytest.raises(CompressError, match=r"0\.weight holds NaN or infinite"):
        Fp8().plan(View(net))


def test_a_latency_is_refused_where_it_is_only_imitated_and_the_report_says_so():
    model, batch = MODELS["vit"]()
    recipe = {"steps": [{"use": "quantize.fp8"}], "validate": {"latency": "1.5x"}}
    with pytest.raises(CompressError, match=r"quantize\.fp8 is only imitated on a cpu"):
        compress(model, recipe, validation=[batch])
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())
    report = compress(model, {"steps": [{"use": "quantize.fp8"}]}).report
    assert report.measure("latency") is None
    assert any("no speed is claimed" in remark for remark in report.remarks())
