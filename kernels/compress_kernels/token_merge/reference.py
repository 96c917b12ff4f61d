"""What merging of similar tokens means, as pure functions of tensors.

Shapes: B batch, n tokens, r tokens that a merge takes away, D width. The matching makes nothing larger than its
n/2 x n/2 costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-12  # a length of nothing


class Merged(NamedTuple):
    """The tokens after a merge, and what went where."""

    x: Tensor  # B,n-r,D
    size: Tensor  # B,n-r, float32: how many each stands for
    kept: Tensor  # B,n-r: the tokens that stay, in their order
    gone: Tensor  # B,r: the tokens that go
    slot: Tensor  # B,n: the place among `kept` at which each token is found afterwards


@dataclass(frozen=True)
class Matching:
    """Which tokens stay and where each one goes: indices only."""

    kept: Tensor  # B,n-r: the tokens that stay, in their order
    gone: Tensor  # B,r: the tokens that go
    slot: Tensor  # B,n: the place among `kept` at which each token is found afterwards


def reference(
    x: Tensor, metric: Tensor, size: Tensor, fixed: Tensor, alive: Tensor | None, rows: Tensor | None, r: int,
    euclidean: bool, ward: float, price: Tensor | None = None,
) -> Merged:  # fmt: skip
    """Match and merge."""
    metric, fixed = metric.to(wide(metric.dtype)), fixed.expand(metric.shape[:2])
    cost = partial(costs, similarity="euclidean" if euclidean else "cosine", power=ward)
    gone, target = bipartite(metric, r, fixed, size, cost, price)
    if alive is not None:
        gone, target = from_padding(gone, target, alive, rows)
    matching = arranged(gone, target, x.shape[1])
    return Merged(*merge(x, matching, size), matching.kept, matching.gone, matching.slot)


def bipartite(
    metric: Tensor, r: int, fixed: Tensor, size: Tensor | None, cost: Callable, price: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every second token proposes one of the others (ToMe): who goes, the cheapest first, and where to."""
    sizes = (None, None) if size is None else (size[:, ::2], size[:, 1::2])
    found = cost(metric[:, ::2], metric[:, 1::2], *sizes)
    if price is not None:
        found = found * (price[:, ::2, None] * price[:, None, 1::2])
    best, target = found.masked_fill(fixed[:, None, 1::2], torch.inf).min(-1)
    best = best.masked_fill(fixed[:, ::2], torch.inf)
    chosen = best.argsort(dim=-1, stable=True)[:, :r]
    return chosen * 2, target.gather(1, chosen) * 2 + 1


def from_padding(gone: Tensor, target: Tensor, alive: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row i of a padded batch keeps its first rows[i] pairs; the others are tokens of its padding, which go nowhere."""
    turn = torch.arange(gone.shape[1], device=gone.device)[None] - rows[:, None]
    padding = alive.int().argsort(dim=-1, stable=True)[:, : gone.shape[1]].gather(1, turn.clamp(min=0))
    return torch.where(turn < 0, gone, padding), torch.where(turn < 0, target, padding)


def arranged(gone: Tensor, target: Tensor, tokens: int) -> Matching:
    """Where every token is found when those of `gone` (B,r) go where those of `target` (B,r) are, which stay."""
    index = torch.arange(tokens, device=gone.device).expand(len(gone), -1)
    stays = torch.ones_like(index, dtype=torch.bool).scatter(1, gone, False)
    place = (stays.cumsum(1) - 1).clamp(min=0)
    # Tokens that go are written to a spare last column.
    left = tokens - gone.shape[1]
    kept = index.new_zeros(len(index), left + 1).scatter(1, place.masked_fill(~stays, left), index)[:, :-1]
    return Matching(kept, gone, place.scatter(1, gone, place.gather(1, target)))


def costs(
    left: Tensor, right: Tensor, left_size: Tensor | None, right_size: Tensor | None, similarity: str, power: float
) -> Tensor:
    """What merging each of the left with each of the right tokens costs; 0 for equal ones."""
    if similarity == "cosine":  # divided by the lengths afterwards: costs are fewer numbers than what is compared
        one, other = (1 / side.norm(dim=-1).clamp(min=LEAST) for side in (left, right))
        found = 1 - left @ right.transpose(1, 2) * one[:, :, None] * other[:, None]
    else:
        lengths = left.square().sum(-1)[:, :, None] + right.square().sum(-1)[:, None]
        found = torch.baddbmm(lengths, left, right.transpose(1, 2), alpha=-2)
    if power == 0 or left_size is None:
        return found
    one, other = left_size[:, :, None].clamp(min=1), right_size[:, None].clamp(min=1)
    return found * (2 * one * other / (one + other)).pow(power)


def merge(x: Tensor, matching: Matching, size: Tensor) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of the tokens that went together, and the new sizes (float32); others stay to the bit."""
    kept, gone = matching.kept, matching.gone
    place = matching.slot.gather(1, gone)
    stays, goes = (take(x, which).to(wide(x.dtype)) for which in (kept, gone))
    before, moved = size.gather(1, kept), size.gather(1, gone)
    after = before.scatter_add(1, place, moved)
    share = (moved.to(stays.dtype) / after.gather(1, place).clamp(min=1))[..., None]
    # Padding has size 0 and may hold anything: it must add nothing, not 0 * nan.
    pull = torch.where(share > 0, (goes - take(stays, place)) * share, 0)
    mean = stays.flatten(0, 1).index_add(0, rows(place, stays.shape[1]), pull.flatten(0, 1)).view_as(stays)
    return mean.to(x.dtype), after


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x B,n,D."""
    return x.flatten(0, 1).index_select(0, rows(index, x.shape[1])).view(*index.shape, x.shape[-1])


def rows(index: Tensor, count: int) -> Tensor:
    """The same places (B,m) in a batch of so many tokens each that is one list of rows.

    So whole rows are copied; a gather with the index expanded goes number by number, ten times slower on a CPU.
    """
    if len(index) == 1:  # for one row each operation less counts
        return index.flatten()
    return (index + torch.arange(len(index), device=index.device)[:, None] * count).flatten()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
