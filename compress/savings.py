"""What removing units of attentions and MLPs saves: weights, operations, or time measured on this machine."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.errors import CompressError
from compress.example import example
from compress.flops import count
from compress.outputs import run
from compress.parts import Part, edits, keep
from compress.roles import width_in, width_out
from compress.selection import quotas
from compress.view import MLP, View

if TYPE_CHECKING:
    from compress.transforms.heads.prune import Prune

ROUNDS, SECONDS = 7, 1.0  # of the timing of a whole model


def budget(method: Prune, view: View, parts: list[Part], batch: dict | None) -> tuple[list[int], list[float], float]:
    """How many units each part may lose, what each of them saves, and how much is to be saved.

    Without a batch nothing is measured, and time counts as operations.
    """
    counts = [part.count for part in parts]
    if method.flops or method.latency:
        timed = method.latency and batch is not None
        costs, total = seconds(view, parts, batch) if timed else operations(view, parts, batch or example(view.model))
        goal = (1 - (method.flops or method.latency)) * total
        lose = enough(counts, costs, goal) if method.layout == "uniform" else quotas(counts, 0, "ragged")
        most = sum(cost * (number - 1) for cost, number in zip(costs, counts, strict=True))
        if goal > most and (method.flops or timed):
            name, least = "flops" if method.flops else "latency", 1 - most / total
            raise CompressError(f"heads.prune: {name} is {1 - goal / total:g}, with one unit a layer it is {least:.3g}")
        return lose, costs, min(goal, most)
    costs = [weights(view, part) / part.count for part in parts] if "mlp" in method.include else [1.0] * len(parts)
    lose = quotas(counts, method.keep, method.layout)
    if method.layout == "uniform":
        return lose, costs, sum(cost * number for cost, number in zip(costs, lose, strict=True))
    if "mlp" not in method.include:
        return lose, costs, sum(counts) - max(len(parts), round(method.keep * sum(counts)))
    return lose, costs, (1 - method.keep) * sum(cost * number for cost, number in zip(costs, counts, strict=True))


def enough(counts: list[int], costs: list[float], goal: float) -> list[int]:
    """The same share of every part, as much as saves the goal."""
    for percent in range(100, -1, -1):
        lose = quotas(counts, percent / 100, "uniform")
        if sum(cost * number for cost, number in zip(costs, lose, strict=True)) >= goal:
            break
    return lose


def weights(view: View, part: Part) -> int:
    """The weights of all projections of a part."""
    owner = part.owner
    paths = (*owner.up, owner.down) if isinstance(owner, MLP) else tuple(owner.projections().values())
    return sum(width_in(view.module(path)) * width_out(view.module(path)) for path in paths)


def operations(view: View, parts: list[Part], batch: dict) -> tuple[list[float], float]:
    """Operations that one unit of each part saves, and those of the whole model, counted without weights."""
    empty = View(on_meta(view.model))
    total, known, found = count(empty.model, batch), {}, []
    for part in parts:
        key = (re.sub(r"\d+(?=\D*$)", "*", part.path), part.count, len(part.unit))
        if key not in known:
            with empty.copied(part.owner):
                keep(empty, edits([part], {part.path: list(range(max(1, part.count - 1)))}))
                known[key] = float(total - count(empty.model, batch))
        found.append(max(known[key], 1.0))
    return found, float(total)


@torch.no_grad()
def seconds(view: View, parts: list[Part], batch: dict) -> tuple[list[float], float]:
    """Time that one unit of each part saves, from models with half of the units of all parts alike, and the whole."""
    from compress_kernels.timing import paired

    kinds: dict[tuple, list[Part]] = {}
    for part in parts:
        kinds.setdefault((type(part.owner), part.count, len(part.unit)), []).append(part)
    models = {None: view.model}
    for kind, own in kinds.items():
        models[kind] = copy.deepcopy(view.model)
        half = {part.path: list(range(-(-part.count // 2))) for part in own}
        keep(View(models[kind]), edits(own, half))
    calls = {kind: lambda model=model: run(model, batch) for kind, model in models.items()}
    times = paired(calls, rounds=ROUNDS, seconds=SECONDS)
    costs = {}
    for kind, own in kinds.items():
        saved = (times[None] - times[kind]) / max(1, sum(part.count // 2 for part in own))
        costs |= dict.fromkeys((part.path for part in own), saved)
    if max(costs.values()) <= 0:
        raise CompressError("heads.prune: half of the units less make the model no faster here, so no latency is won")
    least = max(costs.values()) * 1e-3
    return [max(costs[part.path], least) for part in parts], times[None]


def on_meta(model: nn.Module) -> nn.Module:
    """The model without its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(value): value.detach().to("meta") for value in tensors}
    known = {key: nn.Parameter(empty[key], requires_grad=False) for key in map(id, model.parameters())}
    return copy.deepcopy(model, empty | known)
