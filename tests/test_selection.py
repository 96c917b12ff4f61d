"""Choices of units: budgets, quotas, ties, pairs; any scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.parts import edits, heads_of, kept
from compress.selection import cheapest, placeholder, quotas, unit_count
from compress.structure import Attention


def attention(heads: int, kv_heads: int, path: str = "a") -> Attention:
    return Attention(path, heads, kv_heads, 8, 8, "separate")


layers = st.lists(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=6), min_size=1, max_size=6)


def chosen(scores, keep, layout):
    """The units that stay of each part, and those scores."""
    counts = [len(score) for score in scores]
    goal = sum(counts) - max(len(counts), round(keep * sum(counts))) if layout == "ragged" else sum(counts)
    alone = torch.tensor([value for score in scores for value in score])
    gone = cheapest(alone, None, counts, [1.0] * len(counts), quotas(counts, keep, layout), goal)
    parts = [heads_of(attention(count, count, str(at)), "group") for at, count in enumerate(counts)]
    return list(kept(parts, gone).values())


@given(layers, st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_ragged_keeps_the_asked_share_and_at_least_one_of_each(scores, keep):
    left = chosen(scores, keep, "ragged")
    assert sum(map(len, left)) == max(len(scores), round(keep * sum(map(len, scores))))
    assert all(left)
    dropped = [value for score, stay in zip(scores, left) for at, value in enumerate(score) if at not in stay]
    spare = [score[at] for score, stay in zip(scores, left) for at in stay if len(stay) > 1]
    assert not dropped or not spare or max(dropped) <= min(spare)


@given(layers, st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_uniform_keeps_the_best_of_every_part(scores, keep):
    for score, stay in zip(scores, chosen(scores, keep, "uniform"), strict=True):
        assert len(stay) == max(1, round(keep * len(score)))
        rest = [value for at, value in enumerate(score) if at not in stay]
        assert not rest or max(rest) <= min(score[at] for at in stay)


def test_a_unit_that_saves_more_may_cost_more():
    alone = torch.tensor([1.0, 2.0, 1.5, 4.0])
    assert cheapest(alone, None, [2, 2], [1.0, 2.0], [1, 1], 1) == [2]
    assert cheapest(alone, None, [2, 2], [1.0, 1.0], [1, 1], 1) == [0]
    assert cheapest(alone, None, [2, 2], [1.0, 1.0], [1, 1], 2, fixed=[0]) == [2, 1]


def test_of_twins_one_goes():
    together = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    alone = torch.tensor([1.0, 1.0, 3.0])
    assert sorted(cheapest(alone, together, [3], [1.0], [2], 2)) == [1, 2]
    assert sorted(cheapest(alone, None, [3], [1.0], [2], 2)) == [0, 1]


def test_what_is_gone_stays_gone():
    alone = torch.tensor([5.0, 1.0, 2.0])
    assert cheapest(alone, None, [3], [1.0], [2], 2, gone=[0]) == [0, 1]


@pytest.mark.parametrize(("heads", "kv_heads", "unit", "units"), [
    (8, 8, "group", 8), (8, 2, "group", 2), (8, 2, "query", 4), (8, 1, "group", 8), (8, 8, "query", 1),
])  # fmt: skip
def test_units(heads, kv_heads, unit, units):
    at = attention(heads, kv_heads)
    part = heads_of(at, unit)
    assert unit_count(at, unit) == part.count == units
    assert part.fold(torch.ones(3, heads * 8)).tolist() == [[8 * heads / units] * units] * 3
    assert part.fold_heads(torch.ones(heads)).sum() == heads


def test_a_group_is_scored_jointly():
    signed = torch.tensor([1.0, -1.0, 0.5, 0.5])  # two heads that stand in for each other, two that add up
    assert heads_of(attention(4, 2), "group").fold_heads(signed).abs().tolist() == [0.0, 1.0]
    assert heads_of(attention(4, 2), "query").fold_heads(signed).tolist() == [1.5, -0.5]


def test_edits_name_only_what_changes():
    known = {"a": attention(4, 2, "a"), "b": attention(4, 2, "b")}
    groups, queries = ([heads_of(at, unit) for at in known.values()] for unit in ("group", "query"))
    assert edits(groups, {"a": [0, 1], "b": [1]}) == {"b": {"groups": [1], "queries": None}}
    assert edits(queries, {"a": [0], "b": [0, 1]}) == {"a": {"groups": [0, 1], "queries": [0]}}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_the_placeholder_cuts_evenly(keep):
    values = placeholder([12] * 4).split(12)
    left = chosen([value.tolist() for value in values], keep, "ragged")
    assert max(map(len, left)) - min(map(len, left)) <= 1
