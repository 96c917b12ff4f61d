"""Allocation: exact against brute force and scipy's MILP, monotone, never over the budget, uniform where it should."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.allocation import allocate, frontier
from compress.errors import CompressError

NUMBER = st.one_of(st.integers(0, 9).map(float), st.integers(0, 9999).map(lambda number: number / 1000))


@st.composite
def problems(draw):
    count = draw(st.integers(1, 3))
    rows = st.lists(st.lists(NUMBER, min_size=count, max_size=count), min_size=1, max_size=6)
    costs = draw(rows)
    weights = [draw(st.lists(NUMBER, min_size=count, max_size=count)) for _ in costs]
    low, high = sum(map(min, weights)), sum(map(max, weights))
    return costs, weights, low + draw(st.integers(0, 110)) / 100 * (high - low)


def total(table, chosen):
    return sum(row[choice] for row, choice in zip(table, chosen))


def by_hand(costs, weights, budget):
    ways = zip(map(sum, itertools.product(*costs)), map(sum, itertools.product(*weights)))
    return min(cost for cost, weight in ways if weight <= budget + 1e-9)


@settings(deadline=None, max_examples=200)
@given(problems())
def test_it_is_the_best_of_all_ways_within_the_budget(problem):
    costs, weights, budget = problem
    chosen = allocate(costs, weights, budget)
    assert total(weights, chosen) <= budget + 1e-9
    assert total(costs, chosen) == pytest.approx(by_hand(costs, weights, budget), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(problems())
def test_it_agrees_with_integer_programming(problem):
    optimize = pytest.importorskip("scipy.optimize")
    import numpy as np

    costs, weights, budget = problem
    count = len(costs[0])
    one_each = np.kron(np.eye(len(costs)), np.ones(count))
    found = optimize.milp(
        np.ravel(costs),
        integrality=np.ones(len(costs) * count),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(np.ravel(weights), -np.inf, budget),
        ],
        options={"mip_rel_gap": 0},
    )
    assert total(costs, allocate(costs, weights, budget)) == pytest.approx(found.fun, rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(problems(), st.floats(0, 5))
def test_more_budget_is_never_worse(problem, more):
    costs, weights, budget = problem
    less, richer = (total(costs, allocate(costs, weights, limit)) for limit in (budget, budget + more))
    assert richer <= less + 1e-9


@given(st.integers(1, 40), st.integers(0, 4))
def test_equal_layers_get_equal_bits(layers, at):
    bits = [2, 3, 4, 6, 8]
    costs, weights = [[4.0**-bit for bit in bits]] * layers, [[float(bit) for bit in bits]] * layers
    assert allocate(costs, weights, layers * bits[at]) == [at] * layers


def test_an_impossible_budget_is_told_with_the_smallest_possible():
    with pytest.raises(CompressError, match="budget is 4, the smallest possible is 5"):
        allocate([[1.0, 0.0], [1.0, 0.0]], [[2.0, 9.0], [3.0, 9.0]], 4)


def test_hundreds_of_layers_are_solved_exactly():
    import random

    draw = random.Random(0)
    sizes = [draw.choice([576 * 576, 576 * 192, 576 * 1536]) for _ in range(300)]
    costs = [[draw.lognormvariate(0, 2) * size * 4.0**-bit for bit in (2, 3, 4, 6, 8)] for size in sizes]
    weights = [[size * bit / 8 for bit in (2, 3, 4, 6, 8)] for size in sizes]
    budget = sum(sizes) * 4.5 / 8
    chosen = allocate(costs, weights, budget)
    curve = frontier(costs, weights, 10**6)
    assert total(weights, chosen) <= budget
    below = [cost for weight, cost in curve if weight <= budget]
    above = [cost for weight, cost in curve if weight >= budget]
    assert above[0] <= total(costs, chosen) <= below[-1]


@settings(deadline=None, max_examples=60)
@given(problems())
def test_every_point_of_the_curve_is_optimal(problem):
    costs, weights, _ = problem
    curve = frontier(costs, weights)
    assert [weight for weight, _ in curve] == sorted(weight for weight, _ in curve)
    for weight, cost in curve:
        assert cost == pytest.approx(by_hand(costs, weights, weight), rel=1e-6, abs=1e-6)
