"""What int8_linear means, in float64: every path is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and one float32 scale a row (max|x| / 127.5), as compressed-tensors quantizes dynamic tokens."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    codes = (x / scale).round().clamp(-128, 127)
    return torch.where(scale > 0, codes, 0).to(torch.int8), scale


def reference(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer in float64: exact sums of code products, then both scales and the bias."""
    codes, scale = quantize_rows(x)
    out = (codes.double() @ weight.double().t()) * scale.double() * weight_scale.double().flatten()
    return out if bias is None else out + bias.double()
