"""What the answers lose when a unit alone goes and its layer is refit without it: measured, not estimated.

The loss is the divergence from the model's own predictions (the squared relative error where there are none). The
refit is that of the repair, to what the layer wrote before; without it, units whose work others can take over look
dearer than they are. One forward for each unit, from its block on, on some of the data.

Papers: Li, Wang, Shen, Xie, et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
IEEE TVCG 2023 (leaving heads out); Li, Monroe, Jurafsky, "Understanding Neural Networks through Representation
Erasure", 2016.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.basis import weight_of
from compress.parts import Part
from compress.probing import Answers, block_answers, instead
from compress.scoring import PROBE, Scores, flowing, known_before, some
from compress.view import View

RIDGE = 1e-3  # of each input's second moment


@torch.no_grad()
def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """The distance of the answers for each unit."""
    found = torch.zeros(sum(part.count for part in parts))
    seen: dict[str, Tensor] = {}
    for path, x in flowing(view, [path for part in parts for path in part.outputs], batches):
        seen[path] = seen.get(path, 0) + x.T @ x
    tried = some(batches, PROBE)
    for batch in tried:
        answers = Answers.of(view.model, [batch])
        before, unit = block_answers(view, answers), 0
        for part in parts:
            known = known_before(view, before, part)
            for own in range(part.count):
                left = [other for other in range(part.count) if other != own]
                forwards = {
                    view.module(path): refitted(view.module(path), seen[path], part.stays(view, path, left))
                    for path in part.outputs
                    if path in seen
                }
                if forwards:
                    with instead(known | forwards):
                        found[unit] += answers.distance(view.model) / len(tried)
                unit += 1
    return Scores(found)


def refitted(module: nn.Module, moments: Tensor, stay: Tensor):
    """The projection's forward with only these inputs, which write as nearly as they can what all wrote."""
    weight = without(weight_of(module).detach(), moments, stay)
    return partial(F.linear, weight=weight, bias=module.bias)


def without(weight: Tensor, moments: Tensor, stay: Tensor) -> Tensor:
    """The weight [out, in] that comes nearest to the old one on these moments, with zeros for inputs that go."""
    xx = moments.double()
    gone, new = ~stay, torch.zeros_like(weight, dtype=torch.float64)
    ridge = RIDGE * xx.diagonal()[stay].clamp_min(1e-30)
    own = xx[stay][:, stay] + ridge.diag()
    lost = weight[:, gone].double() @ xx[gone][:, stay]
    new[:, stay] = weight[:, stay].double() + torch.linalg.solve(own, lost.T).T
    return new.to(weight.dtype)
