"""What can lose units, the heads of an attention or the channels of an MLP, as the projections behind see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.basis import put
from compress.roles import is_conv1d, width_in
from compress.selection import by_group, unit_count
from compress.surgery import output_paths
from compress.view import MLP, Attention, View

SLICES = 32  # that the channels of an MLP go in, at most, by multiples of 8


@dataclass(frozen=True)
class Part:
    """One attention or MLP with its units."""

    owner: Attention | MLP
    outputs: tuple[str, ...]  # the projections that read the units
    unit: tuple[int, ...]  # of each of their inputs; those beyond belong to none
    count: int
    groups: bool = False  # is a unit of an attention a key-value group with its queries?

    @property
    def path(self) -> str:
        """The module that owns the units."""
        return self.owner.path

    def fold(self, channels: Tensor) -> Tensor:
        """Sum values of input channels [.., channels] into units [.., units]: the heads of a unit go together."""
        into = torch.tensor(self.unit, device=channels.device)
        found = channels.new_zeros(*channels.shape[:-1], self.count)
        return found.index_add_(-1, into, channels[..., : len(into)])

    def fold_heads(self, heads: Tensor) -> Tensor:
        """The same for values of heads [.., heads]."""
        return self.fold(heads.repeat_interleave(self.owner.value_dim, -1)) / self.owner.value_dim

    def stays(self, view: View, path: str, kept: list[int]) -> Tensor:
        """Which inputs of this output projection are read on when only these units stay."""
        rest = width_in(view.module(path)) - len(self.unit)
        return torch.cat((self.chosen(kept), torch.ones(rest, dtype=torch.bool)))

    def chosen(self, kept: list[int]) -> Tensor:
        """Which channels belong to these units."""
        units = torch.zeros(self.count, dtype=torch.bool)
        units[kept] = True
        return units[list(self.unit)]

    def edit(self, kept: list[int]) -> dict[str, Any]:
        """The settings of a plan that leaves these units; of an MLP those channels come first by then."""
        if isinstance(self.owner, MLP):
            return {"width": int(self.chosen(kept).sum())}
        if self.groups:
            return {"groups": kept, "queries": None}
        return {"groups": list(range(self.owner.kv_heads)), "queries": kept}


def heads_of(attention: Attention, unit: str) -> Part:
    """The attention's key-value groups, or its query heads at one place in every group."""
    size, groups = attention.heads // attention.kv_heads, by_group(attention, unit)
    place = [head // size if groups else head % size for head in range(attention.heads)]
    units = [place[head] for head in range(attention.heads) for _ in range(attention.value_dim)]
    return Part(attention, tuple(output_paths(attention)), tuple(units), unit_count(attention, unit), groups)


def channels_of(mlp: MLP, order: Tensor) -> Part:
    """The MLP's channels in slices, which hold neighbours in this order."""
    size = 8 * -(-mlp.width // (8 * SLICES))
    place = torch.empty(mlp.width, dtype=torch.long)
    place[order] = torch.arange(mlp.width) // size
    return Part(mlp, (mlp.down,), tuple(place.tolist()), -(-mlp.width // size))


def bring_forward(view: View, mlp: MLP, chosen: Tensor) -> None:
    """Put these channels before the others, which changes no answer."""
    order = torch.cat((chosen.nonzero().flatten(), (~chosen).nonzero().flatten()))
    down = view.module(mlp.down)
    put(down.weight, down.weight[order] if is_conv1d(down) else down.weight[:, order])
    rows = torch.cat((order, mlp.width + order)) if mlp.fused_gate else order
    for up in map(view.module, mlp.up):
        put(up.weight, up.weight[:, rows] if is_conv1d(up) else up.weight[rows])
        if up.bias is not None:
            put(up.bias, up.bias[rows])


def kept(parts: list[Part], gone: Iterable[int]) -> dict[str, list[int]]:
    """The units that stay, by the path of their part; units that are gone are numbered over all parts."""
    gone, first, found = set(gone), 0, {}
    for part in parts:
        found[part.path] = [unit for unit in range(part.count) if first + unit not in gone]
        first += part.count
    return found


def edits(parts: list[Part], left: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """The plan's settings of every part that loses something."""
    return {part.path: part.edit(left[part.path]) for part in parts if len(left[part.path]) < part.count}


def keep(view: View, settings: dict[str, dict[str, Any]]) -> None:
    """Carry a plan's settings out."""
    _follow(view, settings, view.keep_width, view.keep_heads)


def mask(view: View, settings: dict[str, dict[str, Any]]) -> None:
    """Make the answers independent of what they would remove."""
    _follow(view, settings, view.mask_width, view.mask_heads)


def _follow(view: View, settings: dict[str, dict[str, Any]], widths: Callable, heads: Callable) -> None:
    mlps = {mlp.path: mlp for mlp in view.mlps()} if any("width" in edit for edit in settings.values()) else {}
    for path, edit in settings.items():
        if "width" in edit:
            widths(mlps[path], list(range(edit["width"])))
        else:
            heads(view.attention(path), edit["groups"], edit["queries"])
