"""Which units go: pure choices from scores under a budget, shared by the methods that prune."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.transform import Transform
from compress.view import MLP, Attention, View


def prunable(view: View, method: Transform) -> tuple[dict[str, Attention], dict[str, str]]:
    """The attentions that can lose heads, and why the others cannot; one named by `only` must be able to."""
    taken, refused = {}, {}
    for attention in view.attentions():
        if not method.takes(attention.path):
            continue
        if attention.refusal:
            refused[attention.path] = attention.refusal
        elif attention.heads > 1:
            taken[attention.path] = attention
        else:
            refused[attention.path] = "it has one head"
    if method.only and refused:
        path, why = next(iter(refused.items()))
        raise CompressError(f"heads cannot be removed from {path}: {why}")
    return taken, refused


def narrowable(view: View, method: Transform, heads: Container[str]) -> tuple[list[MLP], dict[str, str]]:
    """The MLPs that can lose channels, and why the others cannot; edits of modules with heads are those of heads."""
    taken, refused = [], {}
    for mlp in view.mlps():
        if not method.takes(mlp.path):
            continue
        if mlp.refusal or mlp.path in heads:
            refused[mlp.path] = mlp.refusal or "its module is that of an attention"
        else:
            taken.append(mlp)
    return taken, refused


def unit_count(attention: Attention, unit: str) -> int:
    """How many units can go one by one: key-value groups, or query heads of every group (all there is under MQA)."""
    groups = attention.kv_heads
    return groups if unit == "group" and groups > 1 else attention.heads // groups


def by_group(attention: Attention, unit: str) -> bool:
    """Are the units of this attention whole key-value groups (else the query heads within every group)?"""
    return unit == "group" and attention.kv_heads > 1


def quotas(counts: Sequence[int], keep: float, layout: str) -> list[int]:
    """How many units each part may lose: all but one (ragged), or the same share of each (uniform)."""
    if layout == "uniform":
        return [count - max(1, round(keep * count)) for count in counts]
    return [count - 1 for count in counts]


def cheapest(
    alone: Tensor, together: Tensor | None, counts: Sequence[int], costs: Sequence[float], lose: Sequence[int],
    goal: float, gone: Sequence[int] = (), fixed: Sequence[int] = (),
) -> list[int]:  # fmt: skip
    """The units to remove, one after the other by the least loss for what each saves, until `goal` is saved.

    Units are numbered over all parts; a part loses at most `lose` of its `counts` units, each of which saves `costs`.
    `gone` go first, `fixed` stay; of equals the last goes.
    """
    part = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    saved = torch.tensor(costs, dtype=torch.float64)[part]
    loss, free = alone.double().clone(), torch.ones(len(part), dtype=torch.bool)
    free[list(fixed)] = False
    left = torch.tensor(lose)
    found, total = [], 0.0
    for step in range(len(part)):
        taken = step < len(gone)
        if not taken and total >= goal * (1 - 1e-9):
            break
        open_ = free & (left[part] > 0)
        if not taken and not open_.any():
            break
        rate = torch.where(open_, loss / saved, torch.inf).flip(0)
        unit = gone[step] if taken else len(part) - 1 - int(rate.argmin())
        found.append(unit)
        free[unit], left[part[unit]], total = False, left[part[unit]] - 1, total + saved[unit].item()
        if together is not None:
            loss += together[unit].double()
    return found


def placeholder(counts: Sequence[int]) -> Tensor:
    """Losses before any is known: they fall from unit to unit alike in every part, so that cuts come out even."""
    return torch.cat([torch.linspace(1, 0, count + 1)[:count] for count in counts])
