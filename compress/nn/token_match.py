"""Bipartite soft matching of similar tokens, as pure functions of tensors.

Shapes: B batch, n tokens, r tokens that a merge takes away, D width. Nothing larger than the n/2 x n/2 scores is made.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    similarity: str = "cosine",
) -> Matching:
    """Every second token proposes its most similar one among the others; the r strongest proposals are taken.

    In a padded batch (`alive` B,n) row i takes rows[i] of them; its other r - rows[i] tokens go from its padding.
    """
    score = _scores(metric, similarity)
    batch, tokens = metric.shape[:2]
    if fixed is not None:
        score = score.masked_fill(fixed[:, None, 1::2], -torch.inf)
    best, target = score.max(-1)
    if fixed is not None:
        best = best.masked_fill(fixed[:, ::2], -torch.inf)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    gone, target = chosen * 2, target.gather(1, chosen) * 2 + 1
    if alive is not None:
        turn = torch.arange(r, device=metric.device)[None] - rows[:, None]
        padding = alive.int().argsort(dim=-1, stable=True)[:, :r].gather(1, turn.clamp(min=0))
        gone, target = torch.where(turn < 0, gone, padding), torch.where(turn < 0, target, padding)
    index = torch.arange(tokens, device=metric.device).expand(batch, -1)
    stays = torch.ones_like(index, dtype=torch.bool).scatter(1, gone, False)
    place = (stays.cumsum(1) - 1).clamp(min=0)
    # Tokens that go are written to a spare last column.
    kept = index.new_zeros(batch, tokens - r + 1).scatter(1, place.masked_fill(~stays, tokens - r), index)[:, :-1]
    return Matching(kept, gone, place.scatter(1, gone, place.gather(1, target)))


def _scores(metric: Tensor, similarity: str) -> Tensor:
    """Similarity of every even with every odd token, in float32: half precision would tie the closest pairs."""
    metric = metric.to(wide(metric.dtype))
    if similarity == "cosine":
        metric = F.normalize(metric, dim=-1)
        return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    even, odd = metric[:, ::2], metric[:, 1::2]
    lengths = even.square().sum(-1)[:, :, None] + odd.square().sum(-1)[:, None]
    return torch.baddbmm(lengths, even, odd.transpose(1, 2), beta=-1, alpha=2)


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
