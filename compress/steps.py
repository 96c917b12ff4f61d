"""The steps of a recipe on one model: plan -> calibrate -> apply, with a ledger of what each did."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from fnmatch import fnmatchcase

import numpy
import torch
from torch import Tensor, nn

from compress.emit import probe_inputs, tensor_bytes, weight_count
from compress.errors import CompressError, did_you_mean, one_of
from compress.flops import count
from compress.journal import Journal
from compress.outputs import relative_error, run
from compress.progress import say
from compress.recipe import Recipe, Step
from compress.replay import record, replay
from compress.resuming import Trainings
from compress.source import Source
from compress.transform import Plan, Transform, find
from compress.view import View

# How far removing a part may be from masking it: rounding, summed over the layers of a deep model.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def run_steps(
    source: Source, recipe: Recipe, batches: list[dict], sample: dict | None, journal: Journal | None
) -> list[dict]:
    """Run all steps, going on after those that the journal holds; returns their rows (record and ledger).

    `batches` calibrate; the ledger's error is taken on `sample`, not among them where there is validation data.
    """
    rows = list(journal.steps) if journal else []
    if rows:
        say(f"going on after step {len(rows)} ({rows[-1]['record']['use']})")
        replay(source.model, [row["record"] for row in rows])
        journal.restore(source.model)
    probe = probe_inputs(source.model, sample, tokens=128)
    with torch.no_grad():
        reference = run(source.original() if rows else source.model, probe)  # a second model is memory
    for number, step in enumerate(recipe.steps):
        if number < len(rows):
            continue
        say(f"step {number + 1} of {len(recipe.steps)}: {step.use}")
        seed_everything(recipe.seed + number)
        trainings = Trainings(*journal.training(number)) if journal else None
        row = run_step(source.model, step, batches, rows, probe, trainings)
        row["ledger"] |= standing(source.model, probe, reference)
        rows.append(row)
        if journal:
            journal.add(source.model, row)
    return rows


def run_step(
    model: nn.Module, step: Step, batches: list[dict], before: list[dict], probe: dict, trainings: Trainings | None
) -> dict:
    """One step on the model; a step that changes nothing is an error, and so is surgery that is not exact."""
    started = time.monotonic()
    plan = planned(model, step, before)
    if step.method.needs_data and not batches:
        raise CompressError(f"{step.where}: {step.use} looks at data; give the recipe a calibrate section")
    if step.method.needs_data or (step.method.uses_data and batches):
        plan = step.method.calibrate(View(model, trainings), plan, batches)
        if not plan.edits:
            raise CompressError(f"{step.where}: {step.use} changed nothing on this data")
    kept, notes = record(model, step.use, plan), plan.notes | idle(model, step.method)
    masked = answer_when_masked(model, step.method, plan, probe)
    model.compressed_by = step.use  # a second run on this object would not know of the first
    step.method.apply(View(model), plan)
    if masked is not None:
        check_exact(model, step, plan, probe, masked)
    ledger = {
        "use": step.use,
        "options": step.method.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "modules": list(plan.edits),
        "notes": notes,
        "seconds": time.monotonic() - started,
    }
    return {"record": kept, "ledger": ledger}


@torch.no_grad()
def answer_when_masked(model: nn.Module, method: Transform, plan: Plan, probe: dict) -> Tensor | None:
    """What the model answers when that which is to go is masked instead; the model is left as it was."""
    before = dict(model.named_parameters())  # masking puts other tensors in their place
    try:
        return run(model, probe) if method.mask(View(model), plan) else None
    finally:
        for name, parameter in before.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, parameter)


@torch.no_grad()
def check_exact(model: nn.Module, step: Step, plan: Plan, probe: dict, masked: Tensor) -> None:
    """Refuse a step after which the model does not answer as it did with the same parts masked."""
    try:
        error = relative_error(run(model, probe), masked)
    except (RuntimeError, ValueError, TypeError, IndexError):  # the forward cannot work with what is left
        error = math.inf
    if not error <= EXACT[masked.dtype]:
        raise CompressError(
            f"{step.where}: {step.use} is not exact on this model: removing and masking differ by {error:.2g}, at most "
            f"{EXACT[masked.dtype]:g} is rounding; leave out the culprit among {one_of(plan.edits, 6)} with except"
        )


def planned(model: nn.Module, step: Step, before: list[dict]) -> Plan:
    """The step's plan, refused when it takes nothing or takes again what cannot be taken twice."""
    plan = step.method.plan(View(model))
    if not plan.edits:
        reasons = [f"{path} ({why})" for path, why in plan.notes.get("refused", {}).items()]
        why = f"; refused: {one_of(reasons, 3)}" if reasons else ""
        raise CompressError(f"{step.where}: {step.use} matched nothing that it would change{why}")
    family = step.use.split(".")[0]
    for row in before:
        again = set(row["ledger"]["modules"]) & set(plan.edits)
        closed = family != "heads" and not find(row["record"]["use"]).prepares
        if again and closed and row["record"]["use"].split(".")[0] == family:
            raise CompressError(
                f"{step.where}: {step.use} takes {one_of(sorted(again), 2)}, which {row['record']['use']} already "
                "took; keep them apart with only and except"
            )
    return plan


def idle(model: nn.Module, method: Transform) -> dict[str, list[str]]:
    """A note of the globs that name no module: what they were to take or to spare may be called otherwise."""
    paths = [path for path, _ in model.named_modules()]
    found = [
        f"{key} {glob}{did_you_mean(glob, paths)}"
        for key, globs in (("only", method.only), ("except", method.skip))
        for glob in globs
        if not any(fnmatchcase(path, glob) for path in paths)
    ]
    return {"idle": found} if found else {}


def standing(model: nn.Module, probe: dict, reference: Tensor | None) -> dict:
    """How the model stands: parameters, bytes, FLOPs on the probe, relative error of its answers."""
    facts = {
        "parameters": weight_count(model),
        "bytes": tensor_bytes(model),
        "flops": count(model, probe),
        "error": None,
    }
    if reference is not None:
        with torch.no_grad():
            facts["error"] = relative_error(run(model, probe), reference)
    return facts


def seed_everything(seed: int) -> None:
    """The same random numbers for a step whether the run was interrupted before it or not."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def plan_steps(source: Source, recipe: Recipe, peak: Callable[[nn.Module, dict], int]) -> list[dict]:
    """Plan every step on an empty model: what it takes and how the model would stand after it."""
    probe = probe_inputs(source.model, None)
    rows = [{"ledger": {"use": "as it is", "modules": [], **standing(source.model, probe, None)}}]
    rows[0]["ledger"]["memory"] = peak(source.model, probe)
    for step in recipe.steps:
        before = [row for row in rows if "record" in row]
        plan = planned(source.model, step, before)
        kept, notes = record(source.model, step.use, plan), plan.notes | idle(source.model, step.method)
        step.method.apply(View(source.model), plan)
        ledger = {"use": step.use, "modules": list(plan.edits), "notes": notes}
        ledger |= standing(source.model, probe, None) | {"memory": peak(source.model, probe)}
        rows.append({"record": kept, "ledger": ledger})
    return rows
