"""How much the entropy of the answers changes without a unit: units that add no information may go.

The answers count as normally distributed over the data, so that the entropy is the sum of the logarithms of their
standard deviations. Needs forwards only, one for each unit from its block on, on some of the data.

Paper: Lin et al., "MLP Can Be a Good Transformer Learner", CVPR 2024 (NOSE, there of whole attention layers).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from compress.compare import real
from compress.outputs import run
from compress.parts import Part
from compress.probing import Answers, block_answers, instead
from compress.scoring import PROBE, Scores, known_before, some
from compress.view import View


@torch.no_grad()
def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """The change of the entropy for every unit."""
    whole, without = Spread(), [Spread() for part in parts for _ in range(part.count)]
    for batch in some(batches, PROBE):
        answers = Answers.of(view.model, [batch])
        whole.add(answers.references[0], batch)
        before, unit = block_answers(view, answers), 0
        for part in parts:
            known = known_before(view, before, part)
            for own in range(part.count):
                left = [other for other in range(part.count) if other != own]
                forwards = {view.module(path): masked(view, path, part, left) for path in part.outputs}
                with instead(known | forwards):
                    without[unit].add(run(view.model, batch), batch)
                unit += 1
    return Scores(torch.tensor([abs(one.entropy() - whole.entropy()) for one in without]))


def masked(view: View, path: str, part: Part, kept: list[int]):
    """The projection's forward without what the other units give it."""
    module, stay = view.module(path), part.stays(view, path, kept)
    return partial(quiet, module, type(module).forward, stay.to(module.weight.device))


def quiet(module: nn.Module, forward, stay: Tensor, x: Tensor) -> Tensor:
    """The same on its input."""
    return forward(module, x * stay)


class Spread:
    """The standard deviations of all features of an answer over tokens or examples."""

    def __init__(self) -> None:
        self.first = self.second = 0.0
        self.count = 0

    def add(self, answer: Tensor, batch: dict) -> None:
        """Count the rows of one answer."""
        rows = answer[real(answer, batch)] if answer.dim() == 3 else answer.flatten(1)
        rows = rows.double()
        self.first, self.second = self.first + rows.sum(0), self.second + rows.square().sum(0)
        self.count += len(rows)

    def entropy(self) -> float:
        """Sum of log standard deviations."""
        variance = self.second / self.count - (self.first / self.count).square()
        return (variance.clamp_min(1e-12).log() / 2).sum().item()
