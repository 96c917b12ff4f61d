"""The search of quantize.mixed: what all choices cost and weigh, the allocation, and its trial on held-out data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.allocation import CLOSE, Problem, Table, frontier
from compress.budgets import KEEP, Settings, operations, seconds, stored
from compress.data import rows as examples_in
from compress.errors import CompressError
from compress.measure import human
from compress.probing import Answers, instead
from compress.sensitivity import costs
from compress.view import View

if TYPE_CHECKING:
    from compress.transforms.quantize.mixed import Mixed

UNITS = {"size": "bytes", "bits": "bytes", "bops": "bit operations", "latency": "s"}
HELD = 4  # every so many batches one is held out
Make = Callable[[nn.Module, dict], nn.Module]


def units(layers: dict[str, nn.Module]) -> list[list[str]]:
    """The layers, those that share a weight together."""
    sharing = defaultdict(list)
    for path, module in layers.items():
        sharing[id(module.weight)].append(path)
    return list(sharing.values())


def planned(method: Mixed, layers: dict[str, nn.Module], make: Make) -> dict[str, dict]:
    """Edits within the budget without data: as if every weight's error cost the same."""
    settings = {path: method.settings(module) for path, module in layers.items()}
    guess = {
        path: {name: module.weight.numel() * expected(edit) for name, edit in settings[path].items()}
        for path, module in layers.items()
    }
    weights, budget = weighed(method, layers, settings, dict.fromkeys(layers, 1), make, measure=False)
    problem = Problem.of(units(layers), list(method.choices), guess, weights, budget)
    if not method.latency:  # which was guessed
        check(method, problem)
    return edits(settings, problem.by_path(problem.solve(max(budget, problem.smallest()))))


def check(method: Mixed, problem: Problem) -> None:
    """Refuse a budget that no allocation keeps."""
    if problem.smallest() > problem.budget * CLOSE:
        name = given(method)
        value = getattr(method, name)
        least = value * problem.smallest() / problem.budget
        raise CompressError(
            f"quantize.mixed: {name} is {value:g}, the smallest possible is {least:.4g} "
            f"with the choices {', '.join(problem.names)}"
        )


def given(method: Mixed) -> str:
    """The name of the budget."""
    return next(name for name in UNITS if getattr(method, name))


def expected(edit: dict | None) -> float:
    """The squared error of a weight as the number of bits alone tells it; activations add theirs."""
    return 0.0 if edit is None else 4.0 ** -edit["bits"] * (2 if "activations" in edit else 1)


def edits(settings: dict[str, Settings], chosen: dict[str, str]) -> dict[str, dict]:
    """The edits of a plan: layers that are kept have none."""
    return {path: edit for path, name in chosen.items() if (edit := settings[path][name]) is not None}


def weighed(
    method: Mixed, layers: dict[str, nn.Module], settings: dict[str, Settings], rows: dict[str, int], make: Make,
    measure: bool = True,
) -> tuple[Table, float]:  # fmt: skip
    """What each choice weighs in the unit of the budget, and the budget; time is guessed where nothing is measured."""
    settings = {path: own | {KEEP: None} for path, own in settings.items()}
    if method.bits or method.size:
        table = stored(layers, settings, make)
    elif method.latency and measure:
        table = seconds(layers, settings, rows, make)
    else:
        table = operations(layers, settings, rows)
    if method.bits:
        return table, method.bits * weights_in(layers) / 8
    if method.size and method.size > 1:
        return table, method.size
    return table, (method.size or method.bops or method.latency) * sum(own[KEEP] for own in table.values())


def weights_in(layers: dict[str, nn.Module]) -> int:
    """How many weights the layers have; shared ones count once."""
    return sum({id(module.weight): module.weight.numel() for module in layers.values()}.values())


