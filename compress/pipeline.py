"""The straight line: recipe -> load -> the steps -> write -> measure -> gate -> verify -> report."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from compress import emit
from compress.checkpoint import SIDECAR, check_files, load
from compress.errors import CompressError, LimitMissed
from compress.flops import memory
from compress.harness import check_tasks
from compress.journal import Journal, fingerprint, partial
from compress.judge import check_measures, gate, measures, samples
from compress.machine import hardware, versions
from compress.recipe import Emit, Recipe
from compress.report import Report
from compress.source import Source, adopt, open_source
from compress.steps import plan_steps, run_steps, seed_everything


@dataclass
class Result:
    """What a run made: the model in memory, its report, and the folder if one was asked for."""

    model: nn.Module
    report: Report
    folder: Path | None = None
    source: Source | None = field(default=None, repr=False)
    recipe: Recipe | None = field(default=None, repr=False)
    steps: list[dict] = field(default_factory=list, repr=False)
    batch: dict | None = field(default=None, repr=False)

    def save(self, folder: str | Path) -> Path:
        """Write the result into a new folder, verified; the folder appears whole or not at all."""
        with staged(folder) as stage:
            if self.folder is not None:
                shutil.copytree(self.folder, stage)
            else:
                facts = {"recipe": self.recipe.source}
                chosen = emit.write(self.source, stage, self.steps, self.batch, self.recipe.emit, facts)
                self.report.format, self.report.why_format = chosen
                self.report.verified = emit.prove(stage)
                emit.describe(self.report, stage, self.recipe, self.source)
        self.folder = Path(folder)
        return self.folder

    def push(self, repo: str, private: bool = False, pr: bool = False) -> str:
        """Put the emitted folder on the hub; the URL of the commit."""
        from compress.hub import push

        if self.folder is None:
            raise CompressError("push: the result is only in memory, save() it to a folder first")
        return push(self.folder, repo, private=private, pr=pr)


def compress(
    model: str | Path | nn.Module,
    recipe: str | Path | dict | Recipe,
    *,
    output: str | Path | None = None,
    processor=None,
    calibration=None,
    validation=None,
    device: str | None = None,
    dtype: str | None = None,
    format: str | None = None,
    force: bool = False,
) -> Result:
    """Compress a model by a recipe. A model object is changed in place; with `output` the result is on disk, proven.

    `calibration` and `validation` are iterables of examples for use in place of the recipe's files.
    """
    started = time.monotonic()
    recipe = as_recipe(recipe)
    if format is not None:
        recipe = recipe.model_copy(update={"emit": recipe.emit.model_copy(update={"format": format})})
    out = Path(output) if output is not None else None
    if out is not None and out.exists() and not (out / SIDECAR).exists():
        raise CompressError(f"{out}: exists already and compress did not make it; choose another -o")
    source = as_source(model, processor, device, dtype)
    if out is not None and source.library == "torch":
        raise CompressError(f"{source.name}: only transformers and diffusers models can be saved; leave output out")
    check_tasks(recipe.validate_, source.model, source.processor)
    seed_everything(recipe.seed)
    wants_data = any(step.method.needs_data or step.method.uses_data for step in recipe.steps)
    batches = samples(recipe.calibrate, source, calibration, recipe.seed, wants_data)
    held_out = samples(recipe.validate_, source, validation, None, False)
    check_measures(source, recipe, held_out)
    data = (batches, held_out)
    if out is None:
        return carry_out(source, recipe, data, None, force, started)
    steps = [f"{step.use} {step.method.model_dump_json()}" for step in recipe.steps]
    work = fingerprint(source, data, str(recipe.seed), *steps, str(device), str(dtype))  # limits and format may change
    key = hashlib.sha256(f"{work} {recipe.emit.format} {recipe.source}".encode()).hexdigest()
    if out.exists() and not force:
        return already(out, key, source, recipe)
    with Journal(out, work, restart=force) as journal:
        result = carry_out(source, recipe, data, journal, force, started, key)
        journal.finish(out)
    result.folder = out
    return result


def carry_out(
    source: Source, recipe: Recipe, data: tuple[list, list], journal: Journal | None, force: bool, started: float,
    key: str = "",
) -> Result:  # fmt: skip
    """Run the steps, write and measure the result, and hold it against its limits; then prove and describe it.

    From the first measure on the steps stay in the journal, whatever fails: another limit or format, or --force, goes
    on from there.
    """
    batches, held_out = data
    batch = next(iter(held_out or batches), None)
    try:
        rows = run_steps(source, recipe, batches, batch, journal)
    except CompressError:
        if journal is not None:  # the same command would end here again
            journal.discard()
        raise
    steps = [row["record"] for row in rows]
    report = Report(
        model=source.name, recipe=recipe.name, format="", why_format="", steps=[row["ledger"] for row in rows],
        measures=[], verified={}, hardware=hardware(next(source.model.parameters()).device), versions=versions(),
        seconds=0.0, created=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    stage = None
    if journal is not None:
        stage = journal.stage()
        facts = {"recipe": recipe.source, "fingerprint": key}
        report.format, report.why_format = emit.write(source, stage, steps, batch, recipe.emit, facts)
    report.layers = emit.bytes_by_block(source)
    report.measures = measures(source, recipe, held_out, stage)
    gate(report, force)
    if stage is not None:
        report.verified = emit.prove(stage)
    report.seconds = time.monotonic() - started
    if stage is not None:
        emit.describe(report, stage, recipe, source)
    return Result(source.model, report, None, source, recipe, steps, batch)


def plan(model: str | Path | nn.Module, recipe: str | Path | dict | Recipe, *, dtype: str | None = None) -> list[dict]:
    """What every step would take and how the model would stand after it; on an empty model, nothing is touched."""
    recipe = as_recipe(recipe)
    source = as_source(model, None, None, dtype, meta=True)
    if source.adopted:
        source.model = source.untouched.to("meta")
    return plan_steps(source, recipe, memory)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a compressed model that was loaded (and perhaps trained on) into a new folder, verified."""
    from compress.view import View

    kept = getattr(model.config, "quantization_config", None)
    if not getattr(kept, "steps", None):
        raise CompressError(f"{type(model).__name__}: was not compressed by a recipe; save it with save_pretrained")
    source = Source(type(model).__name__, model.eval(), View(model).library)
    # Only our own loading of compressed-tensors makes a transformers model with a record and no weights file in it.
    tensors = source.library == "transformers" and not kept.weights
    options = Emit(format="compressed-tensors" if tensors else "compress-plan")
    with staged(folder) as stage:
        emit.write(source, stage, kept.steps, None, options, {})
        emit.prove(stage)
    return Path(folder)


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A place beside a new folder that becomes it in one rename when all went well."""
    folder = Path(folder)
    if folder.exists():
        raise CompressError(f"{folder}: exists already; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        yield Path(temporary) / "out"
        (Path(temporary) / "out").rename(folder)


def as_recipe(recipe: str | Path | dict | Recipe) -> Recipe:
    """A recipe from its file, its data, or as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.make(recipe) if isinstance(recipe, dict) else Recipe.read(recipe)


