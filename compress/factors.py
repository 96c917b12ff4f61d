"""The products of an attention's projections (query-key, value-output) at a lower rank: maths of tensors only.

Legend: d width of a head, H heads, G groups of them that share keys and values, r rank, o width of the output.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

TINY = 1e-8  # of the largest eigenvalue; what is smaller was never seen
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric positive matrix, and the pseudo-inverse of that."""
    values, vectors = torch.linalg.eigh(moment)
    seen = values > TINY * values.max().clamp_min(1e-30)
    up = torch.where(seen, values.clamp_min(0).sqrt(), 0)
    down = torch.where(seen, values.clamp_min(1e-30).rsqrt(), 0)
    return vectors * up @ vectors.t(), vectors * down @ vectors.t()


def value_basis(moment: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Down [d, d], up [d, d] and energies of the directions of a group's values, the most important first.

    `moment` is that of the mixed values of its heads, `importance` the sum of their O' O. The first r columns of
    `down` with the first r rows of `up` are the best rank r.
    """
    root, inverse = roots(moment)
    energies, vectors = torch.linalg.eigh(root @ importance @ root)
    vectors = vectors.flip(1)
    return inverse @ vectors, vectors.t() @ root, energies.flip(0).clamp_min(0)


def key_basis(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [d, d] of the queries and keys of a group, and the squared singular values of their product.

    `queries` is their uncentred moment, `keys` the centred one: what all keys share, the softmax does not see.
    """
    (root_q, inverse_q), (root_k, inverse_k) = roots(queries), roots(keys)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    scale = values.sqrt()
    return inverse_q @ left * scale, inverse_k @ right.t() * scale, values.square()


def outputs(
    weight_oHd: Tensor, moment: Tensor, down_HdHr: Tensor, up_HrHd: Tensor, held: Tensor | None
) -> tuple[Tensor, float]:
    """The output projection [o, Hr] of narrow values, and its relative error.

    Least squares over all heads at once, drawn towards the projection of each basis by a ridge that held data choose.
    """
    plain = weight_oHd @ up_HrHd.t()
    cross, square = moment @ down_HdHr, down_HdHr.t() @ moment @ down_HdHr
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    tries = [plain]
    for ridge in RIDGES:
        loading = ridge * square.diagonal().mean()
        tries.append(torch.linalg.solve(square + loading * eye, (weight_oHd @ cross + loading * plain).t()).t())
    judge = moment if held is None else held
    errors = [missed(weight_oHd - new @ down_HdHr.t(), judge) for new in tries]
    best = min(range(len(tries)), key=errors.__getitem__)
    return tries[best], (max(errors[best], 0.0) / max(missed(weight_oHd, judge), 1e-30)) ** 0.5


def missed(difference: Tensor, moment: Tensor) -> float:
    """Mean squared length of `difference @ z` for z of this moment."""
    return (difference @ moment * difference).sum().item()


def allocate(energies: list[Tensor], costs: list[int], keep: float, step: int) -> list[int]:
    """Ranks, in multiples of `step`, that lose the least energy at this share of the full cost."""
    ranks = [len(energy) for energy in energies]
    left = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    goal, queue = keep * left, []

    def offer(index: int) -> None:
        lower = (ranks[index] - 1) // step * step
        if lower > 0:
            loss = energies[index][lower : ranks[index]].sum().item()
            heapq.heappush(queue, (loss / (costs[index] * (ranks[index] - lower)), index, lower))

    for index in range(len(ranks)):
        offer(index)
    while queue and left > goal:
        _, index, lower = heapq.heappop(queue)
        left -= costs[index] * (ranks[index] - lower)
        ranks[index] = lower
        offer(index)
    return ranks
