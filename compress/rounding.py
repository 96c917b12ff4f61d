"""Grids that weights are rounded to, and the ways to round that need no data; pure functions of tensors.

A weight is [out, in]; a grid has a scale and a zero point for each row and each group of neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHRINK = torch.linspace(1.08, 0.48, 16)  # shares of the range that a search tries
NEAR = (0.94, 0.97, 1.0, 1.03, 1.06)  # shares of the range for another zero point
SPARSE = 0.7  # norm of the error that hqq minimizes: few weights may be far off


@dataclass(frozen=True)
class Grid:
    """The values (code - zero) * scale for the whole codes from low to high."""

    scale: Tensor  # [out, groups], float32, never 0; negative where the largest value of a group takes the code low
    zero: Tensor  # [out, groups], whole numbers from low to high; all 0 in a symmetric grid
    low: int
    high: int
    symmetric: bool

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight as [out, groups, columns of a group]."""
        return weight.detach().float().unflatten(1, (self.scale.shape[1], -1))

    def zero_point(self) -> Tensor | None:
        """The zero points as codes; None where there are none."""
        return None if self.symmetric else self.zero.to(torch.int8)

    def split(self, sizes: list[int]) -> list[Grid]:
        """The grids of the weights that were stacked in rows."""
        parts = zip(self.scale.split(sizes), self.zero.split(sizes), strict=True)
        return [replace(self, scale=scale, zero=zero) for scale, zero in parts]


def span(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a layer of this dtype stores them: bfloat16 values, as which fast products read them; never 0."""
    scale = scale.to(torch.bfloat16).to(dtype).float()
    return torch.where(scale == 0, 1, scale)


def grid(weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype | None = None) -> Grid:
    """The grid that reaches from the smallest to the largest value of each group; group 0 is the whole row.

    In a symmetric one the value of largest magnitude gets the code -2^(bits-1), of which there is no positive twin.
    """
    low, high = span(bits)
    dtype = dtype or weight.dtype
    values = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))
    if symmetric:
        largest = values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = storable(largest / low, dtype)
        return Grid(scale, torch.zeros_like(scale), low, high, True)
    least, most = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
    return between(least, most, low, high, dtype)


def between(least: Tensor, most: Tensor, low: int, high: int, dtype: torch.dtype) -> Grid:
    """The asymmetric grid from least <= 0 to most >= 0; its zero point is a code, so that 0 stays 0."""
    scale = storable((most - least) / (high - low), dtype)
    return Grid(scale, (low - least / scale).round().clamp(low, high), low, high, False)


def rtn(weight: Tensor, grid: Grid) -> Tensor:
    """Round to nearest: int8 codes [out, in]."""
    codes = grid.grouped(weight) / grid.scale[..., None] + grid.zero[..., None]
    return codes.round_().clamp_(grid.low, grid.high).to(torch.int8).flatten(1)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The weight that codes stand for, in float32."""
    return ((grid.grouped(codes) - grid.zero[..., None]) * grid.scale[..., None]).flatten(1)


def searched(
    weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype | None = None,
    importance: Tensor | None = None, norm: float = 2.4,
) -> Grid:  # fmt: skip
    """The grid whose range, cut down or stretched, rounds each group best by sum(importance * |error|^norm).

    `importance` [in] weighs the inputs, as the diagonal of a Hessian does.
    """
    dtype = dtype or weight.dtype
    start = grid(weight, bits, group, symmetric, dtype)
    weigh = None if importance is None else importance.float().unflatten(0, (start.scale.shape[1], -1))
    tries = (shrunk(weight, start, share, dtype) for share in SHRINK.tolist())
    return best(weight, start, tries, weigh, norm)


def shrunk(weight: Tensor, start: Grid, share: float, dtype: torch.dtype) -> Grid:
    """The grid over this share of the range."""
    if start.symmetric:
        return replace(start, scale=storable(start.scale * share, dtype))
    values = start.grouped(weight)
    least, most = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
    return between(least * share, most * share, start.low, start.high, dtype)


def best(weight: Tensor, start: Grid, others: Iterable[Grid], weigh: Tensor | None, norm: float) -> Grid:
    """Of several grids the best one for each group; `start` where none is better."""

    def errors(candidate: Grid) -> Tensor:
        scale, zero = candidate.scale[..., None], candidate.zero[..., None]
        off = (values / scale).add_(zero).round_().clamp_(start.low, start.high).sub_(zero).mul_(scale).sub_(values)
        off = off.square_() if norm == 2 else off.abs_().pow_(norm)
        return (off if weigh is None else off.mul_(weigh)).sum(-1)

    values = start.grouped(weight)
    scale, zero, least = start.scale, start.zero, errors(start)
    for candidate in others:
        off = errors(candidate)
        better = off < least
        scale, zero = torch.where(better, candidate.scale, scale), torch.where(better, candidate.zero, zero)
        least = torch.where(better, off, least)
    return replace(start, scale=scale, zero=zero)


def hqq(weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype | None = None) -> Grid:
    """Half-quadratic: a sparse part of the error is set aside, the zero point is fitted to the rest, in turns.

    Zero points are stored whole, so both neighbours of the fitted one are tried, each with scales near the first.
    """
    dtype = dtype or weight.dtype
    start = grid(weight, bits, group, symmetric, dtype)
    zeros = [start.zero] if symmetric else half_quadratic(weight, start)
    tries = (replace(start, scale=storable(start.scale * near, dtype), zero=zero) for zero in zeros for near in NEAR)
    return best(weight, start, tries, None, norm=4)


def half_quadratic(weight: Tensor, grid: Grid, turns: int = 20) -> list[Tensor]:
    """The whole numbers below and above the best zero points for these scales."""
    values, scale, zero, beta = grid.grouped(weight), grid.scale[..., None], grid.zero[..., None], 10.0
    for _ in range(turns):
        codes = (values / scale + zero).round_().clamp_(grid.low, grid.high)
        off = values - (codes - zero) * scale
        aside = off.sign() * (off.abs() - off.abs().clamp_min(1e-8).pow(SPARSE - 1) / beta).clamp_min(0)
        zero, beta = (codes - (values - aside) / scale).mean(-1, keepdim=True), beta * 1.01
    zero = zero.squeeze(-1).clamp(grid.low, grid.high)
    return [zero.floor(), zero.ceil()]
