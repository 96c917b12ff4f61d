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
    return round_all(weight, *ordered_root(hessian, act_order, damp), grid, block)


def ordered_root(hessian: Tensor, act_order: bool = True, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """The order in which inputs are rounded, and the root of their second moments in it."""
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True) if act_order else torch.arange(len(diagonal), device=diagonal.device)
    return order, lower_root(hessian[order][:, order], damp)


def round_all(weight: Tensor, order: Tensor, root: Tensor, grid: Grid, block: int = 128) -> Tensor:
    """Round the inputs in this order.

    The error of the output is |root @ off| for what the weights are off by. Each row ends at the input that it is the
    turn of: what it owes to the inputs before is known, and is paid back as far as rounding allows.
    """
    columns = weight.detach().float().t()[order].contiguous()  # [in, out], one row of memory each; what it is off by
    owed = (root / root.diagonal()[:, None]).t().contiguous()
    group_of = order // (len(order) // grid.scale.shape[1])
    scale, zero = grid.scale.t().contiguous(), grid.zero.t().contiguous()
    codes = torch.empty_like(columns)
    for start in range(0, len(order), block):
        own = slice(start, start + block)
        chunk = torch.addmm(columns[own], owed[:start, own].t(), columns[:start])
        cells = scale[group_of[own]], zero[group_of[own]]
        round_chunk(chunk, columns[own], codes[own], *cells, owed[own, own], grid)
    result = torch.empty_like(codes, dtype=torch.int8)
    result[order] = codes.to(torch.int8)
    return result.t().contiguous()


def round_chunk(
    chunk: Tensor, off: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, owed: Tensor, grid: Grid
) -> None:
    """Round the inputs of one chunk in turn; `off` holds their weights and is left with what these are off by."""
    for index, code in enumerate(codes):
        torch.div(chunk[index], scale[index], out=code)
        code.add_(zero[index]).round_().clamp_(grid.low, grid.high)
        off[index].sub_((code - zero[index]).mul_(scale[index]))
        chunk[index + 1 :].addr_(owed[index, index + 1 :], off[index])


def lower_root(hessian: Tensor, damp: float) -> Tensor:
    """The lower triangle R with R^T R = hessian, found in float64; damping grows tenfold until there is one.

    An input that was always zero says nothing, so its weights are rounded alone.
    """
    hessian = hessian.flip(0, 1).double()  # as it is, Cholesky's triangle would end at the last input
    diagonal = hessian.diagonal()
    if not hessian.sum().isfinite():
        raise CompressError("gptq: the second moments of a layer's inputs are not finite, they must be")
    mean = diagonal.mean().item() or 1.0
    dead = (diagonal == 0) * mean
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(dead + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        root = lower.flip(0, 1).t().float()
        if not failed and root.diagonal().min() > 0:
            return root
        damp = max(10 * damp, 1e-8)


def gram_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """What the difference of two weights makes of the output, squared, for each row."""
    off = weight.float() - other.float()
    return (off @ hessian.float() * off).sum(1)
