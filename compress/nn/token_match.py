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

from compress_kernels.token_merge.reference import Matching, arranged, bipartite, costs, from_padding, take, wide

MILLION = 10**6  # shares are counted in millionths, so that integers and tensors round alike


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
        gone, target = from_padding(gone, target, alive, rows)
    return arranged(gone, target, tokens)


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


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Copy every merged token to all the places it stands for."""
    return take(x, slot)
