"""What fp8_linear means: e4m3 codes with scales a tensor, a channel, a token or a block, and the layer in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max


def quantize(values: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and the scales of all entries along `dims`, which are kept as lengths of one.

    Clamped before the cast, which makes NaN of anything beyond the largest code.
    """
    scale = (values.abs().amax(dims, keepdim=True).float() / MOST).to(dtype)
    scale = torch.where(scale > 0, scale, 1)  # zeros have code 0 at any scale
    return (values.float() / scale.float()).clamp(-MOST, MOST).to(FP8), scale


def quantize_weight(weight: Tensor, scales: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales in the weight's dtype: [1], [out, 1] or one a square block."""
    if scales == "block":
        codes, scale = quantize(blocks(weight, block), (1, 3), weight.dtype)
        return codes.flatten(2, 3).flatten(0, 1), scale.squeeze(3).squeeze(1)
    codes, scale = quantize(weight, (0, 1) if scales == "tensor" else (1,), weight.dtype)
    return codes, scale.flatten() if scales == "tensor" else scale


def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes [..., in] and float32 scales [..., groups] of activations: one a token, or one a block of its channels."""
    codes, scale = quantize(x.unflatten(-1, (-1, block or x.shape[-1])), (-1,), torch.float32)
    return codes.flatten(-2), scale.squeeze(-1)


def blocks(weight: Tensor, block: int) -> Tensor:
    """[out / block, block, in / block, block]; both sizes must be multiples of it."""
    return weight.unflatten(1, (-1, block)).unflatten(0, (-1, block))


def dequantize_weight(codes: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The weight that codes and scales stand for."""
    if not block:
        return codes.to(dtype) * scale.to(dtype)
    return (blocks(codes.to(dtype), block) * scale.to(dtype)[:, None, :, None]).flatten(2, 3).flatten(0, 1)


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """The activations that codes and scales stand for, in float32."""
    return (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: int, activations: bool
) -> Tensor:
    """The layer in float64."""
    x = dequantize_rows(*quantize_rows(x, block)) if activations else x
    weight = dequantize_weight(weight, weight_scale, block, torch.float64)
    return F.linear(x.double(), weight, None if bias is None else bias.double())
