"""How much what a unit writes varies: the variance of each of its channels times the squared norm of the weights there.

What does not vary can be replaced by a bias, which the repair does. Layers are compared as they are: the paper's
standardizing within each layer forces even cuts.

Paper: An, Zhao, Yu, Tang, Wang, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024.
"""

from __future__ import annotations

import torch

from compress.basis import weight_of
from compress.parts import Part
from compress.scoring import Scores, flowing
from compress.view import View


@torch.no_grad()
def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """The fluctuation of every unit, summed over its channels."""
    spread = {path: [0.0, 0.0, 0] for part in parts for path in part.outputs}
    for path, x in flowing(view, list(spread), batches):
        sums = spread[path]
        sums[0], sums[1], sums[2] = sums[0] + x.double().sum(0), sums[1] + x.double().square().sum(0), sums[2] + len(x)
    found = []
    for part in parts:
        total = torch.zeros(part.count)
        for path in part.outputs:
            first, second, count = spread[path]
            if count:
                variance = (second / count - (first / count).square()).clamp_min(0)
                total += part.fold(variance * weight_of(view.module(path)).double().square().sum(0)).float().cpu()
        found.append(total)
    return Scores(torch.cat(found))
