"""Layer-wise distillation: a changed copy of one module learns to answer as the module itself did on real inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.outputs import answer, inputs


class Call(NamedTuple):
    """One call of a module inside the full model, and what it answered."""

    args: tuple
    kwargs: dict[str, Any]
    target: Tensor


def record_calls(model: nn.Module, module: nn.Module, batches: list[dict]) -> list[Call]:
    """All calls of one module; caches are left out, since a second call would write into them again."""
    calls: list[Call] = []

    def plain(value):
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, tuple | list):
            return type(value)(plain(part) for part in value)
        return value if isinstance(value, bool | int | float | str) else None

    def keep(module, args, kwargs, output):
        calls.append(Call(plain(args), {name: plain(value) for name, value in kwargs.items()}, plain(answer(output))))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        for batch in batches:
            with torch.no_grad():
                model(**inputs(batch))
    finally:
        handle.remove()
    return calls


def error(student: nn.Module, call: Call) -> Tensor:
    """Mean squared error relative to the size of what is to be matched."""
    difference = (answer(student(*call.args, **call.kwargs)) - call.target).float()
    return difference.square().mean() / call.target.float().square().mean().clamp_min(1e-12)


def fit(
    student: nn.Module, weights: list[nn.Parameter], calls: list[Call], prepare: Callable, steps: int
) -> list[float]:
    """Train these weights of the student by Adam; the mean error before and after. What did not get better is undone.

    `prepare(number)` is run before call `number`. The learning rate is a hundredth of each weight's own size and falls
    to zero, so that models of any scale move alike.
    """

    def loss(number: int) -> Tensor:
        prepare(number)
        return error(student, calls[number])

    def mean_error() -> float:
        with torch.no_grad():
            return torch.stack([loss(number) for number in range(len(calls))]).mean().item()

    before, start = mean_error(), [weight.detach().clone() for weight in weights]
    adam = torch.optim.Adam(
        [{"params": [w], "lr": 0.01 * w.detach().float().square().mean().sqrt().item()} for w in weights]
    )
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        adam.zero_grad()
        with torch.enable_grad():
            loss(torch.randint(len(calls), (), generator=generator).item()).backward()
        adam.step()
        fall.step()
    after = mean_error()
    if not after < before:
        for weight, value in zip(weights, start, strict=True):
            weight.data.copy_(value)
        after = before
    return before, after
