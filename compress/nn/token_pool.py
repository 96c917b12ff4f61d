"""Average pooling of the grid of an image's tokens, two by two, as a grouping that can be undone.

Shapes: B batch, n tokens of now, m tokens after it, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.nn.token_merge import MergeAfter, Tokens
from compress.nn.window import ImageSize
from compress_kernels.token_merge.reference import Matching, merge


def halved(side: int, times: int) -> int:
    """The side of a grid pooled so many times; the last cell of an odd one is a narrow one."""
    return -(-side // 2**times)


def cells(height: int, width: int, first: int, device: torch.device | None = None) -> Tensor:
    """Where each of `first` tokens and then a grid, row by row, is found after pooling (n)."""
    down, right = (torch.arange(side, device=device) // 2 for side in (height, width))
    cell = first + (down[:, None] * halved(width, 1) + right).flatten()
    return torch.cat([torch.arange(first, device=device), cell])


def pooling(slot: Tensor, places: int, batch: int, alive: Tensor | None = None) -> Matching:
    """Each of the `places` keeps its first token, of the tokens that are not padding (`alive` B,n) where it has one."""
    tokens = slot.shape[0]
    slot = slot.expand(batch, -1)
    index = torch.arange(tokens, device=slot.device).expand(batch, -1)
    late = index if alive is None else index + tokens * ~alive
    kept = late.new_zeros(batch, places).scatter_reduce(1, slot, late, "amin", include_self=False) % tokens
    stays = torch.zeros_like(index).scatter(1, kept, 1)
    return Matching(kept, stays.argsort(dim=1, stable=True)[:, : tokens - places], slot)


class PoolAfter(MergeAfter):
    """Hooks of a block that pools the grid it gives: its side by now is a power of two smaller than the image's."""

    def __init__(self, tokens: Tokens, size: ImageSize, first: int, patch: int, times: int):
        super().__init__(tokens, None)
        self.size, self.first, self.patch, self.times = size, first, patch, times

    def extra_repr(self) -> str:
        return f"first={self.first}, patch={self.patch}, times={self.times}"

    def fewer(self, x: Tensor) -> Tensor:
        """The mean of each cell of two by two, weighted by how many tokens each stands for."""
        height, width = (halved(side, self.times) for side in self.size.patches(self.patch))
        if x.shape[1] != self.first + height * width:
            raise CompressError(
                f"tokens.pool: {x.shape[1]} tokens are not {self.first} and the {height} x {width} patches of an image "
                f"of {self.size.height} x {self.size.width}"
            )
        tokens = self.tokens
        tokens.begin(x)
        slot = cells(height, width, self.first, x.device)
        places = self.first + halved(height, 1) * halved(width, 1)
        matching = pooling(slot, places, x.shape[0], tokens.alive)
        x, tokens.size = merge(x, matching, tokens.size)
        tokens.follow(matching)
        return x
