"""Takes heads and channels out of the weights in place, with the counts and side tensors that must follow."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.chain import unchain
from compress.layout import fused_rows, interleaved_rows, ranges
from compress.refusals import outer_tables
from compress.roles import (
    GROUPS,
    HEADS,
    KV_HEADS,
    PER_HEAD,
    TOTALS,
    is_conv1d,
    is_linear,
    join,
    number,
    width_in,
    width_out,
)

if TYPE_CHECKING:
    from compress.structure import MLP, Attention

WIDTHS = re.compile(r"interm|inner|ff|hidden_dim|mlp", re.I)


class ConfigView:
    """One module's view of a shared config: a few values are its own, everything else is the shared object's."""

    def __init__(self, shared: Any, own: dict[str, int]) -> None:
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "own", own)

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "own") or name.startswith("__"):  # not there yet while copy rebuilds the object
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)

    def __deepcopy__(self, memo: dict) -> ConfigView:
        return ConfigView(copy.deepcopy(self.shared, memo), dict(self.own))


def slice_tensor(module: nn.Module, name: str, keep: list[int], dim: int) -> None:
    """Keep these entries of a parameter or buffer; kind, dtype, device and requires_grad stay."""
    tensor = getattr(module, name)
    kept = tensor.detach().index_select(dim, torch.tensor(keep, dtype=torch.long, device=tensor.device))
    if isinstance(tensor, nn.Parameter):
        kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
    setattr(module, name, kept)


def keep_rows(linear: nn.Module, keep: list[int]) -> None:
    """Keep these output features."""
    is_conv = is_conv1d(linear)
    slice_tensor(linear, "weight", keep, 1 if is_conv else 0)
    if linear.bias is not None:
        slice_tensor(linear, "bias", keep, 0)
    setattr(linear, "nf" if is_conv else "out_features", len(keep))


def keep_columns(linear: nn.Module, keep: list[int]) -> None:
    """Keep these input features."""
    is_conv = is_conv1d(linear)
    slice_tensor(linear, "weight", keep, 0 if is_conv else 1)
    setattr(linear, "nx" if is_conv else "in_features", len(keep))


def zero_columns(linear: nn.Module, drop: list[int]) -> None:
    """Make the output independent of these input features."""
    weight = linear.weight.detach().clone()
    if is_conv1d(linear):
        weight[drop] = 0
    else:
        weight[:, drop] = 0
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)


def kept_heads(attention: Attention, kv_groups: list[int], queries: list[int] | None) -> list[int]:
    """The query heads that stay, in their old numbering."""
    size = attention.heads // attention.kv_heads
    return [group * size + query for group in kv_groups for query in (range(size) if queries is None else queries)]


def keep_heads(model: nn.Module, attention: Attention, kv_groups: list[int], queries: list[int] | None) -> None:
    """Remove all heads but these from every projection, side tensor and count."""
    heads = kept_heads(attention, kv_groups, queries)
    unchain(model, attention)
    sides = list(side_tensors(model, attention))
    for path, rows in projection_rows(attention, heads, kv_groups):
        keep_rows(model.get_submodule(path), rows)
    for path in output_paths(attention):
        output = model.get_submodule(path)
        tail = range(attention.heads * attention.value_dim, width_in(output))  # a parallel block's other half
        keep_columns(output, ranges([h * attention.value_dim for h in heads], attention.value_dim) + list(tail))
    for module, name, dim, of_keys in sides:
        slice_tensor(module, name, kv_groups if of_keys else heads, dim)
        if isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
        elif is_linear(module):
            module.out_features = len(module.weight)
    follow_counts(model.get_submodule(attention.path), attention, len(heads), len(kv_groups))


def projection_rows(attention: Attention, heads: list[int], groups: list[int]) -> Iterator[tuple[str, list[int]]]:
    """The output features that stay, for every projection into the attention."""
    a = attention
    if a.qkv or a.kv:
        rows = interleaved_rows if a.layout == "interleaved" else fused_rows
        queries, keys, values = rows(a.heads if a.qkv else 0, a.kv_heads, a.head_dim, a.value_dim)
        parts = [
            (queries, heads if a.qkv else [], a.head_dim),
            (keys, groups, a.head_dim),
            (values, groups, a.value_dim),
        ]
        rows = [ranges([starts[i] for i in keep], dim) for starts, keep, dim in parts]
        yield a.qkv or a.kv, sorted(sum(rows, [])) if a.layout == "interleaved" else sum(rows, [])
    keeps = {"q": (heads, a.head_dim), "k": (groups, a.head_dim), "v": (groups, a.value_dim)}
    for role, (keep, dim) in keeps.items():
        for path in (getattr(a, role), a.added.get(role)):
            if path:
                yield path, ranges([i * dim for i in keep], dim)


def output_paths(attention: Attention) -> list[str]:
    """The projections that read the heads."""
    return [path for path in (attention.o, attention.added.get("o")) if path]


def side_tensors(model: nn.Module, attention: Attention) -> Iterator[tuple[nn.Module, str, int, bool]]:
    """Tensors inside the attention with one entry for each head: owner, name, dimension, of key heads or not."""
    for owner, name in outer_tables(attention.path, attention.heads, dict(model.named_modules())):
        yield model.get_submodule(owner), name, 1, False
    root, known = model.get_submodule(attention.path), set(attention.projections().values())
    if attention.heads == 1:
        return
    for path, module in root.named_modules():
        if join(attention.path, path) in known:
            continue
        own = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
        for name, tensor in own:
            if is_linear(module):
                if width_out(module) == attention.heads and PER_HEAD.search(path):
                    yield module, name, 0, False
            elif tuple(tensor.shape) == (attention.heads, attention.head_dim) and "norm" in path:
                yield module, name, 0, False
            elif tuple(tensor.shape) == (attention.kv_heads, attention.head_dim) and "norm" in path:
                yield module, name, 0, True
            elif PER_HEAD.search(join(path, name)) and tensor.is_floating_point() and attention.heads in tensor.shape:
                is_table = isinstance(module, nn.Embedding) or "table" in name
                yield module, name, tensor.dim() - 1 if is_table else tensor.shape.index(attention.heads), False


def follow_counts(module: nn.Module, attention: Attention, heads: int, groups: int) -> None:
    """Bring every count that the forward may read to the new number of heads."""
    was_total, was_kv_total = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    new = dict.fromkeys(HEADS, (attention.heads, heads)) | dict.fromkeys(KV_HEADS, (attention.kv_heads, groups))
    new |= dict.fromkeys(GROUPS, (attention.heads // attention.kv_heads, heads // groups))
    for owner in module.modules():
        for name, (was, now) in new.items():
            if vars(owner).get(name) == was and not isinstance(vars(owner)[name], bool):
                setattr(owner, name, now)
    for name in TOTALS:
        if vars(module).get(name) == was_total:
            setattr(module, name, heads * attention.head_dim)
        elif vars(module).get(name) == was_kv_total:
            setattr(module, name, groups * attention.head_dim)
    if (config := vars(module).get("config")) is not None:
        own = {name: now for name, (was, now) in new.items() if number(config, (name,)) == was}
        module.config = ConfigView(config, own) if own else config


def mask_heads(model: nn.Module, attention: Attention, kv_groups: list[int], queries: list[int] | None) -> None:
    """Zero what the output projections read from the other heads."""
    stay = set(kept_heads(attention, kv_groups, queries))
    drop = ranges([h * attention.value_dim for h in range(attention.heads) if h not in stay], attention.value_dim)
    for path in output_paths(attention):
        zero_columns(model.get_submodule(path), drop)


def keep_width(model: nn.Module, mlp: MLP, channels: list[int]) -> None:
    """Remove all hidden channels of an MLP but these."""
    for path in mlp.up:
        keep_rows(
            model.get_submodule(path), channels + [mlp.width + c for c in channels] if mlp.fused_gate else channels
        )
    keep_columns(model.get_submodule(mlp.down), channels)
    owner = model.get_submodule(mlp.path)
    for name, value in list(vars(owner).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value == mlp.width and WIDTHS.search(name):
            setattr(owner, name, len(channels))


def mask_width(model: nn.Module, mlp: MLP, channels: list[int]) -> None:
    """Zero what the MLP's output reads from the other channels."""
    stay = set(channels)
    zero_columns(model.get_submodule(mlp.down), [c for c in range(mlp.width) if c not in stay])
