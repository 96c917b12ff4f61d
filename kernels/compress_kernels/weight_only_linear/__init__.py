"""Linear layer with packed low-bit weights in groups along the input and activations as they come."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from compress_kernels.native import build
from compress_kernels.timing import right
from compress_kernels.weight_only_linear.cpu import linear, plain
from compress_kernels.weight_only_linear.reference import dequantize, pack, reference
from compress_kernels.weight_only_linear.source import SOURCE
from compress_kernels.wide_vectors import SOURCE as SHARED

NAME = "compress::weight_only_linear"
SCHEMA = "(Tensor x, Tensor words, Tensor scale, Tensor? zeros, Tensor? bias, Tensor? factor, int bits) -> Tensor"


def weight_only_linear(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None, factor: Tensor | None, bits: int
) -> Tensor:
    """x [..., in] * factor [in] times packed words [out, in * bits / 32] with scale [out, groups] and packed zeros
    [out * bits / 32, groups], plus bias; the result has the dtype of x."""
    fitting = -(-x.shape[-1] * bits // 32)
    assert words.shape[1] == fitting, f"{x.shape[-1]} inputs of {bits} bits are {fitting} words, not {words.shape[1]}"
    arguments = x.contiguous(), words, scale, zeros, bias, factor, bits
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return torch.ops.compress.weight_only_linear_autograd.default(*arguments)
    return torch.ops.compress.weight_only_linear.default(*arguments)


def _default(x: Tensor, *weight) -> Tensor:
    """Runs until the C kernel is there, which then takes the calls on a CPU; for good where there is none."""
    if x.device.type == "cpu" and library():
        return torch.ops.compress.weight_only_linear.default(x, *weight)
    return _plain(x, *weight)


def _plain(x: Tensor, *weight) -> Tensor:
    """What the C kernel leaves: many rows, kinds that it does not know, and other devices."""
    if x.device.type == "cpu":
        return linear(x, *weight, library())
    return (on_gpu() if x.is_cuda and x.numel() else plain)(x, *weight)


@cache
def on_gpu() -> Callable:
    """The Triton kernels, where Triton is installed."""
    try:
        from compress_kernels.weight_only_linear.triton import linear
    except ImportError:
        return plain
    return linear


@cache
def library() -> ctypes.CDLL | None:
    """Build the C kernel and put it in the operator's place, if it agrees with the reference here."""
    built = build(SHARED + SOURCE)
    if built is None or built.install(b"weight_only_linear_native"):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 224, generator=generator)
    for bits, groups in ((2, 7), (3, 14), (4, 1), (6, 2), (8, 1)):
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (37, 224), generator=generator).to(torch.int8)
        weight = pack(codes, bits), torch.rand(37, groups, generator=generator), None, None, None, bits
        for rows in (x, x[:1]):
            fast = partial(torch.ops.compress.weight_only_linear_native, rows, *weight)
            if not right(fast, reference(rows, *weight), 6e-3):
                return None
    return None if built.install(b"weight_only_linear") else built


def _fake(x: Tensor, words: Tensor, *rest) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


def _keep(ctx, inputs, output):
    x, *weight, _, factor, ctx.bits = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(*weight, factor)


def _backward(ctx, grad: Tensor):
    *weight, factor = ctx.saved_tensors
    grad_x = grad @ dequantize(*weight, ctx.bits, ctx.columns, grad.dtype) if ctx.needs_input_grad[0] else None
    if factor is not None and grad_x is not None:
        grad_x = grad_x * factor.to(grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None


def _define() -> None:
    operators = torch.ops.compress
    for suffix in ("", "_plain", "_native", "_autograd"):
        torch.library.define(NAME + suffix, SCHEMA)
    for suffix, function in (("", _default), ("_plain", _plain), ("_autograd", operators.weight_only_linear)):
        torch.library.impl(NAME + suffix, "default", function)
        torch.library.register_fake(NAME + suffix, _fake)
    torch.library.register_autograd(NAME + "_autograd", _backward, setup_context=_keep)


# The same file may run twice, from the package and from the code beside a checkpoint; one of them defines.
if not hasattr(torch.ops.compress, "weight_only_linear"):
    _define()
