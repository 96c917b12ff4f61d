"""How many tokens each block should merge, and by what they are compared: found on data, without labels.

All that is tried costs the same operations, but for importance, which has to be worth its own; what changes the model's
answers least wins. A few shapes of the schedule come first (from which block on, rising or falling), then each block's
share is raised and lowered once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import nn

from compress.errors import CompressError
from compress.flops import count
from compress.nn.token_match import Rule
from compress.outputs import run
from compress.probing import Answers
from compress.quick import quick_products
from compress.transform import Plan
from compress.view import View

METRICS = ("features", "keys", "both")
SCORES = {"class": "class_attention", "received": "received", "values": "value_aware"}  # by importance
AS_WELL = ("received",)  # without a class token
SLOPES = (-1.0, 0.0, 1.0, 2.0)  # powers of the distance from the first merging block
MOST = 0.5  # of a block's tokens
STEPS = 8  # at most, to the strength of a schedule that keeps to the budget
NEAR = 0.002  # of the operations below the budget is near enough
SEARCH = 2**14  # tokens, of images 64 each counts as 256
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the operations, at which a budget of time looks
ROUNDS, SECONDS = 7, 1.0  # of that
WORTH = 0.9  # of the error without importance: to ask for it costs time in every block
RAISE = 1.6  # by which one block's share is raised and lowered


@dataclass
class Trial:
    """A copy of the model that shares its weights and merges tokens as it is told."""

    model: nn.Module
    paths: list[str]
    answers: Answers
    row: dict
    whole: int  # operations of the original on that row

    @classmethod
    @quick_products()
    def of(cls, view: View, edits: dict[str, dict], batches: list[dict], apply: Callable[[View, Plan], None]) -> Trial:
        model = sharing(view.model, edits, apply)
        row = {name: value[:1] for name, value in batches[0].items()}
        return cls(model, list(edits), Answers.of(view.model, batches), row, count(view.model, row))

    @quick_products()
    def error(self, edits: dict[str, dict]) -> float:
        """How far the answers are off under these rules."""
        return self.answers.off(self.following(edits))

    def share(self, edits: dict[str, dict]) -> float:
        """The part of the operations that is left under these rules."""
        return count(self.following(edits), self.row) / self.whole

    def following(self, edits: dict[str, dict]) -> nn.Module:
        """The model, which now merges by these rules."""
        for path in self.paths:
            self.model.get_submodule(path).merge.rule = Rule(**edits[path]["rule"])
        return self.model


def sharing(original: nn.Module, edits: dict[str, dict], apply: Callable[[View, Plan], None]) -> nn.Module:
    """A copy of the model with these edits that shares its weights."""
    tensors = [*original.parameters(), *original.buffers()]
    model = copy.deepcopy(original, {id(tensor): tensor for tensor in tensors})
    apply(View(model), Plan(edits))
    return model


def share_within(trial: Trial, original: nn.Module, edits: dict[str, dict], budget: float, batch: dict) -> float:
    """The part of the operations that can stay where this part of the time may, by the times of plain schedules."""
    from compress_kernels.timing import paired

    plans = {share: plain(trial, edits, share) for share in SHARES}
    plans = {share: plan for share, plan in plans.items() if plan} or {SHARES[0]: within(trial, edits, SHARES[0])}
    calls = {share: partial(timed, trial, plan, batch) for share, plan in plans.items()}
    times = paired({1.0: partial(run, original, batch)} | calls, rounds=ROUNDS, seconds=SECONDS)
    points = [(share, seconds / times[1.0]) for share, seconds in times.items() if share < 1]
    for (more, slow), (less, fast) in pairwise([(1.0, max(1.0, points[0][1])), *points]):
        if fast <= budget:
            return less + (more - less) * min(1.0, max(0.0, (budget - fast) / max(slow - fast, 1e-9)))
    least = min(ratio for _, ratio in points)
    raise CompressError(f"tokens.merge: latency is {budget:.3g}, it must be at least {least:.3g} for this model here")


def timed(trial: Trial, edits: dict[str, dict], batch: dict) -> None:
    """One forward with these rules."""
    run(trial.following(edits), batch)


def choose_metric(trial: Trial, edits: dict[str, dict]) -> tuple[dict[str, dict], dict[str, float]]:
    """By what tokens are best compared, and the error of each."""
    tried = {metric: trial.error(changed(edits, {"metric": metric})) for metric in METRICS}
    return changed(edits, {"metric": min(tried, key=tried.get)}), tried


def choose_importance(
    view: View, edits: dict[str, dict], batches: list[dict], apply: Callable[[View, Plan], None]
) -> tuple[dict[str, dict], dict[str, float]]:
    """By what attention makes tokens costlier to merge, if that is worth its time, and the error of each."""
    first = all(edit["rule"]["first"] for edit in edits.values())
    scores = {name: score for name, score in SCORES.items() if first or name in AS_WELL}
    plans = {"none": edits}
    for name, score in scores.items():
        plans[name] = {path: edit | {"score": score} for path, edit in changed(edits, {"importance": name}).items()}
    tried = {name: Trial.of(view, each, batches, apply).error(each) for name, each in plans.items()}
    best = min(tried, key=tried.get)
    return plans[best if tried[best] <= WORTH * tried["none"] else "none"], tried


def within(trial: Trial, edits: dict[str, dict], budget: float) -> dict[str, dict]:
    """A plain schedule that leaves this part of the operations."""
    if (found := plain(trial, edits, budget)) is not None:
        return found
    least = trial.share(with_ratios(edits, [MOST] * len(edits)))
    raise CompressError(f"tokens.merge: flops is {budget:.3g}, it must be at least {least:.3g} for this model")


def plain(trial: Trial, edits: dict[str, dict], budget: float) -> dict[str, dict] | None:
    """The same, even or falling where that is not enough; None where neither is."""
    even, falling = (ramp(len(edits), 0, slope) for slope in (0.0, -1.0))
    return scaled(trial, edits, even, budget) or scaled(trial, edits, falling, budget)


def choose_ratios(trial: Trial, edits: dict[str, dict], budget: float) -> tuple[dict[str, dict], list[dict]]:
    """The best schedule that leaves this part of the operations, and all that were tried."""
    number, tried = len(edits), []

    def attempt(weights: list[float]) -> float:
        found = scaled(trial, edits, weights, budget)
        if found is None:
            return float("inf")
        error = trial.error(found)
        tried.append({"ratios": [edit["rule"]["ratio"] for edit in found.values()], "error": error})
        return error

    starts = sorted({0, 1, number // 4, number // 2} & set(range(number)))
    shapes = [ramp(number, start, slope) for start in starts for slope in SLOPES]
    errors = [attempt(shape) for shape in shapes]
    best, error = shapes[errors.index(min(errors))], min(errors)
    for at in range(number):
        for factor in (RAISE, 1 / RAISE):
            other = [*best[:at], (best[at] or min(filter(None, best))) * factor, *best[at + 1 :]]
            if (found := attempt(other)) < error:
                best, error = other, found
    return with_ratios(edits, min(tried, key=lambda one: one["error"])["ratios"]), tried


def ramp(number: int, start: int, slope: float) -> list[float]:
    """Weights of so many blocks: none before the start, from there on a power of the distance."""
    return [float(at - start + 1) ** slope if at >= start else 0.0 for at in range(number)]


def scaled(trial: Trial, edits: dict[str, dict], weights: list[float], budget: float) -> dict[str, dict] | None:
    """The weakest schedule of this shape within the budget, nearly; None where the strongest is not."""

    def schedule(strength: float) -> tuple[dict[str, dict], float]:
        ratios = with_ratios(edits, [min(MOST, round(strength * weight, 6)) for weight in weights])
        return ratios, trial.share(ratios)

    low, more, high = 0.0, 1.0, MOST / min(filter(None, weights))
    found, less = schedule(high)
    if less > budget:
        return None
    for _ in range(STEPS):
        if budget - less <= NEAR:
            break
        part = (more - budget + NEAR / 2) / max(more - less, NEAR)
        middle = low + (high - low) * min(0.9, max(0.1, part))
        ratios, share = schedule(middle)
        if share <= budget:
            high, less, found = middle, share, ratios
        else:
            low, more = middle, share
    return found


def with_ratios(edits: dict[str, dict], ratios: list[float]) -> dict[str, dict]:
    """The same rules with these shares."""
    pairs = zip(edits.items(), ratios, strict=True)
    return {path: edit | {"rule": edit["rule"] | {"ratio": ratio, "r": None}} for (path, edit), ratio in pairs}


def changed(edits: dict[str, dict], rule: dict) -> dict[str, dict]:
    """The same edits with something changed in all rules."""
    return {path: edit | {"rule": edit["rule"] | rule} for path, edit in edits.items()}
