"""Bits under a budget: one choice for each layer with the least total cost, exactly (multiple-choice knapsack)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.errors import CompressError

EQUAL = 1e-12  # sums that differ by less differ by the order of adding


@dataclass(frozen=True)
class Ladder:
    """All layers at their smallest, and the steps up from there that gain the most for what they weigh, best first.

    Any number of whole steps is an optimal allocation for its own weight; what lies between bounds the others.
    """

    choices: list[int]
    weight: float
    cost: float
    steps: list[tuple[float, float, int, int]]  # weight added, cost added (negative), layer, choice

    def bound(self) -> tuple[np.ndarray, np.ndarray]:
        """Total weight and total cost after each step."""
        added = np.array([step[:2] for step in self.steps]).reshape(-1, 2)
        totals = np.vstack([[self.weight, self.cost], added]).cumsum(0)
        return totals[:, 0], totals[:, 1]


def allocate(costs: list[list[float]], weights: list[list[float]], budget: float) -> list[int]:
    """The choice of each layer with the least sum of costs whose sum of weights stays within the budget.

    Dynamic programming over the pairs (weight, cost) that no other pair beats on both sides. Pairs that cannot end
    better than a solution already known are dropped: fractions of choices bound what the layers to come can reach.
    """
    budget += EQUAL * abs(budget)
    known, least = _greedy(costs, weights, budget)
    weight, cost, trail = np.zeros(1), np.zeros(1), []
    for layer in range(len(costs)):
        rest, below = ladder(costs[layer + 1 :], weights[layer + 1 :]).bound()
        weight = np.add.outer(weight, np.asarray(weights[layer], float)).ravel()
        cost = np.add.outer(cost, np.asarray(costs[layer], float)).ravel()
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
    for layer in reversed(range(len(costs))):
        parent, choice = divmod(int(trail[layer][at]), len(costs[layer]))
        chosen.append(choice)
        at = parent
    return chosen[::-1]


def ladder(costs: list[list[float]], weights: list[list[float]]) -> Ladder:
    """The steps along the lower convex hull of every layer, sorted by gain for weight."""
    start, steps = [], []
    for layer, (cost, weight) in enumerate(zip(costs, weights, strict=True)):
        at = min(range(len(cost)), key=lambda choice: (weight[choice], cost[choice]))
        start.append(at)
        while True:
            better = [choice for choice in range(len(cost)) if cost[choice] < cost[at]]
            if not better:
                break
            slope = {choice: (cost[choice] - cost[at]) / (weight[choice] - weight[at]) for choice in better}
            up = min(better, key=lambda choice: (slope[choice], -weight[choice]))
            steps.append((slope[up], (weight[up] - weight[at], cost[up] - cost[at], layer, up)))
            at = up
    steps.sort(key=lambda step: step[0])
    lightest = sum(weight[choice] for weight, choice in zip(weights, start))
    total = sum(cost[choice] for cost, choice in zip(costs, start))
    return Ladder(start, lightest, total, [step for _, step in steps])


def frontier(costs: list[list[float]], weights: list[list[float]], points: int = 24) -> list[tuple[float, float]]:
    """At most so many optimal allocations from the smallest to the best, as (weight, cost)."""
    weight, cost = ladder(costs, weights).bound()
    picked = np.unique(np.linspace(0, len(weight) - 1, points).round().astype(int))
    return [(float(weight[index]), float(cost[index])) for index in picked]


def _greedy(costs: list[list[float]], weights: list[list[float]], budget: float) -> tuple[list[int], float]:
    """A good allocation: every step up that still fits, and its cost."""
    start = ladder(costs, weights)
    if start.weight > budget:
        raise CompressError(f"the budget is {budget:.6g}, the smallest possible is {start.weight:.6g}")
    choices, spent = list(start.choices), start.weight
    for _, _, layer, choice in start.steps:
        added = weights[layer][choice] - weights[layer][choices[layer]]
        if spent + added <= budget and costs[layer][choice] < costs[layer][choices[layer]]:
            choices[layer], spent = choice, spent + added
    return choices, sum(cost[choice] for cost, choice in zip(costs, choices))
