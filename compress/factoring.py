"""Narrower heads by calibration: what flows in and out of each attention, ranks for all, weights layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.factors import allocate, key_basis, outputs, value_basis
from compress.outputs import inputs
from compress.quick import quick_products
from compress.stacks import answers
from compress.view import Attention, View

SHRINK = 0.5  # of the importance of output directions towards that of all alike; gradients come from few tokens
LISTENED = 4  # batches that gradients are taken on


@dataclass
class Seen:
    """Second moments of one attention: queries and keys of each group, and what the output projection reads."""

    queries: Tensor  # [G, d, d], uncentred, mean over the heads of a group
    keys: Tensor  # [G, d, d], centred
    mixed: Tensor  # [H dv, H dv], uncentred


class Meter:
    """Gathers these for several attentions while the model, or a part of it, runs."""

    def __init__(self, view: View, attentions: Iterable[Attention]) -> None:
        self.view, self.attentions = view, list(attentions)
        self.sums: dict[str, list] = {}

    def __enter__(self) -> Meter:
        self.hooks = []
        for at in self.attentions:
            for path, kind in ((at.q, "query"), (at.k, "key")):
                hook = lambda m, args, out, at=at, kind=kind: self.add(at, kind, out)  # noqa: E731
                self.hooks.append(self.view.module(path).register_forward_hook(hook))
            hook = lambda m, args, at=at: self.add(at, "mixed", args[0])  # noqa: E731
            self.hooks.append(self.view.module(at.o).register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def add(self, at: Attention, kind: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        if kind != "mixed":
            rows = rows.unflatten(-1, (-1, at.head_dim))
            moment = torch.einsum("nhd,nhe->hde", rows, rows)
            if kind == "query":
                moment = moment.unflatten(0, (at.kv_heads, -1)).mean(1)
            new = [len(rows), rows.sum(0).double(), moment.double()]
        else:
            new = [len(rows), rows.sum(0).double(), (rows.t() @ rows).double()]
        key = f"{at.path} {kind}"
        old = self.sums.get(key)
        self.sums[key] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def read(self, at: Attention) -> Seen:
        found = {}
        for kind in ("query", "key", "mixed"):
            count, total, moment = self.sums[f"{at.path} {kind}"]
            found[kind] = moment / count
            if kind == "key":
                mean = total / count
                found[kind] = found[kind] - torch.einsum("hd,he->hde", mean, mean)
            if not found[kind].isfinite().all():
                raise CompressError(f"{at.path}: the calibration data gives it infinite or NaN values")
        return Seen(found["query"], found["key"], found["mixed"])


def whole(view: View, attentions: list[Attention], batches: list[dict]) -> dict[str, Seen]:
    """What the unchanged model shows."""
    meter = Meter(view, attentions)
    with torch.no_grad(), quick_products(), meter:
        for batch in batches:
            view.model(**inputs(batch))
    return {at.path: meter.read(at) for at in attentions}


def white(view: View, at: Attention) -> Seen:
    """What independent inputs of length one would show: with it, factors are those of the weights alone."""

    def product(path: str) -> Tensor:
        rows = matrix(view.module(path)).unflatten(0, (-1, at.head_dim if path != at.v else at.value_dim))
        return torch.einsum("hdi,hei->hde", rows, rows)

    values = product(at.v).repeat_interleave(at.heads // at.kv_heads, 0)
    queries = product(at.q).unflatten(0, (at.kv_heads, -1)).mean(1)
    return Seen(queries, product(at.k), torch.block_diag(*values))


def matrix(linear: nn.Module) -> Tensor:
    """The weight in float64."""
    return linear.weight.detach().double()


def slopes(view: View, attentions: list[Attention], batches: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments of the gradients at every attention's output [o, o] and at its queries [G, d, d]."""
    from compress.probing import listen

    layers = {path: view.module(path) for at in attentions for path in (at.o, at.q)}
    heard, _ = listen(view.model, layers, batches[:LISTENED], gradients=True)
    out, queries = {}, {}
    for at in attentions:
        gradient = heard[at.o].gradient().double()
        moment = gradient.t() @ gradient / len(gradient)
        even = torch.eye(len(moment), dtype=moment.dtype) * moment.diagonal().mean()
        out[at.path] = (1 - SHRINK) * moment + SHRINK * even
        rows = heard[at.q].gradient().double().unflatten(-1, (at.kv_heads, -1, at.head_dim))
        queries[at.path] = torch.einsum("ngjd,ngje->gde", rows, rows) / len(rows)
    return out, queries


@dataclass
class Bases:
    """The directions of one attention's heads, the most important first."""

    down: list[Tensor]  # of each group's values
    up: list[Tensor]
    values: Tensor  # energies [dv], all groups together
    queries: list[Tensor]
    keys: list[Tensor]
    scores: Tensor  # energies [d]


