"""A changed copy of a model learns to answer as the original, and what else a method asks of its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.distill import train
from compress.outputs import answer, inputs
from compress.view import View

RATE = 1e-3  # of each weight's own size
HELD = 4  # one batch of so many is not trained on


def kurtosis(x: Tensor) -> Tensor:
    """The fourth moment about the mean over the squared second: 3 for a normal distribution."""
    centred = x.float() - x.float().mean()
    return centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-20)


class Lesson:
    """Teacher (the view's model), student and data; what is asked of the student is the teacher's answer."""

    def __init__(self, view: View, student: nn.Module, batches: list[dict]) -> None:
        self.student, self.trainings = student, view.trainings
        held = max(len(batches) // HELD, 1)
        self.held = batches[-held:]
        self.lessons = batches[:-held] or batches  # a single batch has to do for both
        with torch.no_grad():
            self.targets = {id(batch): seen(view.model, batch)[0] for batch in batches}

    def teach(
        self, weights: list[nn.Parameter], steps: int, also: Callable[[list[Tensor], dict], Tensor],
        anneal: Callable[[float], None] = lambda done: None, rate: float = RATE,
    ) -> None:  # fmt: skip
        """Train these weights; `also` adds to the loss what the layers give.

        `anneal(twice the share of the steps that are done, at most 1)` comes before each step.
        """

        def loss(batch: dict, done: float) -> Tensor:
            anneal(min(2 * done, 1))
            got, layers = seen(self.student, batch)
            return distance(got, self.targets[id(batch)]) + also(layers, batch)

        self.student.requires_grad_(False)
        train(weights, self.lessons, loss, steps, rate, self.trainings)
        self.student.requires_grad_(False)

    @torch.no_grad()
    def examine(self, model: nn.Module) -> dict:
        """Mean kurtosis and largest value of what the layers give, layer by layer too, and the error of the answers."""
        found = [seen(model, batch) for batch in self.held]
        errors = [distance(got, self.targets[id(batch)]) for (got, _), batch in zip(found, self.held, strict=True)]
        tails = torch.stack([torch.stack([kurtosis(x) for x in layers]) for _, layers in found]).mean(0)
        peaks = torch.stack([torch.stack([x.abs().max() for x in layers]) for _, layers in found]).amax(0)
        return {
            "kurtosis": tails.mean().item(),
            "largest": peaks.max().item(),
            "error": torch.stack(errors).mean().sqrt().item(),
            "kurtosis by layer": tails.tolist(),
            "largest by layer": peaks.tolist(),
        }


def take_over(model: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """Give the model the student's parameters; those that only the student has, with its new buffers, are returned."""
    trained = student.state_dict()
    old = dict(model.named_parameters())
    for name, parameter in old.items():
        parameter.data.copy_(trained[name])
    return {name: tensor for name, tensor in trained.items() if name not in model.state_dict()}


def seen(model: nn.Module, batch: dict) -> tuple[Tensor, list[Tensor]]:
    """The answer and what every layer gives, both without padding."""
    layers: list[Tensor] = []
    blocks = [model.get_submodule(block.path) for block in View(model).blocks()]
    hooks = [block.register_forward_hook(lambda _, args, out: layers.append(answer(out))) for block in blocks]
    try:
        got = answer(model(**inputs(batch)))
    finally:
        for hook in hooks:
            hook.remove()
    mask = batch.get("attention_mask")
    return unpadded(got, mask), [unpadded(x, mask) for x in layers]


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    return x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x


def distance(got: Tensor, target: Tensor) -> Tensor:
    """Squared error relative to the size of the target."""
    return (got - target).float().square().mean() / target.float().square().mean().clamp_min(1e-12)
