"""Ranges of activations for few bits: quantiles, norms made even over channels, factors that trade with weights."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.nn.simulated import round_to, round_tokens
from compress.rounding import dequantize, grid, rtn

QUANTILES = (1.0, 0.99999, 0.9999, 0.999)  # of all activations of a layer, cut off at both ends
SHARES = (1.0, 0.99, 0.95, 0.9)  # of the channels, whose ranges no channel may go beyond
POWERS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75)  # of the activations' largest values in a factor
MANY = 1_000_000  # values that a quantile looks at


def static_range(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scale and whole zero point, of ranges between quantiles, that round these activations with least error."""
    values = rows.flatten()
    values = values[:: max(values.numel() // MANY, 1)].float()
    tries = []
    for share in QUANTILES:
        low, high = (
            torch.stack([values.min(), values.max()])
            if share == 1
            else torch.quantile(values, torch.tensor([1 - share, share]))
        )
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low).clamp_min(torch.finfo(torch.float32).tiny) / (2**bits - 1)
        tries.append((scale, (-low / scale).round()))
    errors = [(round_to(values, *grid_, bits) - values).square().sum().item() for grid_ in tries]
    return tries[errors.index(min(errors))]


def evened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Ratio and shift such that x / ratio - shift has about the same range in every channel (RepQ-ViT)."""
    span = (high - low).clamp_min(1e-3 * (high - low).mean())
    ratio = span / span.mean()
    lowest = low / ratio
    return ratio, lowest - lowest.mean()


def clipped(low: Tensor, high: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The ranges of channels with those cut that go beyond what this share of the channels keeps to (LRP-QViT)."""
    return low.clamp_min(torch.quantile(low, 1 - share)), high.clamp_max(torch.quantile(high, share))


def balanced(weight: Tensor, rows: Tensor, bits: int, activations: int) -> Tensor:
    """The factor on the inputs, with its inverse in the weight, that leaves the least error of both roundings."""
    largest, weights = rows.abs().amax(0).clamp_min(1e-5), weight.abs().amax(0).clamp_min(1e-5)
    exact, best = rows @ weight.t(), (torch.inf, torch.ones_like(largest))
    for power in POWERS:
        factor = weights ** (1 - power) / largest**power if power else torch.ones_like(largest)
        factor = factor / factor.log().mean().exp()
        error = (product(weight / factor, round_tokens(rows * factor, activations), bits) - exact).square().sum().item()
        if error < best[0]:
            best = error, factor
    return best[1]


def product(weight: Tensor, rows: Tensor, bits: int) -> Tensor:
    """What rows give with the weight rounded to nearest, one scale an output."""
    cells = grid(weight, bits, 0, True)
    return rows @ dequantize(rtn(weight, cells), cells).t()
