"""The divergence that removing units causes, to second order: half of the Fisher information of their gates.

Labels are drawn from the model's own predictions (a random projection stands in where there are none), so none are
needed. What two units cost together beyond their sum is known, too: the off-diagonal of the same matrix.

Papers: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022; Park, Choi, Kang,
"Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models", ICLR 2024.
"""

from __future__ import annotations

from compress.parts import Part
from compress.scoring import Scores, gate_gradients
from compress.view import View

MOST = 4096  # units whose pairs are kept


def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """Half the mean square of each gate's gradient, and the mean products of pairs."""
    gradients = gate_gradients(view, parts, batches)
    alone = gradients.square().mean(0) / 2
    return Scores(alone, gradients.T @ gradients / len(gradients) if len(alone) <= MOST else None)
