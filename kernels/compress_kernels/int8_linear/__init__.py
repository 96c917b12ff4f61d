"""Linear layer with int8 weights (one scale an output) and activations quantized to int8 a row at run time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from compress_kernels.int8_linear.cpu import linear, plain

NAME = "compress::int8_linear"


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] int8 with weight_scale [out, 1]; the result has the dtype of x."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return torch.ops.compress.int8_linear.default(x, weight, weight_scale, bias)
    return _forward(x, weight, weight_scale, bias)  # the operator's own cost is that of a small layer on one row


def _forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    assert x.is_floating_point() and x.shape[-1] == weight.shape[1], (x.dtype, x.shape, weight.shape)
    if x.device.type == "cpu":
        return linear(x, weight, weight_scale, bias)
    out = plain(x.flatten(0, -2), weight, weight_scale.float().flatten(), None if bias is None else bias.float())
    return out.to(x.dtype).view(*x.shape[:-1], len(weight))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx, grad: Tensor):
    """Straight through the rounding: the gradient of the layer with dequantized weights."""
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad @ (weight.to(grad.dtype) * weight_scale.to(grad.dtype)) if ctx.needs_input_grad[0] else None
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias


# The same file may run twice, from the package and from the code beside a checkpoint; one of them defines.
if not hasattr(torch.ops.compress, "int8_linear"):
    torch.library.define(NAME, "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor")
    torch.library.impl(NAME, "default", _forward)
    torch.library.register_fake(NAME, lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
    torch.library.register_autograd(NAME, _backward, setup_context=_keep)
