"""How fast the loss changes with a unit's gate: E|d loss / d gate|, to first order, labels drawn from the model itself.

First-order terms miss units that stand in for each other, and vanish where a unit is at its optimum.

Paper: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
"""

from __future__ import annotations

from compress.parts import Part
from compress.scoring import Scores, gate_gradients
from compress.view import View


def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """The mean over examples of the gradient's size; the layers are compared as they are."""
    return Scores(gate_gradients(view, parts, batches).abs().mean(0))
