"""Window attention: which keys a query sees, and three ways to compute only those.

B batch, H heads, N tokens, D head size. A rule is a hashable function of query and key positions that also names its
blocks, so that one definition gives the dense mask, the flex block mask and the blockwise loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.errors import CompressError

LONG = {"cpu": 512, "cuda": 4096}  # tokens from which leaving keys out was measured to be faster than a full mask
MANY_CLASS_TOKENS = 16  # more tokens than this beside the image are not class and register tokens
Range = tuple[int, int]


class Band(NamedTuple):
    """A sequence: keys at most `window` away, and the first `special` tokens for everyone."""

    window: int
    special: int
    causal: bool

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        if self.causal:
            return (distance >= 0) & ((distance <= self.window) | (key < self.special))
        return (distance.abs() <= self.window) | (key < self.special) | (query < self.special)

    def blocks(self, tokens: int) -> Iterator[tuple[Range, list[Range]]]:
        """Ranges of queries with the ranges of keys that hold all that they see."""
        first = 0 if self.causal else self.special
        if first:
            yield (0, first), [(0, tokens)]
        step = max(128, self.window // 2)
        for low in range(first, tokens, step):
            high = min(low + step, tokens)
            last = high if self.causal else min(high + self.window, tokens)
            yield (low, high), _union([(0, self.special), (max(low - self.window, 0), last)])


class Disc(NamedTuple):
    """A grid of `height` x `width` image tokens from `first` on: a disc around the query; all other tokens see all."""

    radius: int
    height: int
    width: int
    first: int

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = query - self.first, key - self.first
        down = query // self.width - key // self.width
        right = query % self.width - key % self.width
        return (down * down + right * right <= self.radius**2) | self._beside(query) | self._beside(key)

    def _beside(self, token: Tensor) -> Tensor:
        return (token < 0) | (token >= self.height * self.width)

    def blocks(self, tokens: int) -> Iterator[tuple[Range, list[Range]]]:
        """Ranges of queries with the ranges of keys that hold all that they see."""
        end = self.first + self.height * self.width
        if self.first:
            yield (0, self.first), [(0, tokens)]
        rows = max(self.radius // 2, 1)
        for row in range(0, self.height, rows):
            low, high = max(row - self.radius, 0), min(row + rows + self.radius, self.height)
            inside = (self.first + low * self.width, self.first + high * self.width)
            queries = (self.first + row * self.width, self.first + min(row + rows, self.height) * self.width)
            yield queries, _union([(0, self.first), inside, (end, tokens)])
        if end < tokens:
            yield (end, tokens), [(0, tokens)]


def _union(ranges: list[Range]) -> list[Range]:
    """The same positions as disjoint ranges in order."""
    merged: list[Range] = []
    for low, high in sorted(item for item in ranges if item[0] < item[1]):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def window_mask(rule: Callable, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """The rule as a bool mask [queries, keys], when the queries are the last of the keys."""
    position = torch.arange(keys, device=device)
    return rule(position[keys - queries :, None], position[None])


@lru_cache(maxsize=4)
def _kept_mask(rule: Callable, queries: int, keys: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a mask made in inference mode could not be used by a later backward
        return window_mask(rule, queries, keys, device)


def _mask(rule: Callable, queries: int, keys: int, device: torch.device) -> Tensor:
    made = window_mask if torch.compiler.is_compiling() else _kept_mask
    return made(rule, queries, keys, device)[None, None]


def seen(mask: Tensor) -> Tensor:
    """Where a bool or additive mask lets a query look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def both(mask: Tensor | None, allowed: Tensor) -> Tensor:
    """A mask that forbids what either forbids."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def blockwise(attend: Callable, query: Tensor, key: Tensor, value: Tensor, rule, mask: Tensor | None = None) -> Tensor:
    """Attention one block of queries after the other, each with the keys that it can see: linear in the tokens."""
    tokens, position, out = key.shape[2], torch.arange(key.shape[2], device=key.device), []
    for (low, high), ranges in rule.blocks(tokens):
        index = torch.cat([position[a:b] for a, b in ranges])
        keys, values = (torch.cat([x[:, :, a:b] for a, b in ranges], 2) for x in (key, value))
        given = None if mask is None else mask.expand(-1, -1, tokens, tokens)[:, :, low:high, index]
        allowed = rule(position[low:high, None], index[None])[None, None]
        out.append(attend(query[:, :, low:high], keys, values, both(given, allowed)))
    return torch.cat(out, 2)


@lru_cache(maxsize=4)
def block_mask(rule: Callable, tokens: int, device: torch.device):
    """The rule as a flex BlockMask, found one row of blocks at a time: the full mask is never built."""
    from torch.nn.attention.flex_attention import BlockMask

    size = 128
    count = -(-tokens // size)
    position = torch.arange(tokens, device=device)
    some, whole = [], []
    for low in range(0, tokens, size):
        allowed = rule(position[low : low + size, None], position[None])
        tail = count * size - tokens
        some.append(nn.functional.pad(allowed, (0, tail)).view(-1, count, size).any(2).any(0))
        whole.append(nn.functional.pad(allowed, (0, tail), value=True).view(-1, count, size).all(2).all(0))
    some, whole = torch.stack(some), torch.stack(whole)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
        return blocks.sum(1, dtype=torch.int32)[None, None], order[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole),
        *listed(whole),
        BLOCK_SIZE=size,
        mask_mod=lambda batch, head, query, key: rule(query, key),
        seq_lengths=(tokens, tokens),
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query: Tensor, key: Tensor, value: Tensor, rule: Callable, scale: float | None) -> Tensor:
    """Attention by the compiled block-sparse kernel (forward only on a CPU)."""
    blocks = block_mask(rule, key.shape[2], key.device)
    grouped = query.shape[1] != key.shape[1]
    return _compiled_flex()(query, key, value, block_mask=blocks, scale=scale, enable_gqa=grouped)


def is_long(key: Tensor) -> bool:
    """Is it worth leaving keys out?"""
    return key.shape[2] >= LONG.get(key.device.type, LONG["cuda"])


def local(attend: Callable, query: Tensor, key: Tensor, value: Tensor, rule, scale, sparse: bool) -> Tensor:
    """Attention under a rule alone, by the way that is fastest for this length on this device."""
    if not sparse or not is_long(key):
        return attend(query, key, value, _mask(rule, query.shape[2], key.shape[2], key.device))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if key.is_cuda and not needs_grad and not torch.compiler.is_compiling():
        return flex(query, key, value, rule, scale)
    return blockwise(attend, query, key, value, rule)


class TextWindow(nn.Module):
    """The core of a windowed sequence attention; whatever it wraps stands in `inner`."""

    def __init__(self, window: int, special: int, causal: bool):
        super().__init__()
        self.window, self.special, self.causal = window, special, causal

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        if keys <= self.window + 1:
            return self.inner(module, query, key, value, mask, scale, causal, **kwargs)
        attend = partial(_ask, self.inner, module, scale, kwargs)
        sparse = not hasattr(self.inner, "inner")  # a core below must see all keys at once
        if sparse and self.causal and queries == 1 and keys > self.window + 1 + self.special:
            return attend(query, *self.latest(key, value, mask))
        rule = Band(self.window, self.special, self.causal)
        if mask is None:
            return local(attend, query, key, value, rule, scale, sparse and queries == keys)
        if sparse and not self.special and queries == keys and is_long(key):
            return blockwise(attend, query, key, value, rule, mask)
        return attend(query, key, value, both(mask, self.visible(mask, queries)))

    def visible(self, mask: Tensor, queries: int) -> Tensor:
        """The window in a padded batch or a preallocated cache: positions are read from what the mask lets through."""
        open_BNK = seen(mask[:, 0])
        key = torch.arange(mask.shape[-1], device=mask.device)
        start = open_BNK.int().argmax(-1, keepdim=True)
        last = (open_BNK * key).amax(-1, keepdim=True)
        query = last if self.causal else key[len(key) - queries :, None]
        return Band(self.window, self.special, self.causal)(query - start, key - start)[:, None]

    def latest(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What one decoded token sees, cut out of the cache: its cost does not grow with the context."""
        if mask is None:
            cut = [torch.cat([x[:, :, : self.special], x[:, :, -self.window - 1 :]], 2) for x in (key, value)]
            return *cut, None
        open_BK = seen(mask[:, 0, -1])
        position = torch.arange(open_BK.shape[-1], device=mask.device)
        start = open_BK.int().argmax(-1, keepdim=True)
        first = (open_BK * position).amax(-1, keepdim=True) - self.window
        special = start + position[: self.special]
        recent = first + position[: self.window + 1]
        index = torch.cat([special, recent], 1)
        there = torch.cat([special < first, recent >= 0], 1)  # a special token inside the window counts once
        index = index.clamp(0, len(position) - 1)
        cut = [x.gather(2, index[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])) for x in (key, value)]
        mask = mask.gather(3, index[:, None, None].expand(-1, mask.shape[1], -1, -1))
        return *cut, both(mask, there[:, None, None])


