"""The search of heads.prune: which units go, by one or several scores in rounds, each with its repair and its trial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from compress.basis import put
from compress.mixing import apart
from compress.parts import Part, kept
from compress.probing import Answers
from compress.progress import say
from compress.repair import repair, without
from compress.scoring import find
from compress.selection import cheapest
from compress.view import View

if TYPE_CHECKING:
    from compress.transforms.heads.prune import Prune

Kept = dict[str, list[int]]  # path of a part -> its units that stay


class Cut:
    """A model whose output projections are tried out with less and less to read, and put back."""

    def __init__(self, method: Prune, view: View, parts: list[Part], batches: list[dict]) -> None:
        self.method, self.view, self.parts = method, view, parts
        self.seen, self.held = apart(batches)
        self.counts = [part.count for part in parts]
        self.lose, self.costs, self.goal = method.budget(parts)
        self.answers = Answers.of(view.model, self.held)
        self.original = {path: self.copy(path) for part in parts for path in part.outputs}

    def copy(self, path: str) -> dict[str, Tensor]:
        """The weights of a projection as they are now."""
        return {name: value.detach().clone() for name, value in self.view.module(path).named_parameters()}

    def restore(self, weights: dict[str, dict[str, Tensor]]) -> None:
        """Put weights of projections back."""
        for path, own in weights.items():
            for name, value in own.items():
                put(self.view.module(path).get_parameter(name), value)

    def search(self, score: str) -> list[int]:
        """The units to remove by one score, asked anew after every part of them is gone; they are gone in the model."""
        gone: list[int] = []
        for number in range(1, self.method.rounds + 1):
            found = find(score)(self.view, self.parts, self.seen)
            goal = self.goal * number / self.method.rounds
            gone = cheapest(found.alone, found.together, self.counts, self.costs, self.lose, goal, gone)
            self.remove(gone)
        return gone

    def remove(self, gone: Iterable[int]) -> dict[str, dict]:
        """Cut these units out of the original model and repair it; what came of each projection."""
        self.restore(self.original)
        left = kept(self.parts, gone)
        stay = {
            path: part.stays(self.view, path, left[part.path])
            for part in self.parts
            if len(left[part.path]) < part.count
            for path in part.outputs
        }
        return repair(self.view, stay, self.seen) if self.method.repair else without(self.view, stay)

    def loss(self) -> float:
        """How far the answers to the held-out batches are from the original's."""
        return self.answers.distance(self.view.model)


def cut(method: Prune, view: View, parts: list[Part], batches: list[dict]) -> tuple[Kept, dict]:
    """The units that stay and notes; the output projections are left repaired, with nothing read of what goes."""
    work, tried, best = Cut(method, view, parts, batches), {}, None
    scores = [method.score] if method.score != "auto" else list(method.portfolio)
    for score in scores:
        gone = work.search(score)
        tried[score] = work.loss()
        say(f"heads.prune: {score} {tried[score]:.4g}")
        if best is None or tried[score] < tried[best[0]]:
            best = (score, gone, {path: work.copy(path) for path in work.original})
    score, gone, weights = best
    work.restore(weights)
    return kept(parts, gone), {"tried": tried}
