"""Matching of similar tokens, as pure functions of tensors.

Shapes: B batch, n tokens, r tokens that a merge takes away, D width. The bipartite matching makes nothing larger than
its n/2 x n/2 scores, that by energy n x n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

MILLION = 10**6  # shares are counted in millionths, so that integers and tensors round alike


@dataclass(frozen=True)
class Matching:
    """Which tokens stay and where each one goes: indices only."""

    kept: Tensor  # B,n-r: the tokens that stay, in their order
    gone: Tensor  # B,r: the tokens that go
    slot: Tensor  # B,n: the place among `kept` at which each token is found afterwards


@dataclass(frozen=True)
class Rule:
    """How much a merge takes away, and what it leaves alone."""

    ratio: float = 0.0  # share of the tokens present
    r: int | None = None  # a count instead
    first: int = 0  # class, distillation and register tokens
    last: bool = False  # the closing token of a text
    similarity: str = "cosine"
    metric: str = "features"  # what is compared: features, keys or both
    ward: float = 0.0  # power of the pair's harmonic size in the cost of merging it
    margin: float | None = None  # of the energy by which tokens are chosen; None for the bipartite choice

    def removes(self, tokens: int) -> int:
        """The tokens merged away out of so many: at most every second one that is not protected."""
        return max(0, min(self._wanted(tokens), (tokens - self.protected) // 2))

    def removes_rows(self, tokens: Tensor) -> Tensor:
        """`removes` for the lengths (B) of the rows of a padded batch."""
        wanted = self._wanted(tokens)
        wanted = torch.full_like(tokens, wanted) if isinstance(wanted, int) else wanted
        return torch.minimum(wanted, (tokens - self.protected) // 2).clamp(min=0)

    @property
    def protected(self) -> int:
        return self.first + int(self.last)

    def _wanted(self, tokens):
        return tokens * round(self.ratio * MILLION) // MILLION if self.r is None else self.r


def bystanders(rule: Rule, tokens: int, alive: Tensor | None, device) -> Tensor:
    """The tokens (1 or B,n) that take no part: the protected ones of each row, and padding."""
    if alive is None:
        position = torch.arange(tokens, device=device)[None]
        return (position < rule.first) | (position >= tokens - int(rule.last))
    rank = alive.cumsum(1)
    return ~alive | (rank <= rule.first) | (rank > rank[:, -1:] - int(rule.last))


def match(
    metric: Tensor,
    r: int,
    fixed: Tensor | None = None,
    alive: Tensor | None = None,
    rows: Tensor | None = None,
    size: Tensor | None = None,
    rule: Rule = Rule(),  # noqa: B008  # frozen
) -> Matching:
    """Of two sets of tokens each of the first proposes its most similar one of the second; the r best are taken.

    In a padded batch (`alive` B,n) row i takes rows[i] of them; its other r - rows[i] tokens go from its padding.
    """
    batch, tokens = metric.shape[:2]
    index = torch.arange(tokens, device=metric.device).expand(batch, -1)
    metric, fixed = metric.to(wide(metric.dtype)), (index < 0 if fixed is None else fixed.expand(batch, -1))
    cost = partial(costs, similarity=rule.similarity, power=rule.ward)
    if rule.margin is None:
        gone, target = bipartite(metric, r, fixed, size, cost)
    else:
        gone, target = redundant(metric, r, fixed, size, cost, rule.margin, rows)
    if alive is not None:
        turn = torch.arange(r, device=metric.device)[None] - rows[:, None]
        padding = alive.int().argsort(dim=-1, stable=True)[:, :r].gather(1, turn.clamp(min=0))
        gone, target = torch.where(turn < 0, gone, padding), torch.where(turn < 0, target, padding)
    return arranged(gone, target, tokens)


def arranged(gone: Tensor, target: Tensor, tokens: int) -> Matching:
    """Where every token is found when those of `gone` (B,r) go where those of `target` (B,r) are, which stay."""
    index = torch.arange(tokens, device=gone.device).expand(len(gone), -1)
    stays = torch.ones_like(index, dtype=torch.bool).scatter(1, gone, False)
    place = (stays.cumsum(1) - 1).clamp(min=0)
    # Tokens that go are written to a spare last column.
    left = tokens - gone.shape[1]
    kept = index.new_zeros(len(index), left + 1).scatter(1, place.masked_fill(~stays, left), index)[:, :-1]
    return Matching(kept, gone, place.scatter(1, gone, place.gather(1, target)))


def bipartite(metric: Tensor, r: int, fixed: Tensor, size: Tensor | None, cost: Callable) -> tuple[Tensor, Tensor]:
    """Every second token proposes one of the others (ToMe): who goes, the cheapest first, and where to."""
    sizes = (None, None) if size is None else (size[:, ::2], size[:, 1::2])
    found = cost(metric[:, ::2], metric[:, 1::2], *sizes).masked_fill(fixed[:, None, 1::2], torch.inf)
    best, target = found.min(-1)
    best = best.masked_fill(fixed[:, ::2], torch.inf)
    chosen = best.argsort(dim=-1, stable=True)[:, :r]
    return chosen * 2, target.gather(1, chosen) * 2 + 1


def redundant(
    metric: Tensor, r: int, fixed: Tensor, size: Tensor | None, cost: Callable, margin: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Only the 2 r tokens with the most others near them take part, by turns on either side (PiToMe)."""
    unit = F.normalize(metric, dim=-1)
    near = F.elu(unit @ unit.transpose(1, 2) - margin).mean(-1).masked_fill(fixed, -torch.inf)
    order = near.argsort(dim=-1, descending=True, stable=True)[:, : 2 * r]
    left, right = order[:, ::2], order[:, 1::2]
    if r == 0:
        return left, right
    sizes = (None, None) if size is None else (size.gather(1, left), size.gather(1, right))
    found = cost(take(metric, left), take(metric, right), *sizes)
    if rows is not None:  # a row that merges less has padding behind
        found = found.masked_fill(torch.arange(r, device=rows.device) >= rows.clamp(min=1)[:, None, None], torch.inf)
    return left, right.gather(1, found.argmin(-1))


def costs(
    left: Tensor, right: Tensor, left_size: Tensor | None, right_size: Tensor | None, similarity: str, power: float
) -> Tensor:
    """What merging each of the left with each of the right tokens costs; 0 for equal ones."""
    if similarity == "cosine":
        found = 1 - F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).transpose(1, 2)
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
    stays, goes = take(x, kept), take(x, gone).to(wide(x.dtype))
    before, moved = size.gather(1, kept), size.gather(1, gone)
    after = before.scatter_add(1, place, moved)
    # Padding has size 0 and may hold anything: it must add nothing, not 0 * nan.
    goes = torch.where(moved[..., None] > 0, goes * moved[..., None], 0)
    total = (stays * before[..., None]).scatter_add(1, place[..., None].expand_as(goes), goes)
    mean = total / after.clamp(min=1)[..., None]
    return torch.where((after != before)[..., None], mean.to(x.dtype), stays), after


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Copy every merged token to all the places it stands for."""
    return take(x, slot)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x B,n,D."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
