"""Linear layer with packed low-bit weights in groups along the input and activations as they come."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from compress_kernels.weight_only_linear.cpu import linear, plain
from compress_kernels.weight_only_linear.reference import dequantize

NAME = "compress::weight_only_linear"
SCHEMA = "(Tensor x, Tensor words, Tensor scale, Tensor? zeros, Tensor? bias, Tensor? factor, int bits) -> Tensor"


def weight_only_linear(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None, factor: Tensor | None, bits: int
) -> Tensor:
    """x [..., in] * factor [in] times packed words [out, in * bits / 32] with scale [out, groups] and packed zeros
    [out * bits / 32, groups], plus bias; the result has the dtype of x."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return torch.ops.compress.weight_only_linear.default(x, words, scale, zeros, bias, factor, bits)
    return _forward(x, words, scale, zeros, bias, factor, bits)


def _forward(x: Tensor, *weight) -> Tensor:
    return (linear if x.device.type == "cpu" else plain)(x, *weight)


def _fake(x: Tensor, words: Tensor, *rest) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


def _keep(ctx, inputs, output):
    x, *weight, _, factor, ctx.bits = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(*weight, factor)


def _backward(ctx, grad: Tensor):
    *packed, factor = ctx.saved_tensors
    grad_x = grad @ dequantize(*packed, ctx.bits, ctx.columns, grad.dtype) if ctx.needs_input_grad[0] else None
    if factor is not None and grad_x is not None:
        grad_x = grad_x * factor.to(grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None


# The same file may run twice, from the package and from the code beside a checkpoint; one of them defines.
if not hasattr(torch.ops.compress, "weight_only_linear"):
    torch.library.define(NAME, SCHEMA)
    torch.library.impl(NAME, "default", _forward)
    torch.library.register_fake(NAME, _fake)
    torch.library.register_autograd(NAME, _backward, setup_context=_keep)
