"""Attention of all tokens of an image to a coarser grid of keys and values.

Shapes: tokens stand in the last dimension but one; n of them, of which height x width are the image's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.window import ImageSize


def coarse(grid: Tensor, factor: int, average: bool) -> Tensor:
    """Of each cell of factor x factor of a grid (..,height,width,D) its first entry or its mean; an odd grid has narrow
    cells at its right and lower edge."""
    if not average:
        return grid[..., ::factor, ::factor, :]
    maps = grid.movedim(-1, -3).flatten(0, -4)
    means = F.avg_pool2d(maps, factor, ceil_mode=True)
    return means.unflatten(0, grid.shape[:-3]).movedim(-3, -1)


def counts(side: int, factor: int, device: torch.device | None = None) -> Tensor:
    """How many rows (or columns) of a side each cell has."""
    return (side - torch.arange(0, side, factor, device=device)).clamp(max=factor)


class CoarseKeys(nn.Module):
    """An attention core whose keys and values are those of a coarser grid; class and text tokens keep theirs.

    `others` says which tokens stand beside the image's: so many before them, or a text "before" or "after" them. Where
    they or narrow cells do, each key counts as many times as its cell has tokens (log of that on the logits).
    """

    closed = "its keys are those of a coarser grid"

    def __init__(
        self, path: str, factor: int, average: bool, least: int, patch: int, others: int | str, size: ImageSize
    ):
        super().__init__()
        self.path, self.factor, self.average, self.least = path, factor, average, least
        self.patch, self.others, self.size = patch, others, size

    def extra_repr(self) -> str:
        return f"factor={self.factor}, average={self.average}, least={self.least}, others={self.others}"

    def grid(self, tokens: int) -> tuple[int, int, int]:
        """Height, width and first token of the image's grid among so many tokens."""
        height, width = self.size.patches(self.patch)
        beside = tokens - height * width
        if not height * width or beside < 0 or self.others not in (beside, "before", "after"):
            raise CompressError(
                f"{self.path}: {tokens} tokens are not the {height} x {width} of an image of {self.size.height} x "
                f"{self.size.width} and what stands beside them; exclude this module from tokens.downsample_kv"
            )
        return height, width, 0 if self.others == "after" else beside

    def thin(self, x: Tensor) -> Tensor:
        """The coarser grid of x (..,n,D), with the other tokens where they were."""
        height, width, first = self.grid(x.shape[-2])
        if height * width < self.least:
            return x
        before, image, after = x.split([first, height * width, x.shape[-2] - first - height * width], -2)
        image = coarse(image.unflatten(-2, (height, width)), self.factor, self.average).flatten(-3, -2)
        return torch.cat([before, image, after], -2) if first or after.shape[-2] else image

    def thin_input(self, linear: nn.Module, args: tuple) -> tuple:
        """Hook before a projection of keys or values, which then has less to do."""
        return (self.thin(args[0]), *args[1:])

    def log_counts(self, query: Tensor) -> Tensor | None:
        """Log of how many tokens each key stands for, where that is not the same for all."""
        height, width, first = self.grid(query.shape[2])
        after = query.shape[2] - first - height * width
        even = height % self.factor == 0 == width % self.factor
        if height * width < self.least or (even and not first and not after):
            return None
        down, right = (counts(side, self.factor, query.device) for side in (height, width))
        return F.pad((down[:, None] * right).flatten().log(), (first, after)).to(query.dtype)[None, None, None]

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        if mask is not None:
            raise CompressError(f"{self.path}: an attention mask came, which a coarser grid of keys cannot follow")
        if key.shape[2] == query.shape[2]:  # no projection was spared
            key, value = self.thin(key), self.thin(value)
        return self.inner(module, query, key, value, self.log_counts(query), scale, causal, **kwargs)
