"""What the answers lose with the variation of what a unit writes, to second order and token by token.

The second moment of the gradient at a layer's output weighs the covariance of each unit's contribution there, as if
the two were independent (K-FAC). Pairs of units of one layer are known, too.

Papers: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015; Wang,
Grosse, Fidler, Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML 2019.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from compress.basis import weight_of
from compress.data import rows as examples_in
from compress.outputs import inputs, objective
from compress.parts import Part
from compress.probing import frozen
from compress.scoring import Scores, flowing
from compress.view import View


def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """Half of tr(G Cov(unit)) for every unit, and what pairs of one part share."""
    paths = [path for part in parts for path in part.outputs]
    slopes, examples = gradient_moments(view, paths, batches)
    seen = {path: [0.0, 0.0, 0] for path in paths}
    for path, x in flowing(view, paths, batches):
        sums = seen[path]
        sums[0], sums[1], sums[2] = sums[0] + (x.T @ x).double(), sums[1] + x.double().sum(0), sums[2] + len(x)
    total = sum(part.count for part in parts)
    matrix, first = torch.zeros(total, total), 0
    for part in parts:
        own = matrix[first : first + part.count, first : first + part.count]
        for path in part.outputs:
            second, mean, count = seen[path]
            if count and path in slopes:
                weight = weight_of(view.module(path)).detach().double()
                covariance = second / count - torch.outer(mean, mean) / count**2
                shared = covariance * (weight.T @ slopes[path].double() @ weight) / examples
                own += part.fold(part.fold(shared).T).float().cpu()
        first += part.count
    return Scores(matrix.diagonal() / 2, matrix - matrix.diagonal().diag())


def gradient_moments(view: View, paths: list[str], batches: list[dict]) -> tuple[dict[str, Tensor], int]:
    """Sums over tokens of g g^T of the gradients at these layers' outputs, of a label-free loss; and the examples."""
    found: dict[str, Tensor] = {}
    generator, examples = torch.Generator().manual_seed(0), 0

    def listening(path: str):
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_() * 1

            def note(gradient: Tensor) -> None:
                rows = gradient.flatten(0, -2).float()
                found[path] = found.get(path, 0) + rows.T @ rows

            output.register_hook(note)
            return output

        return hook

    for batch in batches:
        examples += examples_in(batch)
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(frozen(view.model))
            for path in paths:
                stack.callback(view.module(path).register_forward_hook(listening(path)).remove)
            loss = objective(view.model(**inputs(batch)), generator)
            if loss.requires_grad:
                loss.backward()
    return found, examples
