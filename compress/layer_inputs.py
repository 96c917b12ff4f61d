"""What flows into linear layers on calibration data: ranges, second moments and a sample of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.outputs import run
from compress.quick import quick_products
from compress.roles import width_in
from compress.view import View

MEMORY = 2**31  # bytes that one pass over the data may gather
ROWS = 8192  # that the second moments are made of, but at least eight for each channel
LONGEST = 3.0  # times the median length, of rows in the moments
SAMPLE = 1024  # rows that are kept, to judge by what the moments have not seen


@dataclass(frozen=True)
class Inputs:
    """The inputs of one layer; moments and sample are of different rows."""

    low: Tensor  # [in], of all rows
    high: Tensor
    moments: Tensor  # [in, in], sum of x x^T
    rows: Tensor  # [kept, in]

    def times(self, factor: Tensor) -> Inputs:
        """The inputs with every channel multiplied by a positive factor."""
        moments = self.moments * factor[:, None] * factor
        return Inputs(self.low * factor, self.high * factor, moments, self.rows * factor)


class Gathering:
    """The inputs of one layer, or of several that read the same tensor, while the data goes through."""

    def __init__(self, width: int, batches: int) -> None:
        self.share = -(-max(ROWS, 8 * width) // batches)  # rows to take of each batch
        self.step = max(8, self.share * batches // SAMPLE)  # one of so many goes into the sample
        self.count, self.rows = 0, []
        self.chance = torch.Generator().manual_seed(0)  # what returns every so many rows must not fall on one side
        self.low = self.high = self.moments = None

    def add(self, x: Tensor) -> None:
        """Take note of some rows."""
        x = x.detach().float()
        low, high = x.aminmax(dim=0)
        first = self.moments is None
        self.low, self.high = (low, high) if first else (self.low.minimum(low), self.high.maximum(high))
        order = torch.randperm(len(x), generator=self.chance).to(x.device)[: self.share]
        kept = -(-(self.count + len(order)) // self.step) + -self.count // self.step
        self.count += len(order)
        self.rows.append(x[order[:kept]])
        others = quieted(x[order[kept:]])
        self.moments = others.t() @ others if first else self.moments.addmm_(others.t(), others)

    def inputs(self, path: str) -> Inputs:
        """What was gathered."""
        if not (torch.isfinite(self.low).all() and torch.isfinite(self.high).all()):
            raise CompressError(f"{path}: its inputs on the calibration data are not finite, they must be")
        return Inputs(self.low, self.high, self.moments, torch.cat(self.rows))


def quieted(rows: Tensor) -> Tensor:
    """The rows, of which none is longer than three of the usual ones: first tokens of decoders outweigh all others."""
    length = rows.norm(dim=1, keepdim=True)
    usual = length[length > 0]
    return rows * (LONGEST * usual.median() / length).clamp(max=1) if len(usual) else rows


@torch.no_grad()
@quick_products()
def gather(view: View, paths: Iterable[str], batches: list[dict]) -> dict[str, Inputs]:
    """The inputs of these layers in one pass over the data, without padding; layers that never ran are not in it."""
    found: dict[str, Gathering] = {}
    latest: list = [None, None]  # neighbours such as the projections of an attention read the same tensor
    mask = None

    def hear(path, module, args):
        x, before = args[0], latest[1]
        if not x.numel():
            return
        same = x is latest[0]
        own = found.setdefault(path, before if same else Gathering(width_in(module), len(batches)))
        if not same or own is not before:
            own.add(real(x, mask))
            latest[:] = x, own

    hooks = [
        view.module(path).register_forward_pre_hook(lambda *heard, path=path: hear(path, *heard)) for path in paths
    ]
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            run(view.model, batch)
            latest[:] = None, None
    finally:
        for hook in hooks:
            hook.remove()
    made = {id(own): own.inputs(path) for path, own in found.items()}
    return {path: made[id(own)] for path, own in found.items()}


def passes(view: View, groups: list[list[str]]) -> Iterator[list[str]]:
    """Layers whose inputs fit into memory at once; those of a group stay together."""
    chunk, size = [], 0
    for group in groups:
        more = sum(width_in(view.module(path)) * (width_in(view.module(path)) + SAMPLE) * 4 for path in group)
        if chunk and size + more > MEMORY:
            yield chunk
            chunk, size = [], 0
        chunk, size = chunk + group, size + more
    yield chunk


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a layer's input, without those of padding where it has the shape of the batch."""
    if mask is not None and mask.dim() == 2 and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    return x.flatten(0, -2)
