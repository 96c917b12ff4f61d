"""Grids and solvers on layers made up for them: what must hold exactly, and who must beat whom."""

from __future__ import annotations

import pytest
import torch

from compress.rounding import dequantize, grid, rtn, span

GRIDS = [(bits, group, symmetric) for bits in range(2, 9) for group in (0, 16) for symmetric in (True, False)]


def layer(rows: int = 48, columns: int = 128, tokens: int = 512):
    """A weight and correlated inputs of uneven size, as layers have them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix * (torch.rand(columns, generator=generator) * 3).exp()
    return weight, x.T @ x


@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_nearest_values_are_at_most_half_a_step_away(bits, group, symmetric):
    weight, _ = layer()
    made = grid(weight, bits, group, symmetric, torch.float32)
    codes = rtn(weight, made)
    assert codes.dtype == torch.int8 and (codes.amin() >= span(bits)[0]) and (codes.amax() <= span(bits)[1])
    off = made.grouped(dequantize(codes, made) - weight).abs() / made.scale.abs()[..., None]
    # the scale is a bfloat16 number, so a range may end up to 2^-9 of itself too early
    inside = made.grouped(codes)
    inside = (inside > made.low) & (inside < made.high)
    assert off[inside].max() <= 0.5 + 1e-4
    assert off.max() <= (1.5 if symmetric else 1.0 + 2**bits * 2**-9)
