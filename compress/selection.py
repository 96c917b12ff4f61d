"""Which heads stay: pure choices from scores, shared by the methods of the family heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.transform import Transform
from compress.view import Attention, View


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


def unit_count(attention: Attention, unit: str) -> int:
    """How many units can go one by one: key-value groups, or query heads of every group (all there is under MQA)."""
    groups = attention.kv_heads
    return groups if unit == "group" and groups > 1 else attention.heads // groups


def by_group(attention: Attention, unit: str) -> bool:
    """Are the units of this attention whole key-value groups (else the query heads within every group)?"""
    return unit == "group" and attention.kv_heads > 1


def unit_scores(head_scores: Tensor, attention: Attention, unit: str) -> Tensor:
    """Fold signed per-head scores [.., heads] into per-unit ones, jointly, since heads of one unit go together."""
    grouped = head_scores.unflatten(-1, (attention.kv_heads, -1))
    return grouped.sum(-1) if by_group(attention, unit) else grouped.sum(-2)


def choose(scores: Mapping[str, Tensor], keep: float, layout: str) -> dict[str, list[int]]:
    """The units that stay: the best in all modules together (ragged), or equally many of each module (uniform).

    At least one unit of every module stays. Ties go to the earlier module and the earlier unit.
    """
    if layout == "uniform":
        return {path: _best(score, max(1, round(keep * len(score)))) for path, score in scores.items()}
    total = max(len(scores), round(keep * sum(len(score) for score in scores.values())))
    kept = {path: {int(score.argmax())} for path, score in scores.items()}
    ranked = enumerate(scores.values())
    rest = [(-float(value), place, unit) for place, score in ranked for unit, value in enumerate(score)]
    paths = list(scores)
    for _, place, unit in sorted(rest):
        if sum(map(len, kept.values())) >= total:
            break
        kept[paths[place]].add(unit)
    return {path: sorted(units) for path, units in kept.items()}


def _best(score: Tensor, count: int) -> list[int]:
    order = torch.argsort(score, descending=True, stable=True)
    return sorted(order[:count].tolist())


def edits(attentions: Mapping[str, Attention], kept: Mapping[str, list[int]], unit: str) -> dict[str, dict]:
    """The plan's settings of every attention that loses something."""
    result = {}
    for path, units in kept.items():
        attention = attentions[path]
        if len(units) == unit_count(attention, unit):
            continue
        groups = by_group(attention, unit)
        result[path] = {
            "groups": units if groups else list(range(attention.kv_heads)),
            "queries": None if groups else units,
        }
    return result


def placeholder(attentions: Mapping[str, Attention], unit: str) -> dict[str, Tensor]:
    """Scores before any is known: they fall from unit to unit alike in every module, so that cuts come out even."""
    counts = {path: unit_count(attention, unit) for path, attention in attentions.items()}
    return {path: torch.linspace(1, 0, count + 1)[:count] for path, count in counts.items()}
