"""Contenders that take turns on one machine: medians, ratios to the first and their spread."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


class Missing(Exception):
    """Why a contender cannot take part here, in one line."""


@dataclass(frozen=True)
class Time:
    """Median seconds, and the median and interquartile range of the ratio to the first contender's turns."""

    seconds: float
    ratio: float
    spread: float


def paired(
    calls: dict[str, Callable[[], object]],
    rounds: int = 9,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Time]:
    """Time every call in turns, each repeated to about so many seconds in all rounds together.

    The clock is by default the processor time of the whole process, since other work on the machine does not count in
    it and the threads that a runtime keeps for itself do.
    """
    assert rounds >= 7
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(seconds / rounds / max(_turn(call, 1, clock), 1e-6)))
    turns = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turns[name].append(_turn(calls[name], repeats[name], clock))
    first = next(iter(turns.values()))
    return {name: _time(values, first) for name, values in turns.items()}


def _turn(call: Callable[[], object], repeat: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def _time(values: list[float], first: list[float]) -> Time:
    ratios = [value / base for value, base in zip(values, first, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Time(statistics.median(values), middle, high - low)


def load() -> str:
    """What else the machine is doing: its load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"
