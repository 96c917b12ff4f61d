"""T5's first layer makes a position bias for each head and hands it down the stack; here every layer makes its own."""

from __future__ import annotations

import copy
import inspect
import re
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from compress.structure import Attention


def chained(model: nn.Module, attention: Attention) -> list[str]:
    """The attentions of the same stack that pass one position bias on, this one included."""
    module = model.get_submodule(attention.path)
    takes_bias = "position_bias" in inspect.signature(type(module).forward).parameters
    if not takes_bias or not hasattr(module, "has_relative_attention_bias"):
        return []
    first, number, rest = re.match(r"((?:.*?\.)??)(\d+)(\..*)", attention.path + ".").groups()
    pattern = re.compile(re.escape(first) + r"\d+" + re.escape(rest.removesuffix(".")))
    return [path for path, other in model.named_modules() if pattern.fullmatch(path) and type(other) is type(module)]


def unchain(model: nn.Module, attention: Attention) -> None:
    """Let every layer of the chain make its own bias from its own copy of the table, so that heads may differ."""
    members = [model.get_submodule(path) for path in chained(model, attention)]
    table = next((m.relative_attention_bias for m in members if m.has_relative_attention_bias), None)
    for member in members:
        if make_own_bias not in member._forward_pre_hooks.values():
            member.register_forward_pre_hook(make_own_bias, with_kwargs=True)
        if table is not None and not member.has_relative_attention_bias:
            member.relative_attention_bias = copy.deepcopy(table)
            member.has_relative_attention_bias = True


def make_own_bias(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward hook: ignore the bias of the layer before."""
    return args, kwargs | {"position_bias": None}