def bases(view: View, at: Attention, seen: Seen, out: Tensor | None = None, asked: Tensor | None = None) -> Bases:
    """The directions in the order of their effect on the output, and with gradients on the model's answers."""
    output = matrix(view.module(at.o)).unflatten(1, (at.heads, -1)).transpose(0, 1)  # H, o, dv
    importance = output.mT @ (output if out is None else out @ output)
    importance = importance.unflatten(0, (at.kv_heads, -1)).sum(1)
    blocks = seen.mixed.unflatten(0, (at.heads, -1)).unflatten(2, (at.heads, -1))
    moments = torch.stack([blocks[head, :, head] for head in range(at.heads)]).unflatten(0, (at.kv_heads, -1)).mean(1)
    values = [value_basis(moment, weight) for moment, weight in zip(moments, importance, strict=True)]
    scores = [key_basis(queries, keys) for queries, keys in zip(seen.queries, seen.keys, strict=True)]
    if asked is not None:
        # A score's gradient is what the query's is in terms of keys; white keys make it a sum of squares.
        spread = [torch.linalg.pinv(keys, rtol=1e-6, hermitian=True) for keys in seen.keys]
        scale = [(moment * inverse).sum() for moment, inverse in zip(asked, spread, strict=True)]
    else:
        scale = [torch.ones(())] * at.kv_heads
    return Bases(
        [found[0] for found in values],
        [found[1] for found in values],
        torch.stack([found[2] for found in values]).sum(0),
        [found[0] for found in scores],
        [found[1] for found in scores],
        torch.stack([weight * found[2] for weight, found in zip(scale, scores, strict=True)]).sum(0),
    )


@torch.no_grad()
def turn(view: View, at: Attention, found: Bases, ranks: dict, seen: Seen, held: Tensor | None) -> float | None:
    """Write the directions into the weights, with zeros beyond the ranks; the relative error of the output alone."""
    if "keys" in ranks:
        rank = ranks["keys"]
        rows(view.module(at.q), [basis for basis in found.queries for _ in range(at.heads // at.kv_heads)], rank)
        rows(view.module(at.k), found.keys, rank)
    if "values" not in ranks:
        return None
    rank, repeat = ranks["values"], at.heads // at.kv_heads
    down = torch.block_diag(*[basis[:, :rank] for basis in found.down for _ in range(repeat)])
    up = torch.block_diag(*[basis[:rank] for basis in found.up for _ in range(repeat)])
    output = view.module(at.o)
    narrow, error = outputs(matrix(output), seen.mixed, down, up, held)
    wide = torch.zeros_like(matrix(output)).unflatten(1, (at.heads, -1))
    wide[..., :rank] = narrow.unflatten(1, (at.heads, -1))
    wide = wide.flatten(1)
    output.weight.copy_(wide)
    rows(view.module(at.v), found.down, rank)
    return error


def rows(linear: nn.Module, maps: list[Tensor], rank: int) -> None:
    """Bring the output channels of each head into the directions of its map, zeros beyond the rank."""
    weight = matrix(linear)
    if linear.bias is not None:
        weight = torch.cat([weight, linear.bias.double()[:, None]], 1)
    heads = weight.unflatten(0, (len(maps), -1))
    new = torch.stack([basis.t() @ head for basis, head in zip(maps, heads, strict=True)])
    new[:, rank:] = 0
    new = new.flatten(0, 1)
    if linear.bias is not None:
        linear.bias.copy_(new[:, -1])
        new = new[:, :-1]
    linear.weight.copy_(new)


@torch.no_grad()
@quick_products()
def factor(view: View, attentions: list[Attention], ranks: dict[str, dict], out: dict, batches: list[dict]) -> dict:
    """Narrow one layer after the other, each on the tokens that the narrowed ones before it give; their errors."""
    from compress.sequential import stages

    known, errors = {at.o: at for at in attentions if ranks[at.path]}, {}
    cut = len(batches) // 4
    for stage in stages(view, known, batches, held=cut):
        here = [known[path] for path in stage.moments]
        meter = Meter(view, here)
        with meter:
            if stage.block:
                for call in stage.calls[: len(batches) - cut]:
                    answers(view.module(stage.block), call)
            else:
                for batch in batches[: len(batches) - cut]:
                    view.model(**inputs(batch))
        for at in here:
            seen, held = meter.read(at), stage.held.get(at.o)
            held = None if held is None else held.double()
            errors[at.path] = turn(view, at, bases(view, at, seen, out.get(at.path)), ranks[at.path], seen, held)
    return errors


def share(energies: dict[str, list[tuple[str, Tensor, int]]], keep: float, step: int) -> dict[str, dict[str, int]]:
    """Ranks of all parts of all attentions by path; those that stay whole are left out."""
    flat = [(path, *part) for path, parts in energies.items() for part in parts]
    ranks = allocate([energy for *_, energy, _ in flat], [cost for *_, cost in flat], keep, step)
    found: dict[str, dict[str, int]] = {path: {} for path in energies}
    for (path, name, energy, _), rank in zip(flat, ranks, strict=True):
        if rank < len(energy):
            found[path][name] = rank
    return found
