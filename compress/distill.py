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
    student: nn.Module, weights: list[nn.Parameter], calls: list[Call], prepare: Callable, steps: int
) -> list[float]:
    """Train these weights of the student by Adam; the mean error before and after. What did not get better is undone.

    `prepare(call.around)` is run before each call. The learning rate is a hundredth of each weight's own size and falls
    to zero, so that models of any scale move alike.
    """

    def loss(call: Call) -> Tensor:
        prepare(call.around)
        return error(student, call)

    def mean_error() -> float:
        with torch.no_grad():
            return torch.stack([loss(call) for call in calls]).mean().item()

    before, start = mean_error(), [weight.detach().clone() for weight in weights]
    adam = torch.optim.Adam(
        [{"params": [w], "lr": 0.01 * w.detach().float().square().mean().sqrt().item()} for w in weights]
    )
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        adam.zero_grad()
        with torch.enable_grad():
            loss(calls[torch.randint(len(calls), (), generator=generator).item()]).backward()
        adam.step()
        fall.step()
    after = mean_error()
    if not after < before:
        for weight, value in zip(weights, start, strict=True):
            weight.data.copy_(value)
        after = before
    return before, after
