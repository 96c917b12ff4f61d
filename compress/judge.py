"""What a recipe asks to be measured, on the original and on the result in one run, held against its limits."""

from __future__ import annotations

from pathlib import Path

from compress.emit import tensor_bytes
from compress.errors import CompressError, LimitMissed
from compress.example import example
from compress.harness import scores
from compress.measure import Measure, human
from compress.metrics import TASK, metric
from compress.progress import Tracked, say
from compress.recipe import Data, Recipe, Validation
from compress.report import Report
from compress.source import Source


def samples(section: Data | None, source: Source, given, seed: int | None, needed: bool = True) -> list[dict]:
    """The examples of a section of the recipe, or the user's own; a seed draws them, without one they are the first.

    A pipeline makes its own where the recipe has no such section: those that are needed, or one call for a probe.
    """
    from compress.data import TRAJECTORY, batches

    if section is None and given is None and source.pipeline is None:
        return []
    section = section or (Data() if needed or given is not None else Data(samples=1, length=1, batch=1))
    what = given if given is not None else section.data or (TRAJECTORY if source.pipeline is not None else None)
    if what is None:
        return []
    options = section.model_dump(include={"samples", "length", "batch", "column", "split"})
    found = batches(what, source, seed=seed, **options)
    label = "validating" if isinstance(section, Validation) else "calibrating"
    if found.note:
        say(f"{label} on {found.note}")
    return Tracked(found, label)


def check_measures(source: Source, recipe: Recipe, batches: list[dict]) -> None:
    """Refuse, before any work is done, what cannot be measured on this model and these samples."""
    from compress.validate import check

    kind = next(source.model.parameters()).device.type
    for step in recipe.steps if recipe.validate_ and "latency" in recipe.validate_.limits else ():
        if kind in step.method.emulated:
            raise CompressError(
                f"{step.where}: {step.use} is only imitated on a {kind}, its latency there says nothing; "
                "leave latency out of validate, or run where it is native"
            )
    names = answered(recipe)
    check(names, source.model, batches, sampling(source, recipe, batches) if "psnr" in names else None)


def answered(recipe: Recipe) -> list[str]:
    """What the recipe wants measured beside speed and evaluation tasks."""
    limits = recipe.validate_.limits if recipe.validate_ else {}
    return [name for name in limits if name != "latency" and not name.startswith(TASK)]


def measures(source: Source, recipe: Recipe, batches: list[dict], folder: Path | None) -> list[Measure]:
    """Everything the recipe asks for, and the size always, on the original and the result in one run."""
    from compress.validate import measure

    limits = dict(recipe.validate_.limits) if recipe.validate_ else {}
    names = list(dict.fromkeys([*answered(recipe), "size", "parameters"]))
    original, sampler = source.original(), sampling(source, recipe, batches) if "psnr" in limits else None
    written = source.folder if folder is not None else None  # like is compared with like
    before = measure(names, original, original, batches, folder=written, sampler=sampler)
    after = measure(names, source.model, original, batches, folder=folder, sampler=sampler)
    before |= scores(recipe.validate_, original, source.processor)
    after |= scores(recipe.validate_, source.model, source.processor)
    found = [Measure(name, before[name], after[name], unit=metric(name).unit) for name in before]
    size, loaded = next(item for item in found if item.name == "size"), tensor_bytes(original)
    if not loaded / 1.5 < size.before < loaded * 1.5:
        size.note = f"the files of the original hold another dtype; as it was loaded it has {human(loaded, 'bytes')}"
    if "latency" in limits:
        found.append(speed(source, batches))
    for item in found:
        if limit := limits.get(item.name):
            item.limit = limit.text
            # A ratio to the original as it was loaded would flatter a speed: it is held to the fastest stock path.
            rival = item.baseline["value"] if item.baseline else item.before
            item.passed = within(metric(item.name).better, item.after, limit.bound(rival))
    return found


def sampling(source: Source, recipe: Recipe, batches: list[dict]):
    """A function that makes a whole sampling with a denoiser: the pipeline's, or the recorded one run again."""
    from compress.trajectory import pipeline_sampler, replay_sampler

    if source.pipeline is None:
        return replay_sampler(batches, source.original())
    section = recipe.validate_
    return pipeline_sampler(source, seed=recipe.seed + 1, batch=section.batch, length=section.length)


def speed(source: Source, batches: list[dict]) -> Measure:
    """The latency against the original as it was loaded and against the fastest stock path, in one run."""
    from compress.validate import CAST, castable, latency

    original = source.original()
    times, stock = latency(source.model, original, batches or [example(source.model)])
    left_out = CAST not in times and castable(original)
    note = "a cast to bfloat16 was left out: this processor cannot, or only emulates it" if left_out else ""
    (before, spread), (after, spread_after) = times["original"], times["compressed"]
    baseline = {"name": stock, "value": times[stock][0]}
    return Measure("latency", before, after, unit="ms", note=note, spread=[spread, spread_after], baseline=baseline)


def within(better: str, value: float, bound: float) -> bool:
    """Does the value keep the bound? A number that is none never does."""
    return value <= bound if better == "lower" else value >= bound


def gate(report: Report, force: bool) -> None:
    """A missed limit ends the run before anything is emitted, unless the user insists."""
    if report.missed and not force:
        told = "; ".join(f"{item.name} is {item.text('after')}, the limit is {item.limit}" for item in report.missed)
        raise LimitMissed(
            f"{report.recipe}: a limit was missed: {told} (nothing was emitted; "
            "another limit or --force goes on from the steps, which are kept)"
        )
