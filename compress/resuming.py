"""The state of a training that is under way, kept in the folder of its run, so that a killed run goes on in its midst.

What comes before a training in its step is done again, and gives the same: only the training goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Adam

from compress.errors import CompressError

SECONDS = 60.0  # at least, between two savings
RARE = 20  # times as long as the last one took, so that it costs a twentieth at most
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam, of each weight that was reached

_trainings: ContextVar[Trainings | None] = ContextVar("trainings", default=None)


class Trainings:
    """Those of one step of a recipe, in the order in which they come; only the last that ran is on disk."""

    def __init__(self, path: Path, run: str):
        self.path, self.run, self.count = path, run, 0
        self.killed = self._killed()  # the number of the training that was under way; 0 where none was
        self.due = time.monotonic() + SECONDS

    def _killed(self) -> int:
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as kept:
                facts = kept.metadata()
        except SafetensorError:
            raise CompressError(f"{self.path}: is damaged; remove it") from None
        return int(facts["training"]) if facts["run"] == self.run else 0

    def begin(self, weights: list[nn.Parameter], adam: Adam) -> int:
        """The steps of the next training that are done; weights and moments are then what they were after these."""
        self.count += 1
        if self.count != self.killed:
            return 0
        with safe_open(self.path, "pt") as kept:
            restore(kept, weights, adam)
            return int(kept.metadata()["step"])

    def keep(self, step: int, weights: list[nn.Parameter], adam: Adam) -> None:
        """Write the state after so many steps, now and then; one that is done again does not replace a later one."""
        started = time.monotonic()
        if started < self.due or self.count < self.killed:
            return
        tensors = {f"{at}": weight.detach().contiguous() for at, weight in enumerate(weights)}
        for at, weight in enumerate(weights):
            tensors |= {f"{at} {moment}": adam.state[weight][moment] for moment in MOMENTS if weight in adam.state}
        part = self.path.with_suffix(".part")
        save_file(tensors, part, {"run": self.run, "training": str(self.count), "step": str(step)})
        os.replace(part, self.path)
        now = time.monotonic()
        self.due = now + max(SECONDS, RARE * (now - started))


def restore(kept, weights: list[nn.Parameter], adam: Adam) -> None:
    """Weights and moments as they were written."""
    names = set(kept.keys())
    for at, weight in enumerate(weights):
        weight.data.copy_(kept.get_tensor(f"{at}"))
        if f"{at} {MOMENTS[0]}" in names:
            step, *moments = (kept.get_tensor(f"{at} {moment}") for moment in MOMENTS)
            adam.state[weight] = dict(zip(MOMENTS, (step, *(each.to(weight.device) for each in moments)), strict=True))


@contextmanager
def resumable(path: Path, run: str) -> Iterator[None]:
    """Trainings within keep their state in this file, and go on from it where this run was killed in one."""
    token = _trainings.set(Trainings(path, run))
    try:
        yield
    finally:
        _trainings.reset(token)


def trainings() -> Trainings | None:
    """Where trainings keep their state; None where there is no folder for it."""
    return _trainings.get()
