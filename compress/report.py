"""What a run measured: report.json, the terminal's tables, and the rows and remarks that card and page share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from compress.errors import CompressError, one_of
from compress.measure import Measure, human

if TYPE_CHECKING:
    from rich.console import Console

FILE = "report.json"
MEASURES = ("name", "before", "after", "change", "limit", "passed")
LEDGER = ("use", "took", "parameters", "size", "FLOPs", "error after it")


class Step(TypedDict):
    """A row of the ledger: what a step did and how the model stood after it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    use: str
    options: dict[str, Any]
    modules: list[str]
    seconds: float
    parameters: int | None
    bytes: int | None
    flops: float | None
    error: float | None  # relative to the original's answers
    notes: dict[str, Any]


@dataclass
class Report:
    """The whole truth about one run; `report.json` holds exactly these keys (`layers` only where it is known)."""

    # JSON has no infinity, but a ruined model has an infinite perplexity, and the report must be able to say so.
    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    model: str
    recipe: str
    format: str
    why_format: str
    steps: list[Step]
    measures: list[Measure]
    verified: dict[str, Any]  # passed, how, error
    hardware: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    created: str
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)  # path -> bytes before and after

    @property
    def missed(self) -> list[Measure]:
        """The measures outside the limits of the recipe."""
        return [measure for measure in self.measures if measure.passed is False]

    def measure(self, name: str) -> Measure | None:
        """The measure of this name, if it was taken."""
        return next((measure for measure in self.measures if measure.name == name), None)

    def verdict(self) -> str:
        """How the written folder was verified, in one sentence."""
        if not self.verified:
            return "not verified"
        error = self.verified.get("error")
        difference = "" if error is None else f", relative error {human(error)}"
        return f"{'passed' if self.verified.get('passed') else 'FAILED'}: {self.verified.get('how', '')}{difference}"

    def write(self, folder: str | Path) -> Path:
        """Write report.json whole or not at all."""
        path = Path(folder) / FILE
        part = path.with_name(f".{FILE}.part")
        part.write_bytes(TypeAdapter(Report).dump_json(self, indent=2, exclude=None if self.layers else {"layers"}))
        os.replace(part, path)
        return path

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """The report of an emitted folder."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise CompressError(f"{path}: there is no such file; a folder that compress emitted holds one")
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise CompressError(
                f"{path}: {where}: {first['msg']}; it must be as this version of compress writes it"
            ) from error

    def table(self, console: Console, folder: str | Path | None = None) -> None:
        """Print the measures, the ledger, the format and where the report lies."""
        from rich.table import Table
        from rich.text import Text

        def table(title, columns, rows):
            grid = Table(*columns, title=title, title_justify="left")
            for row in rows:
                grid.add_row(*[Text(cell, style="bold red" if cell == "MISSED" else "") for cell in row])
            if rows:
                console.print(grid)

        console.print(Text(f"{self.model} by {self.recipe}", style="bold"))
        table("Measures", MEASURES, self.measure_rows())
        table("Steps", LEDGER, self.step_rows())
        for line in self.remarks():
            console.print(Text(line))
        console.print(Text(f"format: {self.format}, {self.why_format}"))
        console.print(Text(f"verified: {self.verdict()}"))
        if folder is not None:
            console.print(Text(f"report: {Path(folder) / FILE}"))

    def measure_rows(self) -> list[tuple[str, ...]]:
        """The measures in words, in the columns MEASURES."""
        passed = {True: "yes", False: "MISSED", None: ""}
        return [
            (item.name, item.text("before"), item.text("after"), item.change(), item.limit or "", passed[item.passed])
            for item in self.measures
        ]

    def step_rows(self) -> list[tuple[str, ...]]:
        """The ledger in words, in the columns LEDGER."""
        units = {"seconds": "s", "parameters": "parameters", "bytes": "bytes", "flops": "FLOPs", "error": ""}
        return [(step["use"], *(human(step[key], unit) for key, unit in units.items())) for step in self.steps]

    def remarks(self) -> list[str]:
        """What the numbers alone would hide: notes of measures, modules left alone, idle globs, remarks of methods."""
        lines = [f"{measure.name}: {measure.note}" for measure in self.measures if measure.note]
        for step in self.steps:
            if refused := step["notes"].get("refused"):
                told = one_of([f"{path} ({why})" for path, why in refused.items()], 3)
                lines.append(f"{step['use']} left alone: {told}")
            if names := step["notes"].get("idle"):
                lines.append(f"{step['use']}: names no module: {one_of(names, 3)}")
            lines += [f"{step['use']}: {remark}" for remark in step["notes"].get("remarks", ())]
        return lines
