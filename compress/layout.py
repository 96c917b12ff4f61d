"""How a fused projection is laid out, found by watching what the attention's own forward does with its channels."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError
from compress.roles import width_in, width_out

MOVES = (
    "view", "reshape", "transpose", "permute", "split", "chunk", "unbind", "__getitem__", "contiguous", "flatten",
    "unflatten", "squeeze", "unsqueeze", "movedim", "swapaxes", "t", "narrow", "select", "tensor_split", "expand",
    "broadcast_to", "repeat_interleave", "to", "float", "half", "clone",
)  # fmt: skip
# The forward runs without most of its arguments, so it stops somewhere; what it did before that is the answer.
OBSTACLES = (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError, AssertionError, CompressError)
OTHER_SEQUENCE = ("encoder_hidden_states", "key_value_states")


class Watch(TorchFunctionMode):
    """Follows a tensor of channel numbers through operations that only move entries, and keeps every piece seen."""

    def __init__(self) -> None:
        self.pieces: dict[int, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        moved = getattr(function, "__name__", "") in MOVES
        if moved and args and isinstance(args[0], Tensor) and id(args[0]) in self.pieces:
            for piece in result if isinstance(result, (tuple, list)) else (result,):
                self.pieces[id(piece)] = piece  # also keeps the piece alive, so that no identity is reused
        return result

    def seen(self) -> set[tuple[int, ...]]:
        """The channels of every piece, in ascending order."""
        return {tuple(piece.unique().long().tolist()) for piece in self.pieces.values()}


def sequences(module: nn.Module, is_pair: bool) -> list[str]:
    """The arguments beside the first that may be hidden states: the required ones, and keys' for a key-value pair."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in plain if p.default is p.empty or (is_pair and p.name in OTHER_SEQUENCE)]


def splits(module: nn.Module, fused: nn.Module, is_pair: bool) -> set[tuple[int, ...]]:
    """The sets of output channels of `fused` that the forward of `module` takes apart."""
    channels = torch.arange(width_out(fused), dtype=torch.float32, device="cpu")  # loaders build under the meta device
    for shape in ((1, 4), (1, 2, 2), (4,)):
        watch = Watch()

        def number_channels(_, args, output, watch=watch):
            marked = channels.expand(*output.shape[:-1], -1).clone()
            watch.pieces[id(marked)] = marked
            return marked

        handle = fused.register_forward_hook(number_channels)
        hidden = torch.zeros(*shape, width_in(fused), dtype=fused.weight.dtype, device=fused.weight.device)
        others = dict.fromkeys(sequences(module, is_pair), hidden)
        try:
            with torch.no_grad(), watch:
                type(module).forward(module, hidden, **others)
        except OBSTACLES:
            pass
        finally:
            handle.remove()
        if len(seen := watch.seen()) > 1:
            return seen
    return set()


def ranges(starts, width: int) -> list[int]:
    """The channels start .. start + width of every start, in this order."""
    return [start + i for start in starts for i in range(width)]


def fused_rows(heads: int, groups: int, dim: int, value_dim: int) -> tuple[list, list, list]:
    """Start of every query, key and value head where all queries come first, then all keys, then all values."""
    keys, values = heads * dim, (heads + groups) * dim
    return (
        [head * dim for head in range(heads)],
        [keys + group * dim for group in range(groups)],
        [values + group * value_dim for group in range(groups)],
    )


def interleaved_rows(heads: int, groups: int, dim: int, value_dim: int) -> tuple[list, list, list]:
    """The same where every group holds its queries, its key and its value side by side."""
    queries = heads // groups
    size = (queries + 1) * dim + value_dim
    return (
        [group * size + query * dim for group in range(groups) for query in range(queries)],
        [group * size + queries * dim for group in range(groups)],
        [group * size + (queries + 1) * dim for group in range(groups)],
    )


def decide(module: nn.Module, fused: nn.Module, heads: int, groups: int, dim: int, value_dim: int) -> str:
    """ "fused", "interleaved" or "" where the forward shows neither."""
    seen = splits(module, fused, is_pair=not heads)
    for name, rows in (("fused", fused_rows), ("interleaved", interleaved_rows)):
        parts = zip(rows(heads, groups, dim, value_dim), (dim, dim, value_dim), strict=True)
        if all(tuple(ranges(starts, width)) in seen for starts, width in parts if starts):
            return name
    return ""
