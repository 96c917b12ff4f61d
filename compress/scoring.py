"""What scores have in common: what they return, how they are found, and the gradients of gates that some rest on."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.data import rows as examples_in
from compress.errors import CompressError
from compress.layer_inputs import real
from compress.outputs import inputs, objective
from compress.probing import frozen
from compress.repair import hearing

PROBE = 2**10  # tokens that answers are measured on, for each unit
PATCHES = 256  # tokens that an image counts as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compress.parts import Part
    from compress.view import View


@dataclass(frozen=True)
class Scores:
    """What removing each unit costs, over all parts in their order, and what two cost together beyond their sum."""

    alone: Tensor  # [units]
    together: Tensor | None = None  # [units, units], of different ones


@cache
def names() -> tuple[str, ...]:
    """All scores, by the name of their file."""
    return tuple(path.stem for path in sorted((Path(__file__).parent / "scores").glob("[a-z]*.py")))


def find(name: str) -> Callable[[View, list[Part], list[dict]], Scores]:
    """The function `score` of a file in compress/scores."""
    assert name in names(), name
    return importlib.import_module(f"compress.scores.{name}").score


def gate_gradients(view: View, parts: list[Part], batches: list[dict]) -> Tensor:
    """d loss / d gate of every unit for every example, [examples, units], of a label-free loss.

    A gate multiplies what a unit writes; its gradient is the sum of that times the gradient there.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in batches:
        sums = [torch.zeros(examples_in(batch), part.count) for part in parts]
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(frozen(view.model))
            for part, into in zip(parts, sums, strict=True):
                for path in part.outputs:
                    stack.callback(view.module(path).register_forward_pre_hook(gated(part, into)).remove)
            loss = objective(view.model(**inputs(batch)), generator)
            if loss.requires_grad:
                loss.backward()
        found.append(torch.cat(sums, 1))
    gradients = torch.cat(found)
    if not gradients.isfinite().all():
        raise CompressError("the gradients on the calibration data are not finite; calibrate in float32 or bfloat16")
    return gradients


def gated(part: Part, into: Tensor) -> Callable:
    """A hook in front of an output projection that adds the gradients of the units' gates to `into`."""

    def hook(module, arguments):
        x = arguments[0]
        if not x.requires_grad:
            x = x.detach().requires_grad_() * 1

        def note(gradient: Tensor) -> None:
            slopes = part.fold((x.detach() * gradient).float()).cpu()
            into.add_(slopes.reshape(len(into), -1, part.count).sum(1))  # windows of an image count together

        x.register_hook(note)
        return (x, *arguments[1:])

    return hook


@torch.no_grad()
def flowing(view: View, paths: list[str], batches: list[dict]) -> Iterator[tuple[str, Tensor]]:
    """The input rows of these layers on the data, without padding, batch by batch."""
    for batch in batches:
        with hearing({view.module(path): path for path in paths}) as heard:
            view.model(**inputs(batch))
        for path, uses in heard.items():
            for x, _ in uses:
                yield path, real(x, batch.get("attention_mask")).float()


def some(batches: list[dict], tokens: int) -> list[dict]:
    """As many batches, evenly over all, as hold so many tokens; of images and the like each counts as so many."""

    def size(batch: dict) -> int:
        ids = batch.get("input_ids")
        return examples_in(batch) * PATCHES if ids is None else ids.numel()

    count = min(len(batches), max(1, round(len(batches) * tokens / max(1, sum(map(size, batches))))))
    return [batches[index * len(batches) // count] for index in range(count)]


def known_before(view: View, answered: list[tuple[str, object]], part: Part) -> dict:
    """The forwards of the blocks before a part's own, which answer what they answered; none where it lies in none."""
    known = {}
    for block, output in answered:
        if part.path.startswith(block + ".") or part.outputs[0].startswith(block + "."):
            return known
        known[view.module(block)] = lambda *args, output=output, **options: output
    return {}
