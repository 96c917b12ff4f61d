"""Layers whose inputs are rounded in float, to see what few-bit activations would cost; no kernel is behind them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.nn.probabilities import per_query, probabilities


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Each vector along the last dimension on its own asymmetric grid, which holds 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.amin(-1, keepdim=True).clamp_max(0), wide.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(torch.finfo(wide.dtype).tiny) / (2**bits - 1)
    return round_to(x, scale, (-low / scale).round(), bits)


def round_to(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The nearest of the values (code - zero_point) * scale with codes from 0 to 2^bits - 1; at least in float32."""
    scale, zero_point = (part.to(torch.promote_types(x.dtype, torch.float32)) for part in (scale, zero_point))
    return ((x / scale).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point).mul(scale).to(x.dtype)


def round_powers(share: Tensor, bits: int, steps: int) -> Tensor:
    """The nearest power 2^(-code/steps) of each row's largest share; what is below the last code becomes 0."""
    largest = share.amax(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    codes = (-steps * (share / largest).log2()).round()  # infinite where the share is 0, as under a mask
    return torch.where(codes < 2**bits, largest * torch.exp2(-codes.clamp_max(2**bits) / steps), 0)


class SimulatedLinear(nn.Module):
    """Inputs times a factor per channel, rounded by token, or by one scale where there is one; then packed weights."""

    def __init__(self, packed: nn.Module, bits: int, input_factor: Tensor | None = None, static: bool = False) -> None:
        super().__init__()
        self.packed, self.bits = packed, bits
        self.in_features, self.out_features = packed.in_features, packed.out_features
        like = packed.weight_scale
        self.input_factor = None if input_factor is None else nn.Parameter(input_factor, requires_grad=False)
        self.input_scale = nn.Parameter(like.new_ones(()), requires_grad=False) if static else None
        self.input_zero_point = nn.Parameter(like.new_zeros(()), requires_grad=False) if static else None

    @property
    def weight(self) -> Tensor:
        """The packed layer's weight; models ask it for its dtype."""
        return self.packed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_factor is None else x * self.input_factor
        if self.input_scale is None:
            return self.packed(round_tokens(x, self.bits))
        return self.packed(round_to(x, self.input_scale, self.input_zero_point, self.bits))


class SimulatedAttention(nn.Module):
    """A core that rounds queries, keys and values by token and the softmax's output on a grid of its own."""

    def __init__(self, bits: int, grid: str) -> None:
        super().__init__()
        self.bits, self.grid = bits, grid

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        query, key, value = (round_tokens(x, self.bits) for x in (query, key, value))
        share = probabilities(query, key, mask, scale, causal)
        if self.grid == "uniform":
            share = round_tokens(share, self.bits)
        else:
            share = round_powers(share, self.bits, 2 if self.grid == "log_sqrt2" else 1)
        return share @ per_query(value, query)
