"""Choices of heads: counts, layouts, ties; any scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.selection import choose, edits, placeholder, unit_count, unit_scores
from compress.structure import Attention


def attention(heads: int, kv_heads: int, path: str = "a") -> Attention:
    return Attention(path, heads, kv_heads, 8, 8, "separate")


layers = st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=6), min_size=1, max_size=6)


@given(layers, st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_ragged_keeps_the_asked_share_and_at_least_one_of_each(scores, keep):
    named = {str(i): torch.tensor(score) for i, score in enumerate(scores)}
    kept = choose(named, keep, "ragged")
    total = sum(map(len, scores))
    assert sum(map(len, kept.values())) == max(len(scores), round(keep * total))
    assert all(kept[name] == sorted(set(kept[name])) and kept[name] for name in named)
    lowest = min((float(named[n][u]) for n in named for u in kept[n] if u != int(named[n].argmax())), default=None)
    dropped = [float(named[n][u]) for n in named for u in range(len(named[n])) if u not in kept[n]]
    if lowest is not None and dropped:
        assert max(dropped) <= lowest


@given(layers, st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_uniform_keeps_the_best_of_every_module(scores, keep):
    named = {str(i): torch.tensor(score) for i, score in enumerate(scores)}
    for name, units in choose(named, keep, "uniform").items():
        assert len(units) == max(1, round(keep * len(named[name])))
        rest = [float(value) for unit, value in enumerate(named[name]) if unit not in units]
        assert not rest or max(rest) <= min(float(named[name][unit]) for unit in units)


@pytest.mark.parametrize(("heads", "kv_heads", "unit", "units"), [
    (8, 8, "group", 8), (8, 2, "group", 2), (8, 2, "query", 4), (8, 1, "group", 8), (8, 8, "query", 1),
])  # fmt: skip
def test_units(heads, kv_heads, unit, units):
    at = attention(heads, kv_heads)
    assert unit_count(at, unit) == units
    assert unit_scores(torch.ones(3, heads), at, unit).shape == (3, units)
    assert unit_scores(torch.ones(heads), at, unit).sum() == heads


def test_a_group_is_scored_jointly():
    at = attention(4, 2)
    signed = torch.tensor([1.0, -1.0, 0.5, 0.5])  # two heads that stand in for each other, two that add up
    assert unit_scores(signed, at, "group").abs().tolist() == [0.0, 1.0]


def test_edits_name_only_what_changes():
    known = {"a": attention(4, 2, "a"), "b": attention(4, 2, "b")}
    assert edits(known, {"a": [0, 1], "b": [1]}, "group") == {"b": {"groups": [1], "queries": None}}
    assert edits(known, {"a": [0], "b": [0, 1]}, "query") == {"a": {"groups": [0, 1], "queries": [0]}}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_the_placeholder_cuts_evenly(keep):
    known = {str(i): attention(12, 12, str(i)) for i in range(4)}
    kept = choose(placeholder(known, "group"), keep, "ragged")
    assert max(map(len, kept.values())) - min(map(len, kept.values())) <= 1