def as_source(model, processor, device: str | None, dtype: str | None, meta: bool = False) -> Source:
    """Open a model by name, or adopt the user's object."""
    kind = type(model).__name__
    if isinstance(model, nn.Module):
        if device or dtype:
            raise CompressError(f"{kind}: device and dtype are for models by name; move or cast the object before")
        model.train(model.training and meta)
        return adopt(model, processor)
    if not isinstance(model, (str, Path)):
        raise CompressError(f"{kind}: is no model; give a hub id, a folder or a torch module (of a pipeline, a part)")
    source = open_source(str(model), device=device, dtype=dtype, meta=meta)
    source.own_processor = processor
    return source


def already(out: Path, key: str, source: Source, recipe: Recipe) -> Result:
    """The result of the same command run before; anything else in the way is refused."""
    facts = check_files(out)
    if facts.get("fingerprint") == key:
        if partial(out).exists():  # killed after the last rename
            with Journal(out, "", restart=True) as journal:
                journal.discard()
        loaded = load(out)
        model = getattr(loaded, source.component) if source.component else loaded
        report = Report.read(out)
        if report.missed:
            names = ", ".join(item.name for item in report.missed)
            raise LimitMissed(f"{out}: is this run's result, emitted by --force in spite of missed limits ({names})")
        return Result(model, report, out, source, recipe, facts["steps"])
    raise CompressError(
        f"{out}: exists already and is not this run's result; choose another -o or replace it with --force"
    )
