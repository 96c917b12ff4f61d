"""Heads whose queries and keys, or values, are narrower than the forward of their attention thinks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SPLITS = (Tensor.view, Tensor.reshape)


class Narrow(TorchFunctionMode):
    """Corrects the shapes that a forward gives to its heads, which it knows from the width that they had.

    Some take the width of their keys instead, for values and for what they hand to the output projection, too.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, keys: int, values: int) -> None:
        super().__init__()
        self.one, self.all = (dim, keys), (heads * dim, heads * keys)
        self.widths = {heads * keys: keys, kv_heads * keys: keys, kv_heads * values: values}
        self.values, self.total = values, heads * values

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in SPLITS and len(args) > 1:
            shape = tuple(args[1]) if isinstance(args[1], (tuple, list)) else args[1:]
            args = (args[0], (*shape[:-1], self.last(args[0], shape[-1])))
        return function(*args, **(kwargs or {}))

    def last(self, x: Tensor, wanted: int) -> int:
        """The last length of a new shape: of one head, of all of them side by side, or what was asked for."""
        if x.dim() == 3 and wanted in self.one:
            return self.widths.get(x.shape[-1], wanted)
        if x.dim() == 4 and wanted in self.all and x.shape[-1] == self.values:
            return self.total
        return wanted


def narrow(module: nn.Module, heads: int, kv_heads: int, dim: int, keys: int, values: int) -> None:
    """Let the forward of an attention work with heads of these widths (`dim` before)."""
    # A partial of bound things, not a closure: deepcopy binds it to the copy.
    module.forward = partial(_narrowed, module.forward, (heads, kv_heads, dim, keys, values))
    # Saved, so that no format without room for it can take the model for an ordinary one.
    place = next(module.parameters()).device
    module.register_buffer("head_widths", torch.tensor([keys, values], dtype=torch.int32, device=place))


def _narrowed(forward, sizes: tuple, /, *args, **kwargs):
    with Narrow(*sizes):
        return forward(*args, **kwargs)
