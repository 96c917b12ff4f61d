"""Each image of a batch keeps as many tokens as it needs; those of all images go on as one sequence, without padding.

Shapes: B images, N tokens of the input, T tokens of all images that are left, D width. Behind the N places of an image
there is one more, for the token that its stopped ones are fused into.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.token_match import bystanders
from compress.nn.token_merge import LEAST, MergeAfter, Tokens


@dataclass(frozen=True)
class Mass:
    """Which tokens stay themselves: special ones, and the fewest others that hold this share of all scores."""

    mass: float
    first: int = 0  # class, distillation and register tokens
    last: bool = False  # the closing token of a text

    def at_most(self, tokens: int) -> int:
        """How many of so many can be left, whatever they look like."""
        special = self.first + int(self.last)
        return min(tokens, special + ceil(self.mass * (tokens - special)) + 1)


@dataclass
class Packed(Tokens):
    """The tokens of a batch of images as one sequence (1,T,D), and where those that stopped stand."""

    stood: Tensor | None = None  # B,N+1,D: every token when it was packed or stopped
    real: Tensor | None = None  # B,N: not padding
    inside: Tensor | None = None  # B,N+1: goes on
    index: Tensor | None = None  # T: the place of each token of the sequence among all of `stood`
    groups: list[tuple[int, int]] | None = None  # images in a row that have equally many tokens, and how many

    def reset(self) -> None:
        super().reset()
        self.stood = self.real = self.inside = self.index = self.groups = None

    def see(self, mask: Tensor, batch: int) -> None:
        """Learn which tokens are padding; nothing else in a mask has a place in a packed sequence."""
        super().see(mask, batch)
        hidden = ~self.alive[:, None, None]
        plain = ~hidden if mask.dtype == torch.bool else torch.zeros_like(mask).masked_fill(hidden, -torch.inf)
        given = mask if mask.dtype == torch.bool else mask.masked_fill(hidden, -torch.inf)
        queries = self.alive[:, None, :, None] if mask.shape[2] > 1 else self.alive.new_ones(1, 1, 1, 1)
        if not (given == plain).masked_fill(~queries, True).all():
            raise CompressError("tokens.pack: its attention mask hides more than padding, which cannot be packed")

    def pack(self, x: Tensor, rule: Mass) -> Tensor:
        """Stop the tokens that no longer count, and put what is left of all images into one sequence."""
        score, self.score = self.score, None
        if x.is_meta:
            return self.outlined(x, rule)
        if self.groups is None:
            self.begin(x)
            score = F.pad(score, (0, 1))
        else:
            self.stood = self.unpacked(x)
            score = torch.zeros(self.inside.shape, dtype=score.dtype, device=x.device).put_(self.index, score)
        self.inside, self.stood = stop(self.stood, self.inside, score, rule)
        self.index, self.groups = packing(self.inside)
        return self.stood.flatten(0, 1)[None, self.index]

    def begin(self, x: Tensor) -> None:
        """Before the first packing every token goes on that is not padding."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if self.alive is None else self.alive
        self.real, self.alive = real, None
        self.stood, self.inside = F.pad(x, (0, 0, 0, 1)), F.pad(real, (0, 1))

    def unpacked(self, x: Tensor) -> Tensor:
        """Every token where it is now; those that stopped have moved as the one they were fused into (B,N+1,D)."""
        now = self.stood.flatten(0, 1).index_copy(0, self.index, x[0]).view_as(self.stood)
        moved = now[:, -1:] - self.stood[:, -1:]
        stopped = F.pad(self.real, (0, 1)) & ~self.inside
        return torch.where(stopped[..., None], now + moved, now)

    def unmerge(self, x: Tensor) -> Tensor:
        """Bring x back to the places of the input and forget."""
        if self.groups is not None:
            x = x.new_empty(self.stood.shape)[:, :-1] if x.is_meta else self.unpacked(x)[:, :-1]
        self.reset()
        return x

    def outlined(self, x: Tensor, rule: Mass) -> Tensor:
        """Without data nobody knows how many are left; on meta it is as many as there can be."""
        if self.groups is None:
            self.stood = F.pad(x, (0, 0, 0, 1))
        images, tokens = (self.groups or [x.shape[:2]])[0]
        self.groups = [(images, rule.at_most(tokens))]
        return x.new_empty(1, images * self.groups[0][1], x.shape[2])


