"""Pruning of tokens by what attention makes of them: scores from a few query rows, the choice, and the fused rest.

Shapes: B batch, H heads, n tokens of now, m tokens left, R query rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.nn.probabilities import per_query, probabilities
from compress.nn.token_match import MILLION, bystanders
from compress.nn.token_merge import LEAST, MergeAfter, Tokens
from compress_kernels.token_merge.reference import Matching, take, wide

ROWS = 16  # queries whose attention is looked at where there is no class token


@dataclass(frozen=True)
class Keep:
    """How many tokens stay, which in any case, and how the others are chosen."""

    share: float
    first: int = 0  # class, distillation and register tokens
    last: bool = False  # the closing token of a text
    spread: bool = False

    def kept(self, tokens):
        """How many of so many tokens (a number or a tensor of them) stay themselves."""
        special = self.first + int(self.last)
        wanted = special - (special - tokens) * round(self.share * MILLION) // MILLION
        return torch.minimum(wanted, tokens) if isinstance(tokens, Tensor) else min(wanted, tokens)


def class_rows(alive: Tensor | None, batch: int, device) -> Tensor:
    """The place of each row's class token, its first that is not padding (B,1)."""
    return torch.zeros(batch, 1, dtype=torch.long, device=device) if alive is None else alive.int().argmax(1)[:, None]


def even_rows(alive: Tensor | None, batch: int, tokens: int, device) -> Tensor:
    """The places of ROWS queries evenly spaced over the tokens that are not padding (B,R)."""
    alive = torch.ones(batch, tokens, dtype=torch.bool, device=device) if alive is None else alive
    real = alive.int().argsort(dim=1, descending=True, stable=True)
    return real.gather(1, torch.arange(ROWS, device=device) * alive.sum(1, keepdim=True) // ROWS)


def attention_of(rows: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """What the queries in these rows (B,R) give each key (B,H,R,n)."""
    place = rows[:, None, :, None]
    query = query.gather(2, place.expand(-1, query.shape[1], -1, query.shape[-1]))
    if mask is not None and mask.shape[2] > 1:
        mask = mask.expand(len(rows), -1, -1, -1)
        mask = mask.gather(2, place.expand(-1, mask.shape[1], -1, mask.shape[-1]))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(wide(query.dtype))
    return probabilities(query.to(wide(query.dtype)), key.to(wide(key.dtype)), mask, scale)


class Score(nn.Module):
    """An attention core that scores the tokens by a few of its query rows; the attention itself stays what it is."""

    def __init__(self, tokens: Tokens, by: str):
        super().__init__()
        self.tokens, self.by = tokens, by

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        given = self.given(query, key, mask, scale)
        if self.by == "value_aware":  # the length of what each token adds to the class token, all heads side by side
            length = per_query(value.to(given.dtype).square().sum(-1), query)
            self.tokens.score = (given[:, :, 0].square() * length).sum(1).sqrt()
        else:
            self.tokens.score = given.mean((1, 2))
        return self.inner(module, query, key, value, mask, scale, causal, **kwargs)

    def given(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """What the queries that are asked give each key (B,H,R,n)."""
        alive, (batch, _, tokens, _) = self.tokens.alive, query.shape
        if self.by == "received":
            return attention_of(even_rows(alive, batch, tokens, query.device), query, key, mask, scale)
        if alive is not None or (mask is not None and (mask.dtype == torch.bool or mask.shape[2] > 1)):
            return attention_of(class_rows(alive, batch, query.device), query, key, mask, scale)
        # Log sizes at most, which hide nothing. For one text each operation less counts.
        asked, key = (x.to(wide(x.dtype)) for x in (query[:, :, :1], per_query(key, query)))
        scores = asked * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1)

    def extra_repr(self) -> str:
        return f"by={self.by}"


def spread(score: Tensor, fixed: Tensor, wanted: Tensor) -> Tensor:
    """Raise the scores (B,n) of tokens that even steps through their running sum hit, `wanted` (B,1) steps a row."""
    share = score.masked_fill(fixed, 0)
    share = share / share.sum(1, keepdim=True).clamp(min=LEAST)
    step = torch.arange(score.shape[1], device=score.device).minimum(wanted - 1).clamp(min=0)
    hit = torch.searchsorted(share.cumsum(1), (step + 0.5) / wanted.clamp(min=1).to(share.dtype))
    hits = torch.zeros_like(share).scatter(1, hit.clamp(max=score.shape[1] - 1), 1.0)
    return share + 2 * hits.masked_fill(wanted < 1, 0)


def choose(score: Tensor, keep: Keep, alive: Tensor | None = None) -> tuple[Matching, Tensor]:
    """Which tokens stay by their scores (B,n), and which are fused (B,n) into the place of the first of them.

    In a padded batch (`alive` B,n) each row keeps its own share; places that are left over stay padding.
    """
    batch, tokens = score.shape
    device = score.device
    fixed = bystanders(keep, tokens, alive, device).expand(batch, -1)
    alive = torch.ones_like(fixed) if alive is None else alive
    lengths = alive.sum(1, keepdim=True)
    kept = keep.kept(lengths)
    if keep.spread:
        score = spread(score, fixed, kept - (fixed & alive).sum(1, keepdim=True))
    score = score.masked_fill(fixed, torch.inf).masked_fill(~alive, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)
    left = torch.minimum(kept + 1, lengths)
    # Those that stay first, then padding, which fills the places left over, then those that go.
    sorted_by_fate = torch.where(rank < left, 0, torch.where(alive, 2, 1)).argsort(dim=1, stable=True)
    width = min(keep.kept(tokens) + 1, tokens)
    stays, gone = sorted_by_fate[:, :width].sort(1).values, sorted_by_fate[:, width:]
    place = torch.zeros_like(order).scatter(1, stays, torch.arange(width, device=device).expand(batch, -1))
    home = place.gather(1, order.gather(1, (left - 1).clamp(min=0)))
    slot = place.scatter(1, gone, home.expand_as(gone))
    return Matching(stays, gone, slot), (rank >= kept) & alive


def fuse(x: Tensor, score: Tensor, matching: Matching, fused: Tensor) -> Tensor:
    """The tokens that stay, and the mean of the fused ones by their scores in the place of the first of them."""
    weight = score.clamp(min=LEAST) * fused
    weight = weight / weight.sum(1, keepdim=True).clamp(min=LEAST)
    # Padding may hold anything: it must add nothing, not 0 * nan.
    rest = torch.where(fused[..., None], x.to(weight.dtype), 0)
    mean = (weight[:, None] @ rest).to(x.dtype)
    home = fused.gather(1, matching.kept) & fused.any(1, keepdim=True)
    return torch.where(home[..., None], mean, take(x, matching.kept))


class PruneAfter(MergeAfter):
    """Hooks of a block that hands on the tokens its attention looks at, and the mean of all others."""

    def __init__(self, tokens: Tokens, keep: Keep):
        super().__init__(tokens, None)
        self.keep = keep

    def extra_repr(self) -> str:
        return str(self.keep)

    def fewer(self, x: Tensor) -> Tensor:
        """Keep a share of the tokens; the fused one stands for all the others."""
        tokens = self.tokens
        score, tokens.score = tokens.score, None
        if self.keep.kept(x.shape[1]) + 1 >= x.shape[1]:
            return x
        tokens.begin(x)
        matching, fused = choose(score, self.keep, tokens.alive)
        x = fuse(x, score, matching, fused)
        tokens.size = torch.zeros_like(tokens.size[:, : x.shape[1]]).scatter_add(1, matching.slot, tokens.size)
        tokens.follow(matching)
        return x
