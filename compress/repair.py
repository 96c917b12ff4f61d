"""Closed-form repair of output projections that lost inputs, block by block on what is left of the model before them.

The target of a projection is what the unchanged model gives at its place, with or without the error that came from
the blocks before; per block the one is taken that brings the block's answer nearer to the unchanged one's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.basis import put, weight_of
from compress.outputs import inputs
from compress.roles import is_conv1d
from compress.stacks import Call, LastBlock, answers, chain, stacks, tensors
from compress.view import View

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of each input's second moment
HELD = 5  # one of so many rows is kept to choose the ridge by
LONGEST = 3.0  # times the median length, of the targets of a row: first tokens of decoders outweigh all others


@dataclass
class Moments:
    """Sums over rows of inputs x (with a one behind them) and targets y, those to fit to and those to judge by."""

    xx: list[Tensor] = field(default_factory=list)  # [in + 1, in + 1] of both
    xy: list[Tensor] = field(default_factory=list)  # [in + 1, out]
    yy: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, held: Tensor, times: Tensor | None = None) -> None:
        """Count some rows, each so many `times` (rows, 1)."""
        x = torch.cat((x, x.new_ones(len(x), 1)), 1)
        length = y.norm(dim=1, keepdim=True)
        weight = (LONGEST * length.median() / length.clamp_min(1e-30)).clamp(max=1)
        weight = weight if times is None else weight * times.sqrt()
        x, y = x * weight, y * weight
        found = [((x[own].T @ x[own]), (x[own].T @ y[own]), y[own].square().sum()) for own in (~held, held)]
        for sums, news in zip((self.xx, self.xy, self.yy), zip(*found, strict=True), strict=True):
            for at, new in enumerate(news):
                if len(sums) < 2:
                    sums.append(new.double())
                else:
                    sums[at] += new


def refit(moments: Moments, old: Tensor, stay: Tensor, bias: bool, ridges: tuple[float, ...] = RIDGES):
    """The weights [in + 1, out] nearest to the targets with only the inputs that stay, and the ridge that chose them.

    The ridge pulls towards the old weights; the one with the least error on the held rows is taken. The last row is
    the bias; without one it stays zero.
    """
    take = torch.cat((stay, stay.new_tensor([bias]))).to(old.device).nonzero().squeeze(1)
    own, xx, xy = old[take], moments.xx[0][take][:, take], moments.xy[0][take]
    pull = xx.diagonal().clamp_min(1e-12 * xx.diagonal().max())  # of its own scale each, whatever that is
    if bias:
        pull[-1] *= 1e-12
    best = (error(moments, own, take), None, own)
    for ridge in ridges:
        weight = ridge * pull
        factor, trouble = torch.linalg.cholesky_ex(xx + weight.diag())
        if trouble:
            continue
        found = torch.cholesky_solve(xy + weight[:, None] * own, factor)
        best = min(best, (error(moments, found, take), ridge, found), key=lambda one: one[0])
    new = torch.zeros_like(old)
    new[take] = best[2]
    return new, best[1], best[0]


def error(moments: Moments, weights: Tensor, take: Tensor) -> float:
    """The squared error on the held rows, as a share of the targets' squares."""
    xx, xy, yy = moments.xx[1][take][:, take], moments.xy[1][take], moments.yy[1]
    return ((weights * (xx @ weights - 2 * xy)).sum() / yy).item() + 1


@dataclass
class Pair:
    """One batch on its way through a block: the calls of the unchanged block and of ours, and which tokens count."""

    clean: Call
    ours: Call
    mask: Tensor | None


def repair(view: View, jobs: dict[str, Tensor], batches: list[dict]) -> dict[str, str]:
    """Let output projections (path -> which inputs stay) do without the others, and refit them; the target of each.

    Only values change: inputs that go have zero weights. Projections outside of chains of blocks come last, each in
    passes over the whole model.
    """
    notes, rest = {}, list(jobs)
    for stack in stacks(view):
        inside = {block: [path for path in rest if path.startswith(block + ".")] for block in stack}
        last = max((index for index, block in enumerate(stack) if inside[block]), default=-1)
        calls = chain(view.model, stack[: last + 1], batches) if last >= 0 else None
        if calls:
            notes |= along(view, inside, calls, batches, jobs)
            rest = [path for path in rest if not any(path in paths for paths in inside.values())]
    if rest:
        clean = copy.deepcopy(view.model)
        pairs = [Pair(call := Call((), inputs(batch)), call, batch.get("attention_mask")) for batch in batches]
        notes |= mend(view.model, clean, {path: jobs[path] for path in rest}, pairs)[0]
    return notes


def without(view: View, jobs: dict[str, Tensor]) -> dict[str, str]:
    """The same without refitting."""
    for path, stay in jobs.items():
        silence(view.module(path), stay)
    return {}


@torch.no_grad()
def silence(module: nn.Module, stay: Tensor) -> None:
    """Read nothing of the inputs that go."""
    read = torch.cat((stay, stay.new_ones(1)))[:, None].to(module.weight.device)
    write(module, torch.where(read, stacked(module), 0))


