"""Bits under a budget: one choice for each layer with the least total cost, exactly (multiple-choice knapsack)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.errors import CompressError

EQUAL = 1e-12  # sums that differ by less differ by the order of adding


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
