"""Parts of a model tried alone, with random weights in float64: what holds there holds for every checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.outputs import relative_error
from compress.roles import width_in
from compress.stacks import tensors
from compress.view import Attention, View, scope

# Raised by a part that needs more than plain tokens, such as rotary positions.
WRONG = (AssertionError, AttributeError, CompressError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
OTHERS = ("encoder_hidden_states", "key_value_states")  # what a forward calls the other sequence
EXACT = 1e-9


@contextmanager
def randomized(view: View, path: str) -> Iterator[nn.Module]:
    """Put a copy with random weights in the place of a module, which may be on meta, and the original back."""
    original = view.module(path)
    module = deepcopy(original)
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module = module.to_empty(device="cpu")
        for buffer in module.buffers():
            buffer.zero_()
    module = module.cpu().double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
    try:
        view.replace(path, module)
        yield module
    finally:
        view.replace(path, original)


def ask(view: View, module: nn.Module, attention: Attention) -> list[Tensor]:
    """The tensors that a module which holds this attention, or is it, makes of random tokens."""
    return [tensor.clone() for tensor in tensors(raw_answer(view, module, attention))]


@torch.no_grad()
def raw_answer(view: View, module: nn.Module, attention: Attention) -> Any:
    """The same in the form in which it is answered."""
    owner, roles = view.module(attention.path), attention.projections()
    window = getattr(owner, "window_size", 2)
    count = prod(window) if isinstance(window, (tuple, list)) else window**2
    given = {}
    for name in inspect.signature(type(module).forward).parameters:
        if "mask" in name or name == "position_bias":
            given[name] = None
        elif name == "position_embeddings":  # rotary ones
            angle = noise(count, attention.head_dim // 2).repeat(1, 1, 2)
            given[name] = angle.cos(), angle.sin()
        elif name in OTHERS and (attention.cross or attention.added):
            given[name] = noise(count + 1, width_in(view.module(roles.get("added.k") or roles.get("k") or roles["kv"])))
    tokens = noise(count, width_in(view.module(roles.get("q") or roles["qkv"])))
    return module(tokens, **given)


def noise(tokens: int, width: int) -> Tensor:
    """Two rows of random tokens, the same at every call."""
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)


def harmless(
    view: View, attention: Attention, change: Callable[[], None], prepare: Callable[[], None] = lambda: None
) -> str:
    """Why a change of this attention (behind another one) changes its answers, on a copy; empty where it does not."""
    path = scope(view.model, attention)
    if not path:
        return "it is the whole model"
    with randomized(view, path) as module:
        try:
            prepare()
            before = ask(view, module, attention)
            change()
            after = ask(view, module, attention)
        except WRONG as error:
            return f"it cannot be tried alone ({str(error).strip().splitlines()[0][:100]})"
    error = max(relative_error(one, other) for one, other in zip(after, before, strict=True))
    return "" if error <= EXACT else f"tried alone it answers otherwise by {error:.2g}"