def allocated(
    method: Mixed, view: View, layers: dict[str, nn.Module], seen: list[dict], held: list[dict], make: Make
) -> tuple[dict[str, dict], dict]:
    """The edits of the best allocation, or of the uniform one where that is better on held-out data, and the notes."""
    settings = {path: method.settings(module) for path, module in layers.items()}
    names = [name for name in method.choices if name != KEEP]

    def quantized(path: str, name: str) -> nn.Module:
        return make(layers[path], settings[path][name])

    found = costs(method.sensitivity, view, layers, names, quantized, seen, spread(seen, method.probe))
    table = {path: own | {KEEP: 0.0} for path, own in found.table.items()}
    silent = {path: "no calibration data reached it" for path in layers if path not in table}
    layers = {path: layers[path] for path in table}
    weights, budget = weighed(method, layers, settings, found.rows, make)
    problem = Problem.of(units(layers), list(method.choices), table, weights, budget)
    check(method, problem)
    tried = candidates(problem)
    measured = trial(view, {name: {p: quantized(p, c) for p, c in problem.by_path(chosen).items() if c != KEEP}
                            for name, chosen in tried.items()}, held)  # fmt: skip
    best = min(tried, key=lambda name: measured[name])
    chosen = problem.by_path(tried[best])
    told = outcome(layers, problem, stored(layers, settings, make), chosen) | {
        "by": method.sensitivity,
        "unit": UNITS[given(method)],
        "budget": budget,
        "points": {
            name: {"weight": problem.weight(way), "predicted": problem.cost(way), "measured": measured[name]}
            for name, way in tried.items()
        },
        "data": "held-out data" if held[0] is not seen[0] else "the calibration data itself",
        "taken": best,
    }
    coarsest = max(names, key=lambda name: sum(own[name] for own in table.values()))
    scores = {path: own[coarsest] for path, own in table.items()}
    notes = {"allocation": told, "remarks": [remark(told)], f"{method.sensitivity} at {coarsest}": scores}
    return edits(settings, chosen), notes | {"refused": silent}


def outcome(layers: dict[str, nn.Module], problem: Problem, sizes: Table, chosen: dict[str, str]) -> dict:
    """What every layer got, in words and in stored bits, and what other budgets would have given."""
    held = {path: sum(8 * sizes[p][chosen[p]] for p in unit) for unit in problem.units for path in unit}
    return {
        "choices": chosen,
        "bits": {path: bits / layers[path].weight.numel() for path, bits in held.items()},
        "average": 8 * sum(sizes[path][name] for path, name in chosen.items()) / weights_in(layers),
        "curve": list(map(list, frontier(problem.costs, problem.weights))),
    }


def apart(batches: list[dict]) -> tuple[list[dict], list[dict]]:
    """Batches to learn from, and others to judge by; a single one has to serve for both."""
    held = batches[HELD - 1 :: HELD] or batches[-1:]
    return [batch for batch in batches if not any(batch is other for other in held)] or batches, held


def remark(told: dict) -> str:
    """The outcome in one line."""
    counts = ", ".join(f"{number} {name}" for name, number in Counter(told["choices"].values()).most_common())

    def loss(point: dict) -> str:  # relevance foretells an order, no loss
        foretold = "" if told["by"] == "lrp" else f" (predicted {point['predicted']:.3g})"
        return f"{point['measured']:.3g}{foretold} at {human(point['weight'], told['unit'])}"

    losses = ", ".join(f"{name} {loss(point)}" for name, point in told["points"].items())
    return (
        f"{told['average']:.3g} bits a weight on average with scales ({counts}); loss on {told['data']}: {losses}; "
        f"taken: {told['taken']}"
    )


def candidates(problem: Problem) -> dict[str, list[int]]:
    """The allocation at the budget, the best uniform one, and the allocation at the size of that."""
    found = {"mixed": problem.solve(problem.budget)}
    if (uniform := problem.uniform()) is not None:
        name = f"uniform {problem.names[uniform[0]]}"
        found[name] = uniform
        if (equal := problem.solve(problem.weight(uniform))) not in found.values():
            found[f"mixed at the size of {name}"] = equal
    return found


@torch.no_grad()
def trial(view: View, replaced: dict[str, dict[str, nn.Module]], held: list[dict]) -> dict[str, float]:
    """How far the answers to the held-out batches are from the original's with all of a candidate's layers replaced."""
    found = dict.fromkeys(replaced, 0.0)
    for batch in held:
        answers = Answers.of(view.model, [batch])
        for name, built in replaced.items():
            with instead({view.module(path): layer.forward for path, layer in built.items()}):
                found[name] += answers.distance(view.model) / len(held)
    return found


def spread(batches: list[dict], examples: int) -> list[dict]:
    """As many batches, evenly over all, as hold so many examples."""
    count = min(len(batches), -(-examples // examples_in(batches[0])))
    return [batches[index * len(batches) // count] for index in range(count)]
