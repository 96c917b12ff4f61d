"""Distillation: the loop that all of it runs in, and a changed copy of one module that learns to answer as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.outputs import answer, inputs
from compress.progress import track
from compress.resuming import Trainings

Example = TypeVar("Example")
RATE = 0.01  # of layer-wise training, of each weight's own size


def train(
    weights: list[nn.Parameter], examples: Sequence[Example], loss: Callable[[Example, float], Tensor],
    steps: int, rate: float, trainings: Trainings | None,
) -> None:  # fmt: skip
    """Adam on `loss(an example, the share of the steps that are done)`; what is trained asks for gradients afterwards.

    The rate is a share of each weight's own size and falls to zero, so that models of any scale move alike. In a run
    that was killed in this training it goes on where it was.
    """
    for weight in weights:
        weight.requires_grad_()
    adam = torch.optim.Adam([{"params": [weight], "lr": rate * size_of(weight)} for weight in weights])
    generator = torch.Generator().manual_seed(0)
    order = [torch.randint(len(examples), (), generator=generator).item() for _ in range(steps)]
    rates = [group["lr"] for group in adam.param_groups]
    first = trainings.begin(weights, adam) if trainings else 0
    for step in track(range(first, steps), "distillation", steps - first):
        for group, own in zip(adam.param_groups, rates, strict=True):
            group["lr"] = own * (1 - step / steps)
        adam.zero_grad()
        with torch.enable_grad():
            found = loss(examples[order[step]], (step + 1) / steps)
        if not found.isfinite():
            raise CompressError("the distillation diverged; give fewer steps")
        found.backward()
        adam.step()
        if trainings:
            trainings.keep(step + 1, weights, adam)


def size_of(weight: Tensor) -> float:
    """Root mean square of a weight; of one that starts at zero that of its kind, about a hundredth."""
    return weight.detach().float().square().mean().sqrt().item() or 0.01


class Call(NamedTuple):
    """One call of a module inside the full model, and what it answered."""

    args: tuple
    kwargs: dict[str, Any]
    target: Tensor
    around: Any  # what else the answer depends on, in the caller's own terms


def record_calls(
    model: nn.Module, modules: dict[str, nn.Module], batches: list[dict], around: Callable = lambda: None
) -> dict[str, list[Call]]:
    """All calls of these modules, in one pass over the batches; `around()` is asked at each call.

    Caches are left out, since a second call would write into them again.
    """
    calls: dict[str, list[Call]] = {path: [] for path in modules}

    def keep(path: str) -> Callable:
        def hook(module, args, kwargs, output):
            named = {name: plain(value) for name, value in kwargs.items()}
            calls[path].append(Call(plain(args), named, plain(answer(output)), around()))

        return hook

    hooks = [module.register_forward_hook(keep(path), with_kwargs=True) for path, module in modules.items()]
    try:
        for batch in batches:
            with torch.no_grad():
                model(**inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def plain(value: Any) -> Any:
    """A copy of tensors and numbers; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(plain(part) for part in value)
    return value if isinstance(value, bool | int | float | str) else None


def error(student: nn.Module, call: Call) -> Tensor:
    """Mean squared error relative to the size of what is to be matched."""
    difference = (answer(student(*call.args, **call.kwargs)) - call.target).float()
    return difference.square().mean() / call.target.float().square().mean().clamp_min(1e-12)


def fit(
    student: nn.Module, weights: list[nn.Parameter], calls: list[Call], prepare: Callable, steps: int,
    trainings: Trainings | None,
) -> list[float]:  # fmt: skip
    """Train these weights of the student; the mean error before and after. What did not get better is undone.

    `prepare(call.around)` is run before each call.
    """

    def loss(call: Call, done: float = 0.0) -> Tensor:
        prepare(call.around)
        return error(student, call)

    def mean_error() -> float:
        with torch.no_grad():
            return torch.stack([loss(call) for call in calls]).mean().item()

    before, start = mean_error(), [weight.detach().clone() for weight in weights]
    train(weights, calls, loss, steps, RATE, trainings)
    after = mean_error()
    if not after < before:
        for weight, value in zip(weights, start, strict=True):
            weight.data.copy_(value)
        after = before
    return before, after
