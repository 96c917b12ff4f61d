"""What each choice for each layer alone costs the model's answers: four label-free estimates that add up over layers.

All rest on the error of a layer's own output under a choice, taken through the real quantized layer on rows of
calibration data. They differ in how that is translated to the error of the model's answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from compress.allocation import Table
from compress.errors import CompressError
from compress.probing import Heard, listen, one_at_a_time
from compress.relevance import relevance
from compress.view import View

Build = Callable[[str, str], nn.Module]  # the quantized layer for a path and the name of a choice


@dataclass(frozen=True)
class Costs:
    """Cost by layer and choice, and the rows that go through each layer in one forward; of the layers that ran."""

    table: Table
    rows: dict[str, int]


@torch.no_grad()
def costs(
    kind: str, view: View, layers: dict[str, nn.Module], choices: tuple[str, ...], build: Build,
    batches: list[dict], probes: list[dict],
) -> Costs:  # fmt: skip
    """The costs by `output_kl`, `fisher`, `hessian` or `lrp`; `probes` are the batches on which output_kl measures."""
    heard, unit = listen(view.model, layers, batches, gradients=kind in ("fisher", "hessian"))
    heard = {path: note for path, note in heard.items() if note.rows}
    errors = {path: own_errors(layers[path], note, choices, partial(build, path), kind) for path, note in heard.items()}
    if not heard:
        raise CompressError("quantize.mixed: no calibration data reached any of the layers, it must reach some")
    if kind == "output_kl":
        factors = measured(view, errors, build, probes)
    elif kind == "lrp":
        share = relevance(view.model, layers, batches)
        factors = {path: share[path] / (power(layers[path], note) or 1.0) for path, note in heard.items()}
    else:
        factors = {path: note.rows * unit for path, note in heard.items()}
        if kind == "hessian":
            factors = {path: factor * sharpness(heard[path]) for path, factor in factors.items()}
    table = {path: {name: factors[path] * error for name, error in row.items()} for path, row in errors.items()}
    return Costs(table, {path: max(1, note.rows // len(batches)) for path, note in heard.items()})


def own_errors(
    module: nn.Module, note: Heard, choices: tuple[str, ...], build: Callable[[str], nn.Module], kind: str
) -> dict[str, float]:
    """The mean squared error of the layer's output rows under each choice; for `fisher` along the gradient there."""
    x = note.x()
    exact, found = module(x).float(), {}
    for name in choices:
        off = build(name)(x).float() - exact
        off = (off * note.gradient()).sum(1).square() if kind == "fisher" else off.square().sum(1)
        found[name] = off.mean().item()
    return found


def power(module: nn.Module, note: Heard) -> float:
    """The mean square of an output row."""
    return module(note.x()).float().square().sum(1).mean().item()


def sharpness(note: Heard) -> float:
    """The mean square of a gradient's entry: the trace of the Gauss-Newton matrix by the size of the output."""
    return note.gradient().square().mean().item()


def measured(view: View, errors: Table, build: Build, probes: list[dict]) -> dict[str, float]:
    """What a unit of a layer's own error does to the answers, measured at one choice for each layer.

    The distance of the answers follows the squared error of the layer's output over four decades, so the other
    choices need no run of their own.
    """
    pivots = {path: pivot(row) for path, row in errors.items()}
    found = one_at_a_time(view, {path: (lambda path=path: build(path, pivots[path])) for path in errors}, probes)
    return {path: found[path] / (errors[path][pivots[path]] or 1.0) for path in errors}


def pivot(errors: dict[str, float]) -> str:
    """The second coarsest choice: well above rounding, and not in ruins."""
    ranked = sorted(errors, key=lambda name: -errors[name])
    second = ranked[min(1, len(ranked) - 1)]
    return second if errors[second] else ranked[0]
