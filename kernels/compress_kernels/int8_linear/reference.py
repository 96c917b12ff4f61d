"""What int8_linear means: how rows are quantized, step by step in float32, and the layer in float64."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30  # a row whose values span less counts as zeros: the inverse of its scale would overflow
FARTHEST = 65536.0  # codes beyond are cut off before they overflow an int32


def quantize_rows(
    x: Tensor, input_scale: Tensor | None = None, input_zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..255 (as float32), scale and zero point of each row; x is (codes - zero point) * scale.

    A row spans from its least to its largest value, zero included. With a scale given it holds for all rows, and the
    zero point is 128 if none is given. A row with a NaN or infinite value has the scale NaN.
    """
    x = x.float()
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    span = high.clamp(min=0) - low.clamp(max=0)
    finite = span.isfinite()
    if input_scale is None:
        scale = torch.where(span > SMALLEST, span / 255, 0)
        inverse = torch.where(finite & (scale > 0), scale.reciprocal(), 0)
        zero = (-low.clamp(max=0) * inverse).round()
    else:
        scale = input_scale.float().expand_as(span)
        inverse = scale.reciprocal()
        zero = torch.full_like(scale, 128) if input_zero_point is None else input_zero_point.float().expand_as(span)
    zero = torch.where(finite, zero, 0)
    codes = (x * inverse).clamp_(max=FARTHEST).round_().add_(zero).clamp_(0, 255)
    return torch.where(finite, codes, 0), torch.where(finite, scale, torch.nan), zero.int()


def groups_of(x: Tensor, group: int) -> tuple[Tensor, ...]:
    """The columns of a matrix that share a range; 0: all."""
    return x.split(group or x.shape[-1], -1)


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_factor: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """The layer in float64: exact sums of code products, then both scales and the bias."""
    values = x.float() if input_factor is None else x.float() * input_factor.float()
    out = 0
    for part, weight_part in zip(groups_of(values, group), groups_of(weight, group), strict=True):
        codes, scale, zero = quantize_rows(part, input_scale, input_zero_point)
        out = out + ((codes - zero).double() @ weight_part.double().t()) * scale.double()
    out = out * weight_scale.double().flatten()
    return out if bias is None else out + bias.double()
