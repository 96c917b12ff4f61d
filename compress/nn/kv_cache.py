"""A layer of transformers' cache that keeps keys and values in a few bits, and the hook that puts it into a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from compress.errors import CompressError

# Legend: B batch, H key-value heads, T tokens, D channels of a head


def encode(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..2^bits-1 with one scale and one lowest value along `dim`, both kept in it as a length of one."""
    low, high = x.aminmax(dim=dim, keepdim=True)
    # A little more than the step, so that rounding it to a short dtype cannot leave the highest value out of reach.
    step = (high.float() - low.float()) / ((1 << bits) - 1) * (1 + torch.finfo(x.dtype).eps)
    scale = torch.where(step > 0, step, 1).to(x.dtype)
    codes = ((x.float() - low.float()) / scale.float()).round()
    return codes.clamp(0, (1 << bits) - 1).to(torch.uint8), scale, low


def pack(codes: Tensor, bits: int) -> Tensor:
    """8 / bits neighbouring codes of the last dimension in a byte, the first in its lowest bits."""
    parts = F.pad(codes, (0, -codes.shape[-1] % (8 // bits))).unflatten(-1, (-1, 8 // bits))
    return (parts << _shifts(bits, codes)).sum(-1, dtype=torch.uint8)


def unpack(words: Tensor, bits: int, width: int) -> Tensor:
    """The codes of packed bytes."""
    return (words[..., None] >> _shifts(bits, words) & (1 << bits) - 1).flatten(-2)[..., :width]


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


def quantize_keys(keys_BHTD: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """Each channel over `group` tokens, of which T is a multiple."""
    codes, scale, low = encode(keys_BHTD.unflatten(-2, (-1, group)), bits, -2)
    return {"key": pack(codes.flatten(-3, -2), bits), "key_scale": scale.squeeze(-2), "key_low": low.squeeze(-2)}


def dequantize_keys(held: dict[str, Tensor], bits: int) -> Tensor:
    """The keys that stand for these codes, [B, H, T, D]."""
    scale, low = held["key_scale"][..., None, :], held["key_low"][..., None, :]
    codes = unpack(held["key"], bits, scale.shape[-1]).unflatten(-2, (scale.shape[-3], -1))
    return torch.addcmul(low, codes.to(low.dtype), scale).flatten(-3, -2)


def quantize_values(values_BHTD: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """Each token over `group` channels; over all of them where they are no multiple of it."""
    width = values_BHTD.shape[-1]
    codes, scale, low = encode(values_BHTD.unflatten(-1, (-1, width if width % group else group)), bits, -1)
    return {"value": pack(codes.flatten(-2), bits), "value_scale": scale.squeeze(-1), "value_low": low.squeeze(-1)}


def dequantize_values(held: dict[str, Tensor], bits: int, width: int) -> Tensor:
    """The values that stand for these codes, [B, H, T, D]."""
    scale, low = held["value_scale"][..., None], held["value_low"][..., None]
    codes = unpack(held["value"], bits, width).unflatten(-1, (scale.shape[-2], -1))
    return torch.addcmul(low, codes.to(low.dtype), scale).flatten(-2)


class QuantizedCacheLayer(DynamicLayer):
    """The first `sink` and the last `window` tokens (up to a group more) stay as they are, all between is quantized.

    Attention is given the dense tensors of this one layer, which it lets go. What one call brings, it also sees
    unquantized: a prompt in one piece is answered as with any other cache.
    """

    is_croppable = True  # as far as the window reaches; what drafts are taken back is shorter

    def __init__(self, bits: int, group: int, window: int, sink: int) -> None:
        super().__init__()
        self.bits, self.group, self.window, self.sink = bits, group, window, sink
        self.held: dict[str, Tensor] = {}  # every tensor has its rows in the first and its tokens in the third place

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        dense = self.dense()
        self._quantize_all_but_the_window()
        return dense

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, H, T, D]."""
        if "key" not in self.held:
            return self.keys, self.values
        keys, values = dequantize_keys(self.held, self.bits), self._dequantized_values()
        held = self.held
        return torch.cat([held["key_sink"], keys, self.keys], -2), torch.cat(
            [held["value_sink"], values, self.values], -2
        )

    def _dequantized_values(self) -> Tensor:
        return dequantize_values(self.held, self.bits, self.values.shape[-1])

    def _quantize_all_but_the_window(self) -> None:
        sink = 0 if self.held else self.sink
        ready = (self.keys.shape[-2] - sink - self.window) // self.group * self.group
        if ready <= 0:
            return
        if not self.held:
            self.held = {"key_sink": self.keys[..., :sink, :].clone(), "value_sink": self.values[..., :sink, :].clone()}
        old = slice(sink, sink + ready)
        new = quantize_keys(self.keys[..., old, :], self.bits, self.group)
        new |= quantize_values(self.values[..., old, :], self.bits, self.group)
        self.held |= {
            name: torch.cat([self.held[name], part], -2) if name in self.held else part for name, part in new.items()
        }
        # Copies, since a slice would keep what was just quantized.
        self.keys, self.values = self.keys[..., sink + ready :, :].clone(), self.values[..., sink + ready :, :].clone()

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return self.keys.shape[-2] + sum(self.held[name].shape[-2] for name in ("key_sink", "key") if name in self.held)

    def nbytes(self) -> int:
        """The memory that this layer holds between two calls."""
        tensors = [self.keys, self.values, *self.held.values()] if self.is_initialized else []
        return sum(tensor.nbytes for tensor in tensors)

    def reset(self) -> None:
        self.held = {}
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        if self.held and abs(tokens_to_remove) > self.keys.shape[-2]:
            raise CompressError(
                f"quantize.kv_cache: {abs(tokens_to_remove)} tokens are to be taken back, the unquantized window holds "
                f"{self.keys.shape[-2]}; use a larger window"
            )
        super().crop(tokens_to_remove)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all tensors in the same way."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.held = {name: change(tensor) for name, tensor in self.held.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        self._rows(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._rows(lambda tensor: tensor.to(self.device, non_blocking=True))


class CacheHook:
    """Before an attention's forward: puts a quantized layer into the cache that it was handed, if none is there yet.

    An object and not a closure, so that a copy of the model has its own.
    """

    def __init__(self, argument: str, place: int, **settings: int) -> None:
        self.argument, self.place, self.settings = argument, place, settings

    def __call__(self, attention, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get(self.argument, args[self.place] if len(args) > self.place else None)
        cache = kwargs.get("cache") if cache is None else cache  # continuous batching hands its own beside
        if cache is not None:
            self.install(cache, attention.layer_idx)

    def install(self, cache: Cache, index: int) -> None:
        """Put a quantized layer at this place of the cache."""
        if not isinstance(cache, Cache):
            raise CompressError(
                f"quantize.kv_cache: the cache is a {type(cache).__name__}, it must be a DynamicCache (not the "
                "pages of continuous batching; use generate)"
            )
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layers += [DynamicLayer() for _ in range(len(cache.layers), index + 1)]
        layer = cache.layers[index]
        if isinstance(layer, QuantizedCacheLayer):
            return
        if type(layer) is not DynamicLayer:
            raise CompressError(
                f"quantize.kv_cache: layer {index} of the cache is a {type(layer).__name__}, it must be a DynamicLayer "
                "(generate without cache_implementation)"
            )
        cache.layers[index] = QuantizedCacheLayer(**self.settings)
        if layer.is_initialized:
            cache.layers[index].update(layer.keys, layer.values)
