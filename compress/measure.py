"""One thing measured before and after, and numbers as a person reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PHYSICAL = ("bytes", "parameters", "FLOPs", "ms", "s")  # all other units are qualities of the answers
SCALES = {
    "bytes": ("B", "kB", "MB", "GB", "TB"),
    "parameters": ("", "k", "M", "B", "T"),
    "FLOPs": ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"),
    "ms": ("µs", "ms", "s"),
    "s": ("µs", "ms", "s"),
    "share": ("",),
}


def human(value: float | None, unit: str = "") -> str:
    """A number as a person reads it: 52.1 MB, 134.5 M, 3.2 ms, 12.97."""
    if value is None:
        return "-"
    value = float(value) * {"ms": 1e3, "s": 1e6}.get(unit, 1)
    scales, power = SCALES.get(unit, (unit,)), 0
    while abs(value) >= 999.5 and power < len(scales) - 1 and math.isfinite(value):
        value, power = value / 1000, power + 1
    digits = f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{digits} {scales[power]}".strip()


@dataclass
class Measure:
    """One thing measured on the original and on the compressed model, and what the recipe asked of it."""

    name: str
    before: float | None
    after: float | None
    limit: str | None = None  # as the recipe wrote it
    unit: str = ""
    passed: bool | None = None  # None where the recipe set no limit
    note: str = ""
    spread: list[float] | None = None  # of before and after, in the same unit
    baseline: dict[str, Any] | None = None  # {"name", "value"}: the fastest stock path, for times

    def text(self, side: str) -> str:
        """`before` or `after` with its unit and spread."""
        spread = f" ± {human(self.spread[side == 'after'], self.unit)}" if self.spread else ""
        return human(getattr(self, side), self.unit) + spread

    def change(self) -> str:
        """What changed; a speed-up is told against the fastest stock path first, and not at all without one."""
        if self.before is None or self.after is None:
            return ""
        if self.unit in ("ms", "s"):
            return self._speed()
        if self.unit in PHYSICAL:
            return f"{(self.after / self.before - 1) * 100:+.1f} %" if self.before else ""
        if not math.isfinite(self.after - self.before):
            return ""
        difference = human(self.after - self.before)
        return difference if difference.startswith("-") else f"+{difference}"

    def _speed(self) -> str:
        if not self.baseline:
            return "no speed-up stated: the fastest stock path was not measured"
        stock = self.baseline["value"]
        words = f"{stock / self.after:.2f}x against the fastest stock path, {self.baseline['name']}"
        if stock == self.before:
            return words
        return f"{words} ({human(stock, self.unit)}); {self.before / self.after:.2f}x against the original as loaded"
