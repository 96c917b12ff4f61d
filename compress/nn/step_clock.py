"""Where a denoiser stands in its sampling, told from its arguments, and what it keeps from one step to the next.

Caches belong to a context: the n-th call at a timestep (conditional and unconditional calls; the two evaluations of
Heun's method), within the cache context that the pipeline names, if it names one. All of it is forgotten as soon as a
call cannot be the next step of the same images: another shape, dtype or device, other conditions, a timestep that
rises, a latent that turns away, gradients, or an error in the call before. Such a call is computed: a single call is
always exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import ModelHook, StateManager
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SAME_IMAGE = 0.75  # cosine of two latents: one of four sampling steps keeps 0.92, an unrelated noise has none


def extrapolate(history: Sequence[tuple[float, Tensor]], at: float) -> Tensor:
    """The value at timestep `at` on the line through the last two computed ones; the last one if it is the only one."""
    if len(history) == 1:
        return history[-1][1]
    (older, first), (newer, second) = history[-2:]
    return torch.lerp(first, second, (at - older) / (newer - older))


def is_computed(step: int, every: int, warmup: int) -> bool:
    """Is this step computed? All of the warm-up are, then each `every`-th one."""
    return step < warmup or (step - warmup + 1) % every == 0


def is_last(timestep: float, gap: float) -> bool:
    """Is this the step that ends in the image, so that nothing after it corrects an error?"""
    return timestep < 1.5 * gap  # flow schedules end in a jump that is longer than the gap before


def turned(latent: Tensor, before: Tensor) -> bool:
    """Has any row of the batch turned too far to be the next step of the same image?"""
    return bool((F.cosine_similarity(latent.flatten(1).float(), before.flatten(1).float()) < SAME_IMAGE).any())


def arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by their names, in the order of the signature."""
    given = signature(type(module)).bind(module, *args, **kwargs).arguments
    given.pop("self")
    return given


@cache
def signature(kind: type[nn.Module]) -> inspect.Signature:
    """The signature of a class's forward; reading it takes longer than a small block."""
    return inspect.signature(kind.forward)


def single(timestep: Any) -> float | None:
    """The timestep of a call; None where its rows are at several, or on the meta device."""
    if not isinstance(timestep, Tensor):
        return timestep
    values = set() if timestep.is_meta else set(timestep.flatten().tolist())
    return values.pop() if len(values) == 1 else None


def same_kind(left: Tensor, right: Tensor) -> bool:
    """The same shape, dtype and device."""
    return (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)


def alike(left: Any, right: Any) -> bool:
    """Is a condition still the same as in the step before?"""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (same_kind(left, right) and torch.equal(left, right))
    return type(left) is type(right) and left == right


class Contexts(StateManager):
    """Receives the name that a pipeline gives to its call (`model.cache_context`); the states are the clock's own."""

    def __init__(self):
        super().__init__(dict)

    @property
    def name(self) -> str | None:
        return self._context and self._context.name


class Clock(ModelHook):
    """Hook of the denoiser: follows the timesteps of a generation and decides for each call what is computed."""

    _is_stateful = True

    def __init__(self, every: int, order: int, warmup: int):
        super().__init__()
        self.every, self.order, self.warmup = every, order, warmup
        self.contexts = Contexts()
        self.reset()

    def reset(self) -> None:
        """Forget the generation and let go of its tensors."""
        self.step, self.timestep, self.gap, self.latent = 0, None, 0.0, None
        self.calls: dict[str | None, int] = {}  # at this timestep, for each name of a context
        self.conditions: dict[tuple, list] = {}
        self.histories: dict[tuple, dict[str, list]] = {}
        self.history: dict[str, list] | None = None  # of the running call; None computes without remembering
        self.skips = self.running = False
        self.entry: tuple = ()

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.reset()
        return module

    def pre_forward(self, module, *args, **kwargs):
        given = arguments(module, args, kwargs)
        timestep = single(given.pop("timestep", None))
        latent, *conditions = given.values()
        samples = timestep is not None and not module.training and not torch.is_grad_enabled()
        if self.running or not samples:
            self.reset()
        if samples:
            self.advance(latent, timestep, tree_leaves(conditions))
        return args, kwargs

    def post_forward(self, module, output):
        self.running = self.skips = False
        self.entry, self.history = (), None
        return output

    def advance(self, latent: Tensor, timestep: float, conditions: list) -> None:
        """Find the step and the context of this call, and whether it may skip."""
        if not self.continues(latent, timestep, conditions):
            self.reset()
        if self.timestep not in (None, timestep):
            self.step, self.gap, self.calls = self.step + 1, self.timestep - timestep, {}
        context = self.context(timestep)
        self.calls[self.contexts.name] = context[1] + 1
        self.timestep, self.latent, self.running = timestep, latent, True
        self.conditions[context] = conditions
        self.history = self.histories.setdefault(context, {})
        computed = is_computed(self.step, self.every, self.warmup) or is_last(timestep, self.gap)
        self.skips = bool(self.history) and not computed

    def context(self, timestep: float) -> tuple[str | None, int]:
        """The pipeline's name for this call, and how many calls of that name there were at this timestep."""
        return self.contexts.name, self.calls.get(self.contexts.name, 0) if timestep == self.timestep else 0

    def continues(self, latent: Tensor, timestep: float, conditions: list) -> bool:
        """Can this call belong to the same or the next step of the generation that was seen last?"""
        if self.latent is None or timestep > self.timestep or not same_kind(latent, self.latent):
            return False
        known = self.conditions.get(self.context(timestep), conditions)
        same = len(known) == len(conditions) and all(map(alike, known, conditions))
        return same and not turned(latent, self.latent)

    def remember(self, path: str, values: tuple) -> None:
        """Keep what was computed, and of what was computed before only as much as the order needs."""
        if self.history is not None:
            kept = [point for point in self.history.get(path, []) if point[0] != self.timestep]
            self.history[path] = [*kept[len(kept) - self.order :], (self.timestep, values)]

    def predict(self, path: str) -> tuple:
        """What the skipped computation would have returned."""
        points = self.history[path]
        columns = zip(*(values for _, values in points), strict=True)
        times = [time for time, _ in points]
        return tuple(
            None if column[-1] is None else extrapolate(list(zip(times, column, strict=True)), self.timestep)
            for column in columns
        )
