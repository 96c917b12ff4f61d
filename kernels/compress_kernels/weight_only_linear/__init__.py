"""Linear layer with 4 or 8 bit weights in groups along the input and activations as they come."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from compress_kernels.weight_only_linear.cpu import linear, plain
from compress_kernels.weight_only_linear.reference import dequantize

NAME = "compress::weight_only_linear"


def weight_only_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """x [..., in] times packed words [out, in * bits / 32] with scale [out, groups]; the result has the dtype of x."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return torch.ops.compress.weight_only_linear.default(x, words, scale, bias, bits)
    return _forward(x, words, scale, bias, bits)


def _forward(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    return (linear if x.device.type == "cpu" else plain)(x, words, scale, bias, bits)


def _keep(ctx, inputs, output):
    x, *weight, _, ctx.bits = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(*weight)


def _backward(ctx, grad: Tensor):
    weight = dequantize(*ctx.saved_tensors, ctx.bits, ctx.columns, grad.dtype)
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None, None


# The same file may run twice, from the package and from the code beside a checkpoint; one of them defines.
if not hasattr(torch.ops.compress, "weight_only_linear"):
    torch.library.define(NAME, "(Tensor x, Tensor words, Tensor scale, Tensor? bias, int bits) -> Tensor")
    torch.library.impl(NAME, "default", _forward)
    torch.library.register_fake(NAME, lambda x, words, scale, bias, bits: x.new_empty(*x.shape[:-1], words.shape[0]))
    torch.library.register_autograd(NAME, _backward, setup_context=_keep)
