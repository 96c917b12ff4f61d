"""Factors per channel that make activations easier to round, and weights harder; pure functions of tensors.

A layer computes (x * factor) times (weight / factor). Which factor is best is tried out: with the rounding of both
that it is for, on rows of calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from compress.gptq import gptq
from compress.layer_inputs import Inputs
from compress.rounding import Grid, dequantize, rtn
from compress_kernels.int8_linear.reference import groups_of, quantize_rows

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TINY = torch.finfo(torch.float32).tiny
QUIET = 1e-4  # of the loudest channel; what is quieter on calibration data may not stay so


def factor_of(loudest: Tensor, heaviest: Tensor, alpha: float) -> Tensor:
    """From the largest activation and weight of every channel; 0 evens out the weights, 1 the activations."""
    loud = loudest.clamp_min(loudest.amax() * QUIET).clamp_min(TINY)
    heavy = heaviest.clamp_min(heaviest.amax() * QUIET).clamp_min(TINY)
    power = (1 - alpha) * heavy.log() - alpha * loud.log()
    return (power - power.mean()).exp()


def fixed_range(inputs: Inputs, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """One step, as this dtype holds it, and the code of 0, from 0 to 255, for all that calibration saw."""
    low, high = inputs.low.min().clamp_max(0), inputs.high.max().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(dtype).tiny).to(dtype)
    return scale, (-low / scale.float()).round()


def rounded_rows(inputs: Inputs, static: bool, group: int = 0) -> Tensor:
    """The sample of rows as an int8 layer sees them: a range for each row, for each group of its inputs, or for all."""
    parts = []
    for rows in groups_of(inputs.rows, group):
        codes, scale, zero = quantize_rows(rows, *(fixed_range(inputs) if static else ()))
        parts.append((codes - zero) * scale)
    return torch.cat(parts, -1)


def search(
    weight: Tensor, inputs: Inputs, alphas: Iterable[float], rounded: Callable[[Inputs], Tensor],
    narrow: Callable[[Tensor], Tensor] = Tensor.clone, spread: Callable[[Tensor], Tensor] = Tensor.clone,
) -> tuple[float | None, Tensor]:  # fmt: skip
    """The alpha and the factor under which the outputs are least off on the sample; None and ones for no factor.

    `rounded` gives the sample as the layer sees it. `narrow` takes numbers for each input to those for each channel
    that may have a factor of its own, `spread` back.
    """
    expected = inputs.rows @ weight.t()
    loudest, heaviest = narrow(torch.maximum(-inputs.low, inputs.high)), narrow(weight.abs().amax(0))
    tries = [(alpha, factor_of(loudest, heaviest, alpha)) for alpha in alphas]
    if len(tries) > 1:
        tries.insert(0, (None, torch.ones_like(loudest)))

    def error(tried: tuple[float | None, Tensor]) -> float:
        wide = spread(tried[1])
        return (rounded(inputs.times(wide)) @ nearest(weight / wide).t() - expected).norm().item()

    return min(tries, key=error)


def nearest(weight: Tensor) -> Tensor:
    """The weight as int8 rows hold it."""
    grid = row_grid(weight, torch.float32)
    return dequantize(rtn(weight, grid), grid)


def row_grid(weight: Tensor, dtype: torch.dtype) -> Grid:
    """One step a row, up to its largest value; rounded to the dtype in which a layer keeps it."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(dtype).float()
    scale = torch.where(scale > 0, scale, 1)  # an all-zero row has codes 0 at any scale
    return Grid(scale, torch.zeros_like(scale), -127, 127, True)


def codes_of(weight: Tensor, inputs: Inputs, x: Tensor, solver: str, grid: Grid) -> tuple[Tensor, str, float]:
    """int8 codes by the solver named, or by that which loses less on the rounded sample x; its name and its error."""
    expected = inputs.rows @ weight.t()
    tries = {"rtn": lambda: rtn(weight, grid), "gptq": lambda: gptq(weight, inputs.moments, grid)}
    found = []
    for name in tries if solver == "auto" else (solver,):
        codes = tries[name]()
        off = (x @ dequantize(codes, grid).t() - expected).norm() / expected.norm().clamp_min(TINY)
        found.append((codes, name, off.item()))
    return min(found, key=lambda one: one[2])
