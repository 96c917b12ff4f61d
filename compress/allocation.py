"""Bits under a budget: one choice for each layer with the least total cost, exactly (multiple-choice knapsack)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.errors import CompressError

Table = dict[str, dict[str, float]]  # path -> choice -> number
EQUAL = 1e-12  # sums that differ by less differ by the order of adding


CLOSE = 1 + 1e-9


@dataclass(frozen=True)
class Problem:
    """A knapsack over units of layers, each unit with one choice for all its layers."""

    units: list[list[str]]  # the paths of the layers
    names: list[str]  # of the choices
    costs: list[list[float]]
    weights: list[list[float]]
    budget: float

    @classmethod
    def of(cls, units: list[list[str]], names: list[str], costs: Table, weights: Table, budget: float) -> Problem:
        """From tables that tell for each path what each choice costs and weighs."""
        sums = [[[sum(t[path][name] for path in unit) for name in names] for unit in units] for t in (costs, weights)]
        return cls(units, names, *sums, budget)

    def solve(self, budget: float) -> list[int]:
        """The best choice of each unit within a budget."""
        return allocate(self.costs, self.weights, budget)

    def uniform(self) -> list[int] | None:
        """The best of the allocations with one choice for all that keep the budget, if any does."""
        every = [[choice] * len(self.units) for choice in range(len(self.names))]
        fitting = [chosen for chosen in every if self.weight(chosen) <= self.budget * CLOSE]
        return min(fitting, key=self.cost, default=None)

    def smallest(self) -> float:
        """What the least possible weighs."""
        return sum(min(row) for row in self.weights)

    def weight(self, chosen: list[int]) -> float:
        return sum(row[choice] for row, choice in zip(self.weights, chosen, strict=True))

    def cost(self, chosen: list[int]) -> float:
        return sum(row[choice] for row, choice in zip(self.costs, chosen, strict=True))

    def by_path(self, chosen: list[int]) -> dict[str, str]:
        """The name of each layer's choice."""
        return {path: self.names[choice] for unit, choice in zip(self.units, chosen, strict=True) for path in unit}


@dataclass(frozen=True)
class Ladder:
    """All layers at their smallest, and the steps up from there, those first that gain the most for what they weigh.

    The steps of a layer lead along the lower convex hull of its choices. Any number of first steps is an optimal
    allocation for its own weight; what lies between two of them bounds all others.
    """

    start: list[int]
    steps: list[tuple[int, int]]  # layer, choice
    layer: np.ndarray
    weight: np.ndarray  # that a step adds
    cost: np.ndarray  # that a step adds: negative

    def bound(self, lightest: np.ndarray, dearest: np.ndarray, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Total weight and cost of the layers from `first` on after each of their steps."""
        mine = self.layer >= first
        weight = np.r_[lightest[first:].sum(), self.weight[mine]].cumsum()
        return weight, np.r_[dearest[first:].sum(), self.cost[mine]].cumsum()


def allocate(costs: list[list[float]], weights: list[list[float]], budget: float) -> list[int]:
    """The choice of each layer with the least sum of costs whose sum of weights stays within the budget.

    Dynamic programming over the pairs (weight, cost) that no other pair beats on both sides. Pairs that cannot end
    better than a solution already known are dropped: fractions of choices bound what the layers to come can reach.
    """
    budget += EQUAL * abs(budget)
    up = ladder(costs, weights)
    known = _greedy(up, costs, weights, budget)
    least = sum(row[choice] for row, choice in zip(costs, known))
    ends = _ends(up, costs, weights)
    weight, cost, trail = np.zeros(1), np.zeros(1), []
    for index in range(len(costs)):
        rest, below = up.bound(*ends, index + 1)
        weight = np.add.outer(weight, np.asarray(weights[index], float)).ravel()
        cost = np.add.outer(cost, np.asarray(costs[index], float)).ravel()
        order = np.lexsort((cost, weight))
        best = np.minimum.accumulate(cost[order])
        order = order[np.r_[True, best[1:] < best[:-1]]]
        room = budget - weight[order]
        hopeful = cost[order] + np.interp(room, rest, below) < least - EQUAL * abs(least)
        order = order[hopeful & (room >= rest[0])]
        if not len(order):
            return known  # nothing can beat it
        weight, cost = weight[order], cost[order]
        trail.append(order)
    at, chosen = int(cost.argmin()), []
    for row, order in zip(costs[::-1], trail[::-1]):
        at, choice = divmod(int(order[at]), len(row))
        chosen.append(choice)
    return chosen[::-1]


def frontier(costs: list[list[float]], weights: list[list[float]], points: int = 24) -> list[tuple[float, float]]:
    """At most so many optimal allocations from the smallest to the best, as (weight, cost)."""
    up = ladder(costs, weights)
    weight, cost = up.bound(*_ends(up, costs, weights))
    picked = np.unique(np.linspace(0, len(weight) - 1, points).round().astype(int))
    return [(float(weight[index]), float(cost[index])) for index in picked]


def ladder(costs: list[list[float]], weights: list[list[float]]) -> Ladder:
    """The ladder of these layers."""
    start, steps = [], []
    for layer, (cost, weight) in enumerate(zip(costs, weights, strict=True)):
        at = min(range(len(cost)), key=lambda choice: (weight[choice], cost[choice]))
        start.append(at)
        while better := [choice for choice in range(len(cost)) if cost[choice] < cost[at]]:
            slopes = {up: (cost[up] - cost[at]) / (weight[up] - weight[at]) for up in better}
            up = min(better, key=lambda choice: (slopes[choice], -weight[choice]))
            steps.append((slopes[up], layer, up, weight[up] - weight[at], cost[up] - cost[at]))
            at = up
    steps.sort(key=lambda step: step[0])
    layer, weight, cost = (np.array([step[column] for step in steps]) for column in (1, 3, 4))
    return Ladder(start, [step[1:3] for step in steps], layer, weight, cost)


def _ends(up: Ladder, costs: list[list[float]], weights: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Weight and cost of each layer at its smallest."""
    return tuple(np.array([row[choice] for row, choice in zip(table, up.start)]) for table in (weights, costs))


def _greedy(up: Ladder, costs: list[list[float]], weights: list[list[float]], budget: float) -> list[int]:
    """A good allocation: every step up that still fits."""
    choices = list(up.start)
    spent = sum(row[choice] for row, choice in zip(weights, choices))
    if spent > budget:
        raise CompressError(f"the budget is {budget:.6g}, the smallest possible is {spent:.6g}")
    for layer, choice in up.steps:
        added = weights[layer][choice] - weights[layer][choices[layer]]
        if spent + added <= budget and costs[layer][choice] < costs[layer][choices[layer]]:
            choices[layer], spent = choice, spent + added
    return choices
