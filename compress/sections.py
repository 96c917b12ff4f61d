"""The parts of a recipe as frozen types: data, limits, steps, and how the checkpoint is written."""

from __future__ import annotations

import re
from math import inf, isfinite
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import CompressError
from compress.transform import Transform

BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
NUMBER = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
LIMIT = rf"([+-]?{NUMBER}|{NUMBER}x)"
WHAT_LIMIT = "a number (bound), 1.05x (ratio to before), +0.5 or -0.2 (change to before) or empty (no limit)"


class Section(BaseModel):
    """A part of a recipe: frozen, and without keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Data(Section):
    """Which samples a run looks at; without `data`, those that need no file (noise, for diffusion)."""

    data: str | None = Field(None, min_length=1, description="file, folder or name of a dataset")
    samples: int = Field(128, ge=1, description="how many sequences or images")
    length: int = Field(512, ge=1, description="tokens of a sequence (text only)")
    batch: int = Field(8, ge=1, description="samples in a batch")
    column: str | None = Field(None, min_length=1, description="column of a table that holds the samples")
    split: str | None = Field(None, min_length=1, description="split of a dataset")


class Limit(Section):
    """How far a measure may go: to a number, to a multiple of its value before, or by a change of that value."""

    kind: Literal["absolute", "ratio", "change"]
    value: float
    text: str

    @classmethod
    def read(cls, written: Any) -> Limit | None:
        """The limit as a recipe writes it; None measures without one."""
        if written is None or written is True:
            return None
        if type(written) in (int, float):
            return cls(kind="change" if written < 0 else "absolute", value=written, text=str(written))
        ratio = isinstance(written, str) and written.endswith("x")
        known = isinstance(written, str) and re.fullmatch(LIMIT, written)
        value = float(written.removesuffix("x")) if known else inf
        if not isfinite(value) or ratio and not value:
            raise CompressError(f"it must be {WHAT_LIMIT}")
        return cls(kind="ratio" if ratio else "change" if written[0] in "+-" else "absolute", value=value, text=written)

    def bound(self, before: float) -> float:
        """The bound in the measure's unit, given the measure before compression."""
        return {"absolute": self.value, "ratio": before * self.value, "change": before + self.value}[self.kind]


class Validation(Data):
    """What is measured before and after, on which samples, and how far each measure may go."""

    samples: int = Field(64, ge=1, description="how many sequences or images")
    limits: dict[str, Limit | None] = {}


class Step(Section):
    """One method with its options, and where the recipe names it."""

    use: str
    method: Transform
    where: str

    @property
    def options(self) -> dict[str, Any]:
        """All options as JSON, as a recipe spells them."""
        return self.method.model_dump(mode="json", by_alias=True)


class Emit(Section):
    """How the checkpoint is written."""

    format: Literal["auto", "native", "compressed-tensors", "compress-plan"] = Field(
        "auto", description="form of the checkpoint; auto takes the first that fits"
    )
    shard: str = Field(
        "5GB", pattern="^[1-9][0-9]{0,5}(KB|MB|GB)$", examples=["5GB"], description="largest size of a weight file"
    )

    @property
    def shard_bytes(self) -> int:
        """The largest size of a weight file in bytes."""
        return int(self.shard[:-2]) * BYTES[self.shard[-2:]]