def along(view: View, inside: dict[str, list[str]], calls: list[list[Call]], batches: list[dict], jobs: dict) -> dict:
    """Mend the blocks of a chain one after the other."""
    notes, firsts = {}, [tensors(tuple(each[0])) for each in calls]
    clean = ours = [[] for _ in batches]
    for index, (path, own) in enumerate(list(inside.items())[: len(calls[0])]):
        block = view.module(path)
        steps = [(each[index], first, batch) for each, first, batch in zip(calls, firsts, batches, strict=True)]
        pairs = [
            Pair(call.after(one, first), call.after(two, first), batch.get("attention_mask"))
            for (call, first, batch), one, two in zip(steps, clean, ours, strict=True)
        ]
        if not own and clean is ours:
            clean = ours = [answers(block, pair.clean) for pair in pairs]
            continue
        relative = {name.removeprefix(path + "."): jobs[name] for name in own}
        found, clean, ours = mend(block, copy.deepcopy(block) if own else block, relative, pairs)
        notes |= {f"{path}.{name}": note for name, note in found.items()}
    return notes


@torch.no_grad()
def mend(
    block: nn.Module, clean: nn.Module, jobs: dict[str, Tensor], pairs: list[Pair]
) -> tuple[dict[str, str], list[list[Tensor]], list[list[Tensor]]]:
    """Refit projections of a block in the order of their use; notes, and the answers of both blocks."""
    notes: dict[str, str] = {}
    targets: dict[str, list[list[Tensor]]] = {}  # of every batch and use
    wanted = []
    for pair in pairs:
        with hearing({clean.get_submodule(name): name for name in jobs}) as heard:
            wanted.append(answers(clean, pair.clean))
        for name, uses in heard.items():
            targets.setdefault(name, []).append([y for _, y in uses])
    for name, stay in jobs.items():
        silence(block.get_submodule(name), stay)
    for name, ys in targets.items():
        module, stay = block.get_submodule(name), jobs[name]
        found = gather(block, module, ys, pairs)
        old, scores = stacked(module), {}
        ways = {"as it is": old} | {
            target: refit(moments, old, stay, module.bias is not None)[0] for target, moments in found.items()
        }
        for target, new in ways.items():
            write(module, new)
            scores[target] = sum(distance(answers(block, p.ours), w) for p, w in list(zip(pairs, wanted))[::4])
        notes[name] = min(scores, key=scores.get)
        write(module, ways[notes[name]])
    return notes, wanted, [answers(block, pair.ours) for pair in pairs]


def gather(block: nn.Module, module: nn.Module, ys: list[list[Tensor]], pairs: list[Pair]) -> dict[str, Moments]:
    """The moments of a projection's inputs in our block against both targets."""
    found, chance = {"local": Moments()}, torch.Generator().manual_seed(0)
    for pair, uses in zip(pairs, ys, strict=True):
        with hearing({module: ""}, stop=len(uses)) as heard:
            answers(block, pair.ours)
        for (x, _), y in zip(heard[""], uses, strict=True):
            keep = real(x, pair.mask)
            rows, wanted = x.flatten(0, -2)[keep].float(), y.flatten(0, -2)[keep].float()
            held = torch.rand(len(rows), generator=chance).to(x.device) < 1 / HELD
            found["local"].add(rows, wanted, held)
            if len(uses) == 1 and (off := drift(pair, y)) is not None:
                found.setdefault("stream", Moments()).add(rows, wanted + off.flatten(0, -2)[keep].float(), held)
    return found


def drift(pair: Pair, like: Tensor) -> Tensor | None:
    """What the blocks before have changed of the stream that a projection of this shape writes to."""
    for one, two in zip(tensors(tuple(pair.clean)), tensors(tuple(pair.ours)), strict=True):
        if one.is_floating_point() and one.shape == like.shape:
            return one - two
    return None


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which rows of [batch, tokens, channels] are no padding."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return mask.flatten().bool()
    return torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)


def distance(ours: list[Tensor], wanted: list[Tensor]) -> float:
    """Squared error of each row of the first answer as a share of its square, on average."""
    one, two = ours[0].float(), wanted[0].float()
    return ((one - two).square().sum(-1) / two.square().sum(-1).clamp_min(1e-30)).mean().item()


@contextmanager
def hearing(modules: dict[nn.Module, str], stop: int = 0) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What goes into and comes out of these modules at every use, by name; after `stop` uses no more runs."""
    heard: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        uses = heard.setdefault(modules[module], [])
        uses.append((args[0], output))
        if len(uses) == stop:
            raise LastBlock

    hooks = [module.register_forward_hook(hook) for module in modules]
    try:
        yield heard
    except LastBlock:
        pass
    finally:
        for handle in hooks:
            handle.remove()


def stacked(module: nn.Module) -> Tensor:
    """The weight as [in, out] with the bias (or zeros) as a last row, in float64."""
    weight = weight_of(module).detach().double().T
    bias = weight.new_zeros(1, weight.shape[1]) if module.bias is None else module.bias.detach().double()[None]
    return torch.cat((weight, bias))


def write(module: nn.Module, stack: Tensor) -> None:
    """Give a projection these weights and bias."""
    put(module.weight, stack[:-1] if is_conv1d(module) else stack[:-1].T)
    if module.bias is not None:
        put(module.bias, stack[-1])