def _ask(inner: nn.Module, module: nn.Module, scale, kwargs: dict, query, key, value, mask) -> Tensor:
    return inner(module, query, key, value, mask, scale, False, **kwargs)


class ImageSize:
    """Reads height and width of the image on its way in: a forward pre-hook of every module above an attention."""

    height = width = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (places := kwargs.get("img_ids")) is not None:  # packed latents: rows and columns of the tokens
            self.height, self.width = (int(size) + 1 for size in places.flatten(0, -2)[:, 1:3].amax(0))
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
                self.height, self.width = value.shape[2:]
                return

    def patches(self, patch: int) -> tuple[int, int]:
        """Height and width of the grid of patches of this size."""
        return self.height // patch, self.width // patch


class ImageWindow(nn.Module):
    """The core of a windowed image attention: a disc on the grid; class and text tokens are seen by and see all."""

    def __init__(self, path: str, radius: int, patch: int, text: str | None, size: ImageSize):
        super().__init__()
        self.path, self.radius, self.patch, self.text, self.size = path, radius, patch, text, size

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        tokens = key.shape[2]
        height, width, first = self.grid(tokens, query.shape[2])
        if (height - 1) ** 2 + (width - 1) ** 2 <= self.radius**2:
            return self.inner(module, query, key, value, mask, scale, causal, **kwargs)
        rule = Disc(self.radius, height, width, first)
        attend = partial(_ask, self.inner, module, scale, kwargs)
        if mask is not None:
            return attend(query, key, value, both(mask, _mask(rule, tokens, tokens, key.device)))
        return local(attend, query, key, value, rule, scale, not hasattr(self.inner, "inner"))

    def grid(self, tokens: int, queries: int) -> tuple[int, int, int]:
        """Height, width and first token of the grid, from the image that is on its way and the number of tokens."""
        height, width = self.size.patches(self.patch)
        beside = tokens - height * width
        if not height or queries != tokens or beside < 0 or (self.text is None and beside > MANY_CLASS_TOKENS):
            raise CompressError(
                f"{self.path}: {queries} queries and {tokens} keys are not the {height} x {width} tokens of an image "
                f"of {self.size.height} x {self.size.width}; exclude this module from linear.window"
            )
        return height, width, 0 if self.text == "last" else beside
