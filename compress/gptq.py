"""GPTQ: weights rounded one input at a time, what was lost moved onto the inputs still to come; pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.rounding import Grid

DAMP = 0.01  # of the mean diagonal, added to it


def gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, *, act_order: bool = True, damp: float = DAMP, block: int = 128
) -> Tensor:
    """int8 codes that keep weight @ x for inputs with the second moment `hessian` = sum of x x^T, [in, in].

    The grid is fixed beforehand, so that groups stay groups of neighbours when inputs are taken by size (act_order).
    """
    return round_all(weight, *ordered_factor(hessian, act_order, damp), grid, block)


def ordered_factor(hessian: Tensor, act_order: bool = True, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """The order in which inputs are rounded, and the factor of the inverse for it."""
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True) if act_order else torch.arange(len(diagonal), device=diagonal.device)
    return order, inverse_factor(hessian[order][:, order], damp)


def round_all(weight: Tensor, order: Tensor, factor: Tensor, grid: Grid, block: int = 128) -> Tensor:
    """Round the inputs in this order."""
    columns = weight.detach().float().t()[order].contiguous()  # [in, out]: one input is one row in memory
    group_of = order // (len(order) // grid.scale.shape[1])
    scale, zero = grid.scale.t().contiguous(), grid.zero.t().contiguous()
    codes = torch.empty_like(columns)
    for start in range(0, len(order), block):
        end = min(start + block, len(order))
        chunk, own = columns[start:end], group_of[start:end]
        lost = round_chunk(chunk, codes[start:end], scale[own], zero[own], factor[start:end, start:end], grid)
        columns[end:].addmm_(factor[start:end, end:].t(), lost, alpha=-1)
    result = torch.empty_like(codes, dtype=torch.int8)
    result[order] = codes.to(torch.int8)
    return result.t().contiguous()


def round_chunk(chunk: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Round the inputs of one chunk in turn, within it at once; what each lost, for the inputs after it."""
    lost = torch.empty_like(chunk)
    for index, pivot in enumerate(factor.diagonal().tolist()):
        value, code = chunk[index], codes[index]
        torch.div(value, scale[index], out=code)
        code.add_(zero[index]).round_().clamp_(grid.low, grid.high)
        torch.sub(value, (code - zero[index]).mul_(scale[index]), out=lost[index]).div_(pivot)
        chunk[index + 1 :].addr_(factor[index, index + 1 :], lost[index], alpha=-1)
    return lost


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse in float64; damping grows tenfold until there is one.

    An input that was always zero says nothing, so its weights are rounded alone.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all():
        raise CompressError("gptq: the second moments of a layer's inputs are not finite, they must be")
    mean = diagonal.mean().item() or 1.0
    hessian = hessian + torch.diag((diagonal == 0).double() * mean)
    while True:
        damped = hessian + torch.diag(torch.full_like(diagonal, damp * mean))
        # with rows and columns reversed, the inverse of the lower factor is the upper factor of the inverse
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            factor = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False).flip(0, 1)
            if torch.isfinite(factor).all():
                return factor.float()
        damp = max(10 * damp, 1e-8)


def gram_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """What the difference of two weights makes of the output, squared, for each row."""
    off = weight.double() - other.double()
    return (off @ hessian.double() * off).sum(1)
