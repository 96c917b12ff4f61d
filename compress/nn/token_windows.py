"""Matching of the tokens of an image with few tokens near them, and a merge around an attention.

Shapes: B batch, N tokens of a grid, C cells of it, S tokens of a cell beside its first, K cells near a cell, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.token_merge import Tokens, on_first
from compress.nn.window import ImageSize
from compress_kernels.token_merge.reference import Matching, arranged, costs, merge, take, wide


@lru_cache(maxsize=32)
def places(height: int, width: int, cell: int, reach: int | None) -> tuple[Tensor, Tensor]:
    """For every cell its tokens but the first (C,S), and the first tokens of the cells near it (C,K); -1 for none.

    The cells near one are at most `reach` away in both directions; None: all, and the image is one large cell.
    """
    index = torch.full((-(-height // cell) * cell, -(-width // cell) * cell), -1)
    index[:height, :width] = torch.arange(height * width).unflatten(0, (height, width))
    cells = index.unflatten(1, (-1, cell)).unflatten(0, (-1, cell)).transpose(1, 2).flatten(2)  # rows, columns, tokens
    sources, first = cells[..., 1:].flatten(0, 1), cells[..., 0]
    if reach is None:
        return sources.reshape(1, -1), first.reshape(1, -1)
    near = F.pad(first, (reach,) * 4, value=-1).unfold(0, 2 * reach + 1, 1).unfold(1, 2 * reach + 1, 1)
    return sources, near.flatten(2).flatten(0, 1)


def match_near(
    x: Tensor,
    r: int,
    near: tuple[Tensor, Tensor],
    similarity: str = "cosine",
    pair: bool = False,
    apart: Tensor | None = None,
) -> Matching:
    """The r tokens of x (B,N,D) that are most like the first token of a cell near them, and which that is.

    With `pair` the two halves of the batch, the same images under two conditions, are matched alike. Tokens that must
    not see each other (`apart` B,N,N) merge last.
    """
    batch, tokens = x.shape[:2]
    if pair and batch % 2 == 0:
        x = torch.cat(x.chunk(2), -1)
    sources, targets = (index.to(x.device) for index in near)
    x = x.to(wide(x.dtype))
    left, right = (take(x, index.clamp(min=0).flatten().expand(len(x), -1)) for index in (sources, targets))
    left, right = left.unflatten(1, sources.shape).flatten(0, 1), right.unflatten(1, targets.shape).flatten(0, 1)
    found = costs(left, right, None, None, similarity, 0).unflatten(0, (len(x), -1))  # B,C,S,K
    if apart is not None:
        rows = apart[:, sources.clamp(min=0)]  # B,C,S,N
        foreign = rows.gather(3, targets.clamp(min=0)[:, None].expand(rows.shape[:3] + targets.shape[1:]))
        found = found.masked_fill(foreign, torch.finfo(found.dtype).max)
    best, at = found.masked_fill((targets < 0)[:, None], torch.inf).min(-1)
    best = best.masked_fill(sources < 0, torch.inf).flatten(1)
    target = targets[:, None].expand(-1, sources.shape[1], -1).expand(len(x), -1, -1, -1).gather(3, at[..., None])
    chosen = best.argsort(dim=-1, stable=True)[:, :r]
    gone = sources.flatten().expand(len(x), -1).gather(1, chosen)
    into = target.flatten(1).gather(1, chosen)
    if len(x) < batch:
        gone, into = gone.repeat(2, 1), into.repeat(2, 1)
    return arranged(gone, into, tokens)


@dataclass
class Shared:
    """The matching that several attentions use in one forward."""

    matching: Matching | None = None
    tokens: tuple[int, ...] = ()

    def clear(self, *_: Any) -> None:
        """A hook in front of the whole model."""
        self.matching, self.tokens = None, ()


@dataclass(frozen=True)
class Near:
    """How much a merge takes away, and how far tokens may go."""

    ratio: float  # of all tokens
    cell: int
    reach: int | None
    similarity: str
    pair: bool
    least: int  # smallest grid

    def removes(self, height: int, width: int) -> int:
        """The tokens merged away of a grid: at most all but the first of every cell."""
        cells = -(-height // self.cell) * -(-width // self.cell)
        tokens = height * width
        return 0 if tokens < self.least else min(int(tokens * self.ratio), tokens - cells)


class MergeNear(nn.Module):
    """Hooks of an attention that merge the image's tokens it reads and copy its answer back to all of them."""

    def __init__(self, path: str, tokens: Tokens, near: Near, patch: int, size: ImageSize, shared: Shared, clock=None):
        super().__init__()
        self.path, self.tokens, self.near, self.patch = path, tokens, near, patch
        self.size, self.shared, self.clock = size, shared, clock

    def extra_repr(self) -> str:
        return str(self.near)

    def shrink(self, module, args, kwargs):
        """Hook in front of the attention."""
        if kwargs.get("attention_mask") is not None:
            raise CompressError(f"{self.path}: an attention mask came for the image, which a merge cannot follow")
        self.tokens.reset()
        x = args[0] if args else kwargs["hidden_states"]
        height, width = self.size.patches(self.patch)
        if x.dim() != 3 or height * width != x.shape[1]:
            raise CompressError(
                f"{self.path}: {tuple(x.shape)} are not the tokens of a grid of {height} x {width}; exclude this "
                "module from tokens.merge_unmerge"
            )
        if r := self.near.removes(height, width):
            self.tokens.begin(x)
            matching = self.matching(x, r, height, width)
            x, self.tokens.size = merge(x, matching, self.tokens.size)
            self.tokens.follow(matching)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    def matching(self, x: Tensor, r: int, height: int, width: int) -> Matching:
        """That of an attention before, of a step before, or a new one."""
        if self.shared.matching is not None and self.shared.tokens == (len(x), height, width):
            return self.shared.matching
        history = {} if self.clock is None or self.clock.history is None else self.clock.history
        if self.clock is not None and self.clock.skips and self.path in history:
            found = history[self.path][0]
        else:
            near = self.near
            found = match_near(x, r, places(height, width, near.cell, near.reach), near.similarity, near.pair)
            history[self.path] = [found]
        self.shared.matching, self.shared.tokens = found, (len(x), height, width)
        return found

    def restore(self, module, args, output):
        """Hook behind it."""
        return on_first(output, self.tokens.unmerge)


