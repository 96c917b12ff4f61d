"""Linear layer with int8 weights (one scale an output) and activations quantized to uint8 a row at run time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from compress_kernels.int8_linear.source import OPERATOR, SOURCES
from compress_kernels.int8_linear.torch_path import FUNCTIONS, plain
from compress_kernels.native import build
from compress_kernels.timing import right

KINDS = tuple(FUNCTIONS)  # in the order of the C source
NAME = "compress::int8_linear"
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_factor, Tensor? input_scale, "
    "Tensor? input_zero_point, int activation, int group) -> Tensor"
)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_factor: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str = "none",
    group: int = 0,
) -> Tensor:
    """x [..., in] times input_factor [in], quantized, times weight [out, in] int8 with weight_scale [out, 1].

    Without an input_scale each row gets the scale and the zero point (0..255) that span its values, or each `group` of
    its inputs (a multiple of 64; 0: all). The result has the dtype of x, and without an activation the same bits on
    every CPU path; no number of threads changes any.
    """
    assert x.shape[-1] == weight.shape[1], f"x has {x.shape[-1]} features, the weight {weight.shape[1]}"
    kind = KINDS.index(activation)
    arguments = x.contiguous(), weight, weight_scale, bias, input_factor, input_scale, input_zero_point, kind, group
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return FUNCTIONS[activation](torch.ops.compress.int8_linear_autograd.default(*arguments[:-2], 0, group))
    return torch.ops.compress.int8_linear.default(*arguments)


def _default(*arguments: Tensor | None) -> Tensor:
    """Runs until the C kernel is there, which then takes the calls on a CPU; for good where there is none."""
    if arguments[0].device.type == "cpu" and accelerated():
        return torch.ops.compress.int8_linear.default(*arguments)
    return (on_gpu() if arguments[0].is_cuda and arguments[0].numel() else plain)(*arguments)


@cache
def on_gpu() -> Callable:
    """The Triton kernels, where Triton is installed."""
    try:
        from compress_kernels.int8_linear.triton import linear
    except ImportError:
        return plain
    return linear


@cache
def accelerated() -> bool:
    """Build the C kernel and put it in the operator's place, if it gives the same bits as torch's path here."""
    library = build(*(source + OPERATOR for source in SOURCES))
    if library is None or library.install(b"int8_linear_native"):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 200, generator=generator)
    x[0], x[1], x[2] = 1, -1, 0  # all codes at their limits, and none
    weight = torch.randint(-127, 128, (100, 200), generator=generator, dtype=torch.int8)
    weight[0], weight[1] = 127, -127
    rest = (
        weight,
        torch.rand(100, 1, generator=generator),
        torch.randn(100, generator=generator),
        None,
        None,
        None,
        0,
        64,
    )
    for rows in (x, x[:3]):
        fast, expected = partial(torch.ops.compress.int8_linear_native, rows, *rest), plain(rows, *rest)
        if not right(fast, expected, 0):
            return False
    return library.install(b"int8_linear") == 0


def _fake(x, weight, *rest):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2], inputs[4])


def _backward(ctx, grad: Tensor):
    """Straight through the rounding: the gradient of the layer with dequantized weights."""
    weight, weight_scale, input_factor = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ (weight.to(grad.dtype) * weight_scale.to(grad.dtype))
        grad_x = grad_x if input_factor is None else grad_x * input_factor.to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.flatten(0, -2).sum(0)
    return grad_x, None, None, grad_bias, None, None, None, None, None


def _define() -> None:
    operators = torch.ops.compress
    for name, function in (("", _default), ("_plain", plain), ("_autograd", operators.int8_linear)):
        torch.library.impl(NAME + name, "default", function)
        torch.library.register_fake(NAME + name, _fake)
    torch.library.register_autograd(NAME + "_autograd", _backward, setup_context=_keep)


# The same file may run twice, from the package and from the code beside a checkpoint; one of them defines.
if not hasattr(torch.ops.compress, "int8_linear"):
    for suffix in ("", "_plain", "_native", "_autograd"):
        torch.library.define(NAME + suffix, SCHEMA)
    _define()