def stop(x: Tensor, inside: Tensor, score: Tensor, rule: Mass) -> tuple[Tensor, Tensor]:
    """Which tokens inside (B,N+1) go on by their scores, and x (B,N+1,D) with the fused ones in the last place."""
    present, fused = inside[:, :-1], inside[:, -1:]
    special = bystanders(rule, present.shape[1], present, x.device) & present
    keep = special | fewest(score[:, :-1].masked_fill(special | ~present, 0), rule.mass)
    stops = present & ~keep
    alone = (stops.sum(1, keepdim=True) == 1) & ~fused  # it would be fused with nothing
    keep, stops = keep | (stops & alone), stops & ~alone
    weight = score.clamp(min=LEAST) * torch.cat([stops, fused], 1)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=LEAST)
    # Padding may hold anything: it must add nothing, not 0 * nan.
    mean = weight[:, None] @ torch.where(weight[..., None] > 0, x.to(weight.dtype), 0)
    return torch.cat([keep, fused | stops.any(1, keepdim=True)], 1), torch.cat([x[:, :-1], mean.to(x.dtype)], 1)


def fewest(score: Tensor, mass: float) -> Tensor:
    """The fewest tokens of each row whose scores (B,N) add up to this share of all."""
    high, order = score.double().sort(dim=1, descending=True, stable=True)
    running = high.cumsum(1)
    needed = F.pad(running[:, :-1], (1, 0)) < mass * running[:, -1:]
    return torch.zeros_like(needed).scatter(1, order, needed)


def packing(inside: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The places (T) of all tokens inside, images with equally many side by side, and the groups of such images."""
    counts = inside.sum(1)
    order = counts.argsort(stable=True)
    image, place = inside[order].nonzero(as_tuple=True)
    groups = [(len([*same]), number) for number, same in groupby(counts[order].tolist())]
    return order[image] * inside.shape[1] + place, groups


class Apart(nn.Module):
    """An attention core that lets the tokens of each image in a packed sequence see only each other.

    Images with equally many tokens are one call of the inner core, so nothing is computed that a mask would hide.
    """

    def __init__(self, tokens: Packed):
        super().__init__()
        self.tokens = tokens

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        tokens = self.tokens
        if tokens.groups is None:
            if mask is not None and tokens.alive is None:
                tokens.see(mask, query.shape[0])
            return self.inner(module, query, key, value, mask, scale, causal, **kwargs)
        outs, scores, start = [], [], 0
        for images, number in tokens.groups:
            parts = (part(x, start, images, number) for x in (query, key, value))
            outs.append(self.inner(module, *parts, None, scale, causal, **kwargs).transpose(1, 2).flatten(0, 1))
            scores += [] if tokens.score is None else [tokens.score.flatten()]
            start += images * number
        tokens.score = torch.cat(scores) if scores else None
        return torch.cat(outs)[None].transpose(1, 2)


def part(x: Tensor, start: int, images: int, number: int) -> Tensor:
    """Of heads of a packed sequence (1,H,T,d) those of a group of images (images,H,number,d)."""
    return x[0, :, start : start + images * number].unflatten(1, (images, number)).transpose(0, 1)


class PackAfter(MergeAfter):
    """Hooks of a block after which each image goes on with the tokens that it needs."""

    def __init__(self, tokens: Packed, rule: Mass):
        super().__init__(tokens, None)
        self.rule = rule

    def extra_repr(self) -> str:
        return str(self.rule)

    def fewer(self, x: Tensor) -> Tensor:
        return self.tokens.pack(x, self.rule)