@dataclass
class Windowed(Tokens):
    """Tokens of the windows of a grid."""

    mask: Tensor | None = None  # B,N,N, additive: which of them are no neighbours in the image


class MergeInWindow(nn.Module):
    """Hooks of an attention that reads square windows of a grid one by one (B,N,D): tokens are merged within each.

    Their mask goes to the core, since the attention itself would add it to the positions of all tokens.
    """

    def __init__(self, path: str, tokens: Windowed, near: Near, side: int):
        super().__init__()
        self.path, self.tokens, self.near, self.side = path, tokens, near, side

    def extra_repr(self) -> str:
        return f"side={self.side}, {self.near}"

    def shrink(self, module, args, kwargs):
        """Hook in front of the attention."""
        x, mask = args[0], args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if x.shape[1] != self.side**2:
            raise CompressError(f"{self.path}: a window has {x.shape[1]} tokens, it must have {self.side**2}")
        tokens = self.tokens
        tokens.reset()
        tokens.mask = None if mask is None else mask.repeat(len(x) // len(mask), 1, 1)
        if r := self.near.removes(self.side, self.side):
            tokens.begin(x)
            cells = places(self.side, self.side, self.near.cell, self.near.reach)
            apart = None if mask is None else tokens.mask < 0
            matching = match_near(x, r, cells, self.near.similarity, apart=apart)
            x, tokens.size = merge(x, matching, tokens.size)
            tokens.follow(matching)
        return (x,), {key: value for key, value in kwargs.items() if key != "attention_mask"}

    def restore(self, module, args, output):
        """Hook behind it."""
        self.tokens.mask = None
        return on_first(output, self.tokens.unmerge)


class Shifted(nn.Module):
    """An attention core that adds the mask of shifted windows to the positions within one."""

    def __init__(self, tokens: Windowed):
        super().__init__()
        self.tokens = tokens

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        if self.tokens.mask is not None:
            mask = mask + self.tokens.mask[:, None]
        return self.inner(module, query, key, value, mask, scale, causal, **kwargs)
