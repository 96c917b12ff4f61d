"""Calibration block by block: the layers of a block see what the blocks before it, changed already, make of the data.

Only the inputs of one block are kept, and of its layers no inputs but their second moments. Layers outside of chains
of blocks are looked at in one pass over the whole model, after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.outputs import inputs
from compress.roles import width_in
from compress.stacks import Call, answers, chain, stacks, tensors
from compress.view import View

STRIP = 256  # columns of a second moment computed at a time


@dataclass
class Stage:
    """Layers to be changed now, and what calibration data looks like to them."""

    moments: dict[str, Tensor]  # sum of x x^T over the tokens that reach a layer; one tensor for layers that share x
    held: dict[str, Tensor]  # the same over batches set apart for comparing
    block: str = ""  # empty for layers outside of chains
    calls: list[Call] = field(default_factory=list)  # of the block, one a batch
    targets: list[list[Tensor]] = field(default_factory=list)  # what it gives in the unchanged model, where asked for


def stages(
    view: View, layers: Iterable[str], batches: list[dict], held: int = 0, targets: bool = False
) -> Iterator[Stage]:
    """The layers in stages; the caller changes the weights of a stage before it asks for the next.

    The last `held` batches count for `Stage.held` instead of `Stage.moments`.
    """
    if not batches:
        raise CompressError("calibration: there is no batch, there must be at least one")
    rest = list(layers)
    for stack in stacks(view):
        inside = {block: [path for path in rest if path.startswith(block + ".")] for block in stack}
        last = max((index for index, block in enumerate(stack) if inside[block]), default=-1)
        calls = chain(view.model, stack[: last + 1], batches) if last >= 0 else None
        if calls:
            yield from walk(view, inside, calls, batches, held, targets)
            rest = [path for path in rest if not any(path in paths for paths in inside.values())]
    if rest:
        meter = Meter(view, rest, batches, held)
        with torch.no_grad(), meter:
            for meter.batch, batch in enumerate(batches):
                view.model(**inputs(batch))
        yield Stage(*meter.read())


def walk(
    view: View, inside: dict[str, list[str]], calls: list[list[Call]], batches: list[dict], held: int, targets: bool
) -> Iterator[Stage]:
    """The stages of one chain of blocks."""
    firsts = [tensors(tuple(each[0])) for each in calls]
    clean = given = [[] for _ in batches]
    for index, (path, layers) in enumerate(list(inside.items())[: len(calls[0])]):
        block = view.module(path)

        def after(before: list[list[Tensor]], index: int = index) -> list[Call]:
            return [each[index].after(*two) for each, *two in zip(calls, before, firsts, strict=True)]

        if targets:
            clean = [answers(block, call) for call in after(clean)]
        now = after(given)
        if layers:
            meter = Meter(view, layers, batches, held)
            with meter:
                for meter.batch, call in enumerate(now):
                    answers(block, call)
            yield Stage(*meter.read(), path, now, clean)
        if index + 1 < len(calls[0]):
            given = [answers(block, call) for call in now]


class Meter:
    """Adds up the second moments of what reaches layers, without padding."""

    def __init__(self, view: View, layers: list[str], batches: list[dict], held: int) -> None:
        self.modules = {path: view.module(path) for path in layers}
        self.masks = [batch.get("attention_mask") for batch in batches]
        self.first_held, self.batch = len(batches) - held, 0
        self.sums: tuple[dict, dict] = ({}, {})
        self.latest: tuple[Any, Any] = (None, None)

    def __enter__(self) -> None:
        self.hooks = [module.register_forward_pre_hook(self.hear(path)) for path, module in self.modules.items()]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.latest = (None, None)

    def hear(self, path: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if self.latest[0] is not args[0]:
                self.latest = (args[0], gram(args[0].detach(), self.masks[self.batch]))
            into = self.sums[self.batch >= self.first_held]
            into[path] = into[path] + self.latest[1] if path in into else self.latest[1]

        return hook

    def read(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sums, and those of the held batches; a layer that no token reached has none."""
        for sums in self.sums:
            alike: dict[tuple, Tensor] = {}
            for path, total in sums.items():
                if not total.isfinite().all():
                    raise CompressError(f"{path}: the calibration data gives it infinite or NaN inputs")
                assert len(total) == width_in(self.modules[path]), path
                first = alike.setdefault((len(total), total.sum().item()), total)
                sums[path] = first if torch.equal(first, total) else total
        return self.sums


def gram(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of x x^T over the tokens; those that the mask hides do not count."""
    if mask is not None and mask.shape == x.shape[:-1]:
        x = x[mask.bool()]
    x = x.flatten(0, -2).float()
    total = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, len(total), STRIP):  # half of it mirrors the other
        end = start + STRIP
        total[start:end, start:] = x[:, start:end].t() @ x[:, start:]
        total[end:, start:end] = total[start:end, end:].t()
    return total
