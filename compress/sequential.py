"""Calibration block by block: the layers of a block see what the blocks before it, changed already, make of the data.

Only the inputs of one block are kept, and of its layers no inputs but their second moments. Layers outside of chains
of blocks are looked at in one pass over the whole model, after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.outputs import inputs
from compress.quick import quick_products
from compress.roles import width_in
from compress.stacks import Call, answers, chain, stacks, tensors
from compress.view import View

STRIP = 128  # columns of a second moment computed at a time


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
        with torch.no_grad(), quick_products(), meter:
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
                    meter.through(block, call)
            yield Stage(*meter.read(), path, now, clean)
        if index + 1 < len(calls[0]):
            given = [answers(block, call) for call in now]


class Enough(Exception):
    """Ends a forward behind which no layer waits."""


class Meter:
    """Adds up the second moments of what reaches layers, without padding."""

    def __init__(self, view: View, layers: list[str], batches: list[dict], held: int) -> None:
        self.modules = {path: view.module(path) for path in layers}
        self.masks = [batch.get("attention_mask") for batch in batches]
        self.first_held, self.batch = len(batches) - held, 0
        self.sums: tuple[dict, dict] = ({}, {})  # by the layers that read the same tensor
        self.x, self.moment, self.readers, self.into = None, None, [], self.sums[0]
        self.order, self.last = [], None

    def __enter__(self) -> None:
        self.hooks = [module.register_forward_pre_hook(self.hear(path)) for path, module in self.modules.items()]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.add()

    def hear(self, path: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if self.x is not args[0] or path in self.readers:
                self.add()
                self.x, self.moment = args[0], upper_gram(args[0].detach(), self.masks[self.batch])
                self.into = self.sums[self.batch >= self.first_held]
            self.readers.append(path)
            self.order.append(path)
            if path == self.last:
                raise Enough

        return hook

    def add(self) -> None:
        """Count the latest tensor for the layers that read it."""
        if self.readers:
            readers = tuple(self.readers)
            self.into[readers] = self.into[readers].add_(self.moment) if readers in self.into else self.moment
        self.x, self.moment, self.readers = None, None, []

    def through(self, block: nn.Module, call: Call) -> None:
        """Run a block, the next times only as far as its last layer where each is called once."""
        self.order = []
        try:
            answers(block, call)
        except Enough:
            return
        if sorted(self.order) == sorted(self.modules):
            self.last = self.order[-1]

    def read(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sums, and those of the held batches; a layer that no token reached has none."""
        return tuple(dict(self.totals(sums)) for sums in self.sums)

    def totals(self, sums: dict[tuple, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The sum of each layer, the same tensor for layers that always read the same."""
        for readers, upper in sums.items():
            if not upper.sum().isfinite():
                raise CompressError(f"{readers[0]}: the calibration data gives it infinite or NaN inputs")
            assert len(upper) == width_in(self.modules[readers[0]]), readers
            upper.copy_(upper.triu() + upper.triu(1).t())
        alike: dict[tuple, Tensor] = {}
        for path in self.modules:
            parts = tuple(readers for readers in sums if path in readers)
            if parts and parts not in alike:
                alike[parts] = sums[parts[0]] if len(parts) == 1 else sum(sums[readers] for readers in parts)
            if parts:
                yield path, alike[parts]


@quick_products()
def upper_gram(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of x x^T over the tokens that the mask does not hide, of which only the upper triangle is meant."""
    if mask is not None and mask.shape == x.shape[:-1]:
        x = x[mask.bool()]
    x = x.flatten(0, -2).float()
    total = x.new_zeros(x.shape[1], x.shape[1])
    for start in range(0, len(total), STRIP):
        end = start + STRIP
        total[start:end, start:] = x[:, start:end].t() @ x[:, start:]
    return total
