"""Matching of similar tokens, as pure functions of tensors.

Shapes: B batch, n tokens, r tokens that a merge takes away, D width. The bipartite matching and that by criteria make
nothing larger than their n/2 x n/2 scores, those by energy and by sizes n x n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress_kernels.token_merge.reference import Matching, arranged, costs, from_padding, take, wide

MILLION = 10**6  # shares are counted in millionths, so that integers and tensors round alike
PRICE = 0.1  # power of the tokens' importance in the cost of merging them
IMPORTANCE, SIZE = 1 / 20, 1 / 40  # powers in what attracts two tokens by the criteria, as published


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
    margin: float | None = None  # of the energy by which tokens are chosen, where it is
    match: str = "bipartite"  # or criteria, or sizes
    importance: str = "none"  # by what attention makes of them, tokens cost more to merge: class, received or values

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
        first = position < rule.first
        return first | (position == tokens - 1) if rule.last else first
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
    weight: Tensor | None = None,
) -> Matching:
    """Of two sets of tokens each of the first proposes its most similar one of the second; the r best are taken.

    In a padded batch (`alive` B,n) row i takes rows[i] of them; its other r - rows[i] tokens go from its padding. The
    more important tokens are (`weight` B,n), the more does their merge cost.
    """
    batch, tokens = metric.shape[:2]
    index = torch.arange(tokens, device=metric.device).expand(batch, -1)
    metric, fixed = metric.to(wide(metric.dtype)), (index < 0 if fixed is None else fixed.expand(batch, -1))
    cost = attraction(metric, size, weight) if rule.match == "criteria" else price(metric, size, weight, rule)
    if rule.margin is not None:
        gone, target = redundant(metric, r, fixed, cost, rule.margin, rows)
    elif rule.match == "criteria":
        gone, target = both_ways(cost(index[:, ::2], index[:, 1::2]), r, fixed, rows)
    elif rule.match == "sizes":
        gone, target = by_size(cost, r, fixed, torch.ones_like(metric[..., 0]) if size is None else size)
    else:
        gone, target = nearest(cost(index[:, ::2], index[:, 1::2]), r, fixed[:, ::2], fixed[:, 1::2])
        gone, target = 2 * gone, 2 * target + 1
    if alive is not None:
        gone, target = from_padding(gone, target, alive, rows)
    return arranged(gone, target, tokens)


def price(metric: Tensor, size: Tensor | None, weight: Tensor | None, rule: Rule) -> Callable:
    """Gives what merging the tokens of two lists of places (B,L and B,R) costs (B,L,R)."""

    def cost(left: Tensor, right: Tensor) -> Tensor:
        sizes = (None, None) if size is None else (size.gather(1, left), size.gather(1, right))
        found = costs(take(metric, left), take(metric, right), *sizes, rule.similarity, rule.ward)
        return found if weight is None else found * products(weight, left, right).pow(PRICE)

    return cost


def attraction(metric: Tensor, size: Tensor | None, weight: Tensor | None) -> Callable:
    """The same by several criteria, less for what attracts more: likeness, little importance and small size (MCTF)."""

    def cost(left: Tensor, right: Tensor) -> Tensor:
        found = (costs(take(metric, left), take(metric, right), None, None, "cosine", 0) - 2) / 2
        for each, power in ((weight, IMPORTANCE), (None if size is None else size.clamp(min=1), SIZE)):
            found = found if each is None else found / products(each, left, right).pow(power)
        return found

    return cost


def products(each: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """What two lists of places (B,L and B,R) have of it, multiplied (B,L,R)."""
    return each.gather(1, left)[:, :, None] * each.gather(1, right)[:, None]


def nearest(found: Tensor, r: int, stay: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Of costs (B,L,R) the r cheapest proposals, one for each of the left; some must `stay` (B,L), some take none."""
    best, target = found.masked_fill(bar[:, None], torch.inf).min(-1)
    chosen = best.masked_fill(stay, torch.inf).argsort(dim=-1, stable=True)[:, :r]
    return chosen, target.gather(1, chosen)


def both_ways(found: Tensor, r: int, fixed: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Half of r go from the even places to odd ones, half from odd ones that nothing came to, to even ones (MCTF)."""
    even, odd, turn = fixed[:, ::2], fixed[:, 1::2], torch.arange(r, device=found.device)[None]
    rows = torch.full_like(fixed[:, 0], r, dtype=torch.long) if rows is None else rows
    there, into = nearest(found, r - r // 2, even, odd)
    counts = turn[:, : r - r // 2] < (rows - rows // 2)[:, None]
    left = torch.zeros_like(even).scatter(1, there, counts)
    hit = torch.zeros_like(odd, dtype=torch.long).scatter_add(1, into, counts.long()) > 0
    back, onto = nearest(found.transpose(1, 2), r // 2, odd | hit, even | left)
    # What counts comes first in every row; the rest is padding.
    counts = torch.cat([counts, turn[:, : r // 2] < (rows // 2)[:, None]], 1)
    first = counts.int().argsort(dim=1, descending=True, stable=True)
    gone, target = torch.cat([2 * there, 2 * back + 1], 1), torch.cat([2 * into + 1, 2 * onto], 1)
    return gone.gather(1, first), target.gather(1, first)


def by_size(cost: Callable, r: int, fixed: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller half of the tokens proposes to the larger, so that no two large ones merge (ATM)."""
    order = size.masked_fill(fixed, -1).argsort(dim=1, descending=True, stable=True)
    free = (~fixed).sum(1, keepdim=True)
    rank, large = torch.arange(size.shape[1], device=size.device)[None], free - free // 2
    small = (rank >= large) & (rank < free)
    gone, target = nearest(cost(order, order), r, ~small, rank >= large)
    return order.gather(1, gone), order.gather(1, target)


def redundant(
    metric: Tensor, r: int, fixed: Tensor, cost: Callable, margin: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Only the 2 r tokens with the most others near them take part, by turns on either side (PiToMe)."""
    unit = F.normalize(metric, dim=-1)
    near = F.elu(unit @ unit.transpose(1, 2) - margin).mean(-1).masked_fill(fixed, -torch.inf)
    order = near.argsort(dim=-1, descending=True, stable=True)[:, : 2 * r]
    left, right = order[:, ::2], order[:, 1::2]
    if r == 0:
        return left, right
    found = cost(left, right)
    if rows is not None:  # a row that merges less has padding behind
        found = found.masked_fill(torch.arange(r, device=rows.device) >= rows.clamp(min=1)[:, None, None], torch.inf)
    return left, right.gather(1, found.argmin(-1))


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Copy every merged token to all the places it stands for."""
    return take(x, slot)
