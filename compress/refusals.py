"""Why heads of an attention cannot be removed exactly, in words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from compress.chain import chained
from compress.roles import PER_HEAD, QK_NORM, TABLE, is_linear, is_projection, join, parent_of, width_in, width_out

if TYPE_CHECKING:
    from compress.structure import Attention


def refusal(attention: Attention, modules: dict[str, nn.Module]) -> str:
    """Why heads cannot be removed exactly, in words; empty where they can."""
    module = modules[attention.path]
    known = attention.projections()
    odd = [path for path in known.values() if not is_linear(modules[path])]
    if odd:
        return f"{odd[0]} is a {type(modules[odd[0]]).__name__}, not a Linear"
    if not attention.heads:
        return f"no head count explains the shapes of {', '.join(known.values())}"
    if attention.o is None:
        return f"no output projection of {attention.heads * attention.value_dim} inputs was found"
    for path, width in expected_widths(attention):
        if width_out(modules[path]) != width:
            return f"{path} has {width_out(modules[path])} outputs where {attention.heads} heads explain {width}"
    unknown = [path for path in inner_projections(attention.path, modules) if path not in known.values()]
    unknown = [path for path in unknown if not follows_heads(path, modules, attention)]
    if unknown:
        return f"it also has {', '.join(unknown)}"
    if norms := full_width_norms(attention, modules):
        return f"{', '.join(norms)} normalizes all heads together"
    tables = [owner for owner, _ in outer_tables(attention.path, attention.heads, modules)]
    shared = [owner for owner in tables if parent_of(owner) != parent_of(attention.path)]
    if shared:
        return f"{shared[0]} gives one position bias to all layers"
    names = inspect.signature(type(module).forward).parameters
    config = getattr(module, "config", None)
    if "alibi" in names and getattr(config, "alibi", True):
        return "its alibi slopes come from outside, one for each head"
    if "position_bias" in names and not makes_bias(attention, modules):
        return "its position bias comes from outside, one for each head"
    return ""


def expected_widths(attention: Attention) -> Iterator[tuple[str, int]]:
    """Every separate projection with the output width its heads explain."""
    keys, values = attention.kv_heads * attention.head_dim, attention.kv_heads * attention.value_dim
    widths = {"q": attention.heads * attention.head_dim, "k": keys, "v": values}
    for role, path in attention.projections().items():
        if role.removeprefix("added.") in widths:
            yield path, widths[role.removeprefix("added.")]


def makes_bias(attention: Attention, modules: dict[str, nn.Module]) -> bool:
    """Does a layer of this stack make the position bias (T5), or is it a cross attention, which has none?"""
    members = [modules[path] for path in chained(modules[""], attention)]
    return any(member.has_relative_attention_bias for member in members) or bool(members and attention.cross)


def inner_projections(path: str, modules: dict[str, nn.Module]) -> list[str]:
    """All projections below a module."""
    inside = modules[path].named_modules(prefix=path)
    return [name for name, module in inside if module is not modules[path] and is_projection(module)]


def outer_tables(path: str, heads: int, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Bias tables with a column for each head beside the attention or beside what holds it: owner, parameter."""
    while path:
        path = parent_of(path)
        for name, child in modules[path].named_children():
            is_bias = TABLE.search(name) is not None
            for own, table in child.named_parameters(prefix=name, recurse=is_bias):
                if TABLE.search(own) and table.dim() == 2 and table.shape[1] == heads > 1:
                    yield join(path, parent_of(own)), own.rpartition(".")[2]


def follows_heads(path: str, modules: dict[str, nn.Module], attention: Attention) -> bool:
    """Does this linear serve a network that gives one value for each head, or does it work inside one head?"""
    linear, above = modules[path], modules[parent_of(path)]
    if not is_linear(linear) or not PER_HEAD.search(path[len(attention.path) :]):
        return False
    last = above[-1] if isinstance(above, nn.Sequential) else linear
    inside = width_in(linear) == attention.head_dim != width_in(modules[attention.q or attention.qkv])
    return inside or (is_linear(last) and width_out(last) == attention.heads)


def full_width_norms(attention: Attention, modules: dict[str, nn.Module]) -> list[str]:
    """Query and key norms whose statistics run over all heads."""
    if attention.heads == 1:
        return []
    widths = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim)
    found = []
    for name, child in modules[attention.path].named_children():
        weight = getattr(child, "weight", None)
        is_norm = QK_NORM.fullmatch(name) and weight is not None and weight.dim() == 1
        if is_norm and weight.numel() in widths and weight.numel() != attention.head_dim:
            found.append(join(attention.path, name))
    return found
