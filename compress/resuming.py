"""The state of a training that is under way, kept in the folder of its run, so that a killed run goes on in its midst.

What comes before a training in its step, other trainings too, is done again. Only where that gives the same weights to
train does the training go on where it was. Those that do not run in `compress.distill` (signround) keep no state.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Adam

from compress.progress import say

SECONDS = 60.0  # at least, between two savings
RARE = 20  # times as long as the last one took, so that it costs a twentieth at most
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam, of each weight that was reached


class Trainings:
    """Those of one step of a recipe, in the order in which they come; only the last that ran is on disk."""

    def __init__(self, path: Path, run: str):
        self.path, self.run, self.count, self.start = path, run, 0, ""
        self.killed = self._facts()
        self.under_way = int(self.killed.get("training", 0))
        self.due = time.monotonic() + SECONDS

    def _facts(self) -> dict[str, str]:
        """What the file says that it is; nothing where there is none of this run. It can be done without."""
        if self.path.exists():
            try:
                with safe_open(self.path, "pt") as kept:
                    facts = kept.metadata() or {}
                return facts if facts.get("run") == self.run else {}
            except SafetensorError:
                say(f"{self.path} is damaged: the training in it starts anew")
        return {}

    def begin(self, weights: list[nn.Parameter], adam: Adam) -> int:
        """The steps of the next training that are done; weights and moments are then what they were after these."""
        self.count, self.start = self.count + 1, digest(weights)
        if self.count != self.under_way or self.killed["start"] != self.start:
            return 0
        with safe_open(self.path, "pt") as kept:
            restore(kept, weights, adam)
        return int(self.killed["step"])

    def keep(self, step: int, weights: list[nn.Parameter], adam: Adam) -> None:
        """Write the state after so many steps, now and then; one that is done again does not replace a later one."""
        started = time.monotonic()
        if started < self.due or self.count < self.under_way:
            return
        tensors = {f"{at}": weight.detach() for at, weight in enumerate(weights)}
        for at, weight in enumerate(weights):
            tensors |= {f"{at} {moment}": adam.state[weight][moment] for moment in MOMENTS if weight in adam.state}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        facts = {"run": self.run, "training": str(self.count), "start": self.start, "step": str(step)}
        part = self.path.with_suffix(".part")
        try:
            save_file(tensors, part, facts)
            os.replace(part, self.path)
        except (OSError, SafetensorError) as error:  # a full disk
            say(f"the state of the training could not be kept: {error}")
            part.unlink(missing_ok=True)
        now = time.monotonic()
        self.due = now + max(SECONDS, RARE * (now - started))


def digest(weights: list[nn.Parameter]) -> str:
    """What tells weights from others."""
    found = hashlib.sha256()
    for weight in weights:
        found.update(f"{tuple(weight.shape)} {weight.dtype}\0".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def restore(kept, weights: list[nn.Parameter], adam: Adam) -> None:
    """Weights and moments as they were written."""
    names = set(kept.keys())
    for at, weight in enumerate(weights):
        weight.data.copy_(kept.get_tensor(f"{at}"))
        if f"{at} {MOMENTS[0]}" in names:
            step, *moments = (kept.get_tensor(f"{at} {moment}") for moment in MOMENTS)
            adam.state[weight] = dict(zip(MOMENTS, (step, *(each.to(weight.device) for each in moments)), strict=True))
