"""The contract of a method: a frozen model of its options with three verbs, and the plan they share.

A method is one file, `compress/transforms/<family>/<method>.py`; its path is its name in a recipe and its module
docstring is its card. It imports `Field`, `Plan` and `Transform` from here, so that loading a checkpoint (which only
replays `apply`) does not need pydantic.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import CompressError, did_you_mean, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.view import View

__all__ = ["FAMILIES", "Field", "Plan", "Transform", "card", "find", "names"]

FAMILIES = ("heads", "tokens", "sharing", "linear", "quantize")  # also the order of the steps in a recipe


@dataclass
class Plan:
    """What a step will do: `edits` (path -> JSON settings) are saved and replayed, `tensors` only reach `apply`."""

    edits: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)  # JSON for the report: scores per layer, choices made


class Transform(BaseModel):
    """One compression method: its fields are the recipe's options, its three verbs the work."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    needs_data: ClassVar[bool] = False  # is it refused without batches for `calibrate`?
    uses_data: ClassVar[bool] = False  # does `calibrate` look at batches where there are some?
    prepares: ClassVar[bool] = False  # does it leave its modules to later steps of the family?
    emulated: ClassVar[tuple[str, ...]] = ()  # kinds of device that only imitate what its layers do, without the speed
    neutral: ClassVar[dict | None] = None  # options that change nothing, where the method has such
    example: ClassVar[dict] = {}  # the smallest options that show the method on a tiny model; the laws use them

    only: tuple[str, ...] = Field((), description="globs of module names to take; empty takes all")
    skip: tuple[str, ...] = Field((), alias="except", description="globs of module names to leave alone")

    def plan(self, view: View) -> Plan:
        """Decide from the config and the weights alone; must also run on the meta device."""
        raise NotImplementedError

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        """Look at data: refine the plan, change weight values, never the module tree."""
        return plan

    def apply(self, view: View, plan: Plan) -> None:
        """Change the module tree. It only reads `plan`, never the options: loading a checkpoint replays it on meta."""
        raise NotImplementedError

    def mask(self, view: View, plan: Plan) -> bool:
        """Make the output independent of what `apply` will remove, in the same shapes; False where that means nothing.

        The pipeline holds `apply` against it, so that surgery which is not exact is refused.
        """
        return False

    def takes(self, path: str) -> bool:
        """Do `only` and `except` let this module through? A glob also takes everything below the module it names."""

        def hit(globs):
            return any(fnmatchcase(path, glob) or fnmatchcase(path, glob + ".*") for glob in globs)

        return (not self.only or hit(self.only)) and not hit(self.skip)


@cache
def names() -> tuple[str, ...]:
    """All methods, by the path of their file."""
    root = Path(__file__).parent / "transforms"
    files = [path for family in FAMILIES for path in sorted((root / family).glob("[a-z]*.py"))]
    return tuple(f"{path.parent.name}.{path.stem}" for path in files)


@cache
def find(name: str) -> type[Transform]:
    """The method's class: the file's name in CamelCase. Only names that are files here are ever imported."""
    if name not in names():
        raise CompressError(f"no method {name!r}{did_you_mean(name, names())} (methods: {one_of(names(), 40)})")
    module = importlib.import_module(f"compress.transforms.{name}")
    return getattr(module, "".join(word.title() for word in name.split(".")[1].split("_")))


def card(name: str) -> str:
    """The method's card: its module docstring."""
    return (importlib.import_module(find(name).__module__).__doc__ or "").strip()
