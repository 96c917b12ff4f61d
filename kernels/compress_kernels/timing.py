"""Paired timings for the benchmarks, and the question whether a fast path is right, and fast, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import Tensor

SLOWDOWN = 8  # kernels that stand in for a missing instruction set are twenty times slower and more


def paired(functions: dict[str, Callable], rounds: int = 9, seconds: float = 0.3) -> dict[str, float]:
    """Median seconds of each function; all take turns in every round, so that a busy machine hits them alike."""
    repeats = {}
    for name, function in functions.items():
        function()
        repeats[name] = max(1, int(seconds / rounds / max(_once(function, 1), 1e-6)))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_once(function, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _once(function: Callable, repeat: int) -> float:
    start = time.thread_time()  # not the wall clock: other work on the machine does not count
    for _ in range(repeat):
        function()
    return (time.thread_time() - start) / repeat


def right(fast: Callable[[], Tensor], expected: Tensor, tolerance: float) -> bool:
    """Does `fast` give the expected tensor on this machine and this torch?

    No clock is asked: where other work turned it, a checkpoint's answers would differ from process to process.
    """
    try:
        result = fast()
    except (AttributeError, RuntimeError):  # no such operator in this torch, or none for this processor
        return False
    error = (result.double() - expected).norm() / expected.norm()
    return bool(error <= tolerance)


def trusted(fast: Callable[[], Tensor], plain: Callable[[], Tensor], expected: Tensor, tolerance: float) -> bool:
    """The same of an operator of torch, which may also be a slow stand-in here: is it not far slower than `plain`?"""
    return right(fast, expected, tolerance) and _fastest(fast) <= SLOWDOWN * _fastest(plain)


def _fastest(function: Callable) -> float:
    function()
    return min(_once(function, 1) for _ in range(5))
