"""What can lose units, the heads of an attention or the channels of an MLP, as the projections behind see it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.roles import width_in
from compress.selection import by_group, unit_count
from compress.surgery import output_paths
from compress.view import MLP, Attention, View


@dataclass(frozen=True)
class Part:
    """One attention or MLP with its units."""

    owner: Attention | MLP
    outputs: tuple[str, ...]  # the projections that read the units
    unit: tuple[int, ...]  # of each of their inputs; those beyond belong to none
    count: int

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
        chosen = torch.zeros(self.count, dtype=torch.bool)
        chosen[kept] = True
        rest = width_in(view.module(path)) - len(self.unit)
        return torch.cat((chosen[list(self.unit)], torch.ones(rest, dtype=torch.bool)))


def heads_of(attention: Attention, unit: str) -> Part:
    """The attention's key-value groups, or its query heads at one place in every group."""
    size = attention.heads // attention.kv_heads
    place = [head // size if by_group(attention, unit) else head % size for head in range(attention.heads)]
    units = [place[head] for head in range(attention.heads) for _ in range(attention.value_dim)]
    return Part(attention, tuple(output_paths(attention)), tuple(units), unit_count(attention, unit))


def kept(parts: list[Part], gone: Iterable[int]) -> dict[str, list[int]]:
    """The units that stay, by the path of their part; units that are gone are numbered over all parts."""
    gone, first, found = set(gone), 0, {}
    for part in parts:
        found[part.path] = [unit for unit in range(part.count) if first + unit not in gone]
        first += part.count
    return found
