"""The search of heads.prune: which units go, by one or several scores in rounds, each with its repair and its trial."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.basis import put
from compress.errors import CompressError
from compress.mixing import apart
from compress.parts import Part, bring_forward, channels_of, kept
from compress.probing import Answers
from compress.progress import say
from compress.quick import quick_products
from compress.relearning import relearn
from compress.repair import repair, without
from compress.savings import budget
from compress.scoring import Scores, find, some
from compress.selection import cheapest
from compress.view import MLP, View

if TYPE_CHECKING:
    from compress.transforms.heads.prune import Prune

Weights = dict[str, dict[str, Tensor]]  # of output projections
SEARCH, FINISH, JUDGE = 2**13, 2**15, 2**12  # tokens: of scores and repairs, of the last repair, and to choose by
ONE_BY_ONE = 400  # units that auto leaves out one by one, at most
PORTFOLIO = ("energy", "fisher", "leave_one_out", "variance")  # what auto tries


class Cut:
    """A model whose output projections are tried out with less and less to read, and put back."""

    def __init__(self, method: Prune, view: View, parts: list[Part], batches: list[dict]) -> None:
        self.method, self.view, self.parts = method, view, parts
        seen, held = apart(batches)
        self.data = "the calibration data itself" if held[0] is seen[0] else "held-out data"
        self.few, self.many = some(seen, SEARCH), some(seen, FINISH)
        self.counts = [part.count for part in parts]
        self.lose, self.costs, self.goal = budget(method, view, parts, batches[0])
        self.fixed = protected(method, view, parts)
        with quick_products():
            self.answers = Answers.of(view.model, some(held, JUDGE))
        self.original, self.targets = self.weights(), {}

    def weights(self) -> Weights:
        """The weights of all output projections as they are now."""
        modules = {path: self.view.module(path) for part in self.parts for path in part.outputs}
        return {
            path: {name: value.clone() for name, value in module.named_parameters()} for path, module in modules.items()
        }

    def restore(self, weights: Weights) -> None:
        """Put weights of projections back."""
        for path, own in weights.items():
            for name, value in own.items():
                put(self.view.module(path).get_parameter(name), value)

    def search(self, score: str) -> tuple[list[int], list[tuple[float, float]]]:
        """The units to remove by one score, and the loss after each round; in the model they are gone.

        Scores are asked anew in every round, on what the rounds before it have left.
        """
        self.restore(self.original)
        gone, curve = [], []
        for number in range(1, self.method.rounds + 1):
            found, goal = self.scores(score), self.goal * number / self.method.rounds
            more = cheapest(found.alone, found.together, self.counts, self.costs, self.lose, goal, gone, self.fixed)
            if len(more) > len(gone):
                gone = more
                self.remove(gone, self.few)
                curve.append([self.left(gone), self.loss()])
        return gone, curve

    @quick_products()
    def scores(self, name: str) -> Scores:
        """What each unit costs now."""
        return find(name)(self.view, self.parts, self.few)

    def remove(self, gone: Iterable[int], batches: list[dict]) -> None:
        """Cut these units out of the original model and repair it."""
        self.restore(self.original)
        left = kept(self.parts, gone)
        stay = {
            path: part.stays(self.view, path, left[part.path])
            for part in self.parts
            if len(left[part.path]) < part.count
            for path in part.outputs
        }
        self.targets = repair(self.view, stay, batches) if self.method.repair else without(self.view, stay)

    @quick_products()
    def loss(self) -> float:
        """How far the answers to held-out batches are from the original's."""
        return self.answers.distance(self.view.model)

    def left(self, gone: Iterable[int]) -> float:
        """The share of all units' cost that stays."""
        costs = [cost for part, cost in zip(self.parts, self.costs, strict=True) for _ in range(part.count)]
        return 1 - sum(costs[unit] for unit in gone) / sum(costs)


def sliced(view: View, mlps: list[MLP], batches: list[dict]) -> list[Part]:
    """The MLPs with their channels in slices of such as matter alike."""
    single = [Part(mlp, (mlp.down,), tuple(range(mlp.width)), mlp.width) for mlp in mlps]
    if not single:
        return []
    found = find("variance")(view, single, some(batches, SEARCH)).alone.split([part.count for part in single])
    return [channels_of(mlp, alone.argsort(descending=True)) for mlp, alone in zip(mlps, found, strict=True)]


def protected(method: Prune, view: View, parts: list[Part]) -> list[int]:
    """The units that must stay because they retrieve."""
    if method.protect is None:
        return []
    return (find("retrieval")(view, parts, []).alone >= method.protect).nonzero().flatten().tolist()


def portfolio(method: Prune, parts: list[Part]) -> tuple[str, ...]:
    """The scores to try; leaving out one by one only as far as that ends in time."""
    if method.score != "auto":
        return (method.score,)
    few = sum(part.count for part in parts) <= ONE_BY_ONE
    return tuple(name for name in PORTFOLIO if few or name != "leave_one_out")


@torch.no_grad()
def cut(method: Prune, view: View, parts: list[Part], batches: list[dict]) -> tuple[dict[str, list[int]], dict]:
    """The units that stay and notes; the output projections are left repaired, with nothing read of what goes."""
    original = deepcopy(view.model) if method.distill else view.model
    work, tried, best = Cut(method, view, parts, batches), {}, None
    for score in portfolio(method, parts):
        gone, curve = work.search(score)
        if not gone:
            raise CompressError("heads.prune: nothing can go; keep, protect or except leave no head to remove")
        tried[score] = curve
        say(f"heads.prune: by {score} the loss is {curve[-1][1]:.4g}")
        if best is None or curve[-1][1] < tried[best[0]][-1][1]:
            best = (score, gone, work.weights(), work.targets)
    score, gone, weights, targets = best
    work.restore(weights)
    if method.repair and len(work.many) > len(work.few):
        work.remove(gone, work.many)
        tried[score][-1], targets = [work.left(gone), work.loss()], work.targets
    remarks, left = told(work, tried, score, targets), kept(parts, gone)
    del work, best, weights  # the original's answers, which take more than a small model
    if method.distill:
        remarks.append(relearn(view, original, batches, method.distill))
    for part in parts:
        if isinstance(part.owner, MLP) and len(left[part.path]) < part.count:
            bring_forward(view, part.owner, part.chosen(left[part.path]))
    notes = {"curves": tried, "taken": score, "units that stay": {path: len(units) for path, units in left.items()}}
    return left, notes | {"remarks": remarks}


def told(work: Cut, tried: dict[str, list], taken: str, targets: dict[str, str]) -> list[str]:
    """The outcome in words."""
    losses = ", ".join(f"{name} {curve[-1][1]:.3g}" for name, curve in tried.items())
    lines = [f"loss on {work.data} {losses}" + (f"; taken: {taken}" if len(tried) > 1 else "")]
    if targets:
        counts = ", ".join(f"{number} {name}" for name, number in Counter(targets.values()).most_common())
        lines.append(
            f"output projections refit to what the original's gave (local), with what came before (stream): {counts}"
        )
    if work.fixed:
        lines.append(f"{len(work.fixed)} heads or groups retrieve and stay")
    return lines
