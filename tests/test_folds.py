"""Folds: exact in float64 on every model, found where they are expected, refused where another layer reads along."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from compress.folds import find_folds, fold
from compress.outputs import relative_error, run
from compress.transforms.tokens.merge import Merge
from compress.view import View
from models import MODELS, MORE

SINGLE = ("gemma", "cohere", "qwen3_moe")  # their norms or routers compute in float32 whatever comes in


def factors(places, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [0.3 + 3 * torch.rand(place.channels, generator=generator, dtype=torch.float64) for place in places]


def wide(batch: dict) -> dict:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("name", [*MODELS, "gemma", "cohere", "phi3", "falcon", "qwen3_moe", "albert", "bloom", "sana"])
def test_every_fold_is_exact_and_finding_it_changes_nothing(name):
    model, batch = (MODELS | MORE)[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    places = find_folds(View(model), batch)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    double, inputs = copy.deepcopy(model), batch
    if name != "qwen3_moe":  # grouped products of experts know no float64
        double, inputs = double.double(), wide(batch)
    with torch.no_grad():
        expected = run(double, inputs)
        for place, factor in zip(places, factors(places), strict=True):
            fold(View(double), place, factor)
        assert relative_error(run(double, inputs), expected) < (1e-6 if name in (*SINGLE, "sana") else 1e-13)
        if places:  # what is left out of a fold shows
            first = double.get_submodule(places[0].consumers[0]).weight
            first.copy_(first * 1.1)
            assert relative_error(run(double, inputs), expected) > 1e-6


FOUND = {
    "llama": {"norm": 5, "value": 2, "up": 2},
    "gpt2": {"norm": 4, "value": 2},  # a fused projection, GELU, and a final norm before a tied head
    "opt": {"norm": 4, "value": 2, "up": 2},  # ReLU lets a positive factor through
    "bert": {"norm": 1, "value": 2},  # norms before a residual stay, but for the one inside the head
    "t5": {"norm": 11, "value": 6, "up": 4},
    "gemma": {"norm": 4, "value": 2, "up": 2},
    "phi3": {"norm": 5, "value": 2, "up": 2},
    "unet2d": {"norm": 7, "value": 7},
    "qwen3_moe": {"norm": 3, "value": 2},
}


@pytest.mark.parametrize("name", FOUND)
def test_they_are_found_where_they_are(name):
    model, batch = (MODELS | MORE)[name]()
    assert Counter(place.kind for place in find_folds(View(model), batch)) == FOUND[name]


def test_a_group_of_query_heads_shares_the_factor_of_its_values():
    model, batch = MODELS["llama"]()
    place = next(place for place in find_folds(View(model), batch) if place.kind == "value")
    assert (place.channels, place.repeat, place.size) == (16, 2, 8)
    factor = torch.arange(16.0)
    spread = place.spread(factor, 32)
    assert torch.equal(spread, torch.cat([factor[:8], factor[:8], factor[8:], factor[8:]]))
    assert torch.equal(place.narrow(spread), factor)
    assert torch.equal(place.spread(factor, 35)[32:], torch.ones(3))


def test_the_weight_of_a_norm_that_adds_one_is_stored_less_one():
    model, batch = MORE["gemma"]()
    places = [place for place in find_folds(View(model), batch) if place.kind == "norm"]
    assert places and all(place.offset == 1 for place in places)


class Net(nn.Module):
    """A norm that two layers read, of which one may not run, share its weight or let the norm pass by."""

    def __init__(self, kind: str):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.kind = kind
        if kind in ("idle", "shared"):
            self.spare = nn.Linear(8, 8)
        if kind == "shared":
            self.spare.weight = self.two.weight

    def forward(self, x):
        y = self.norm(x)
        out = self.one(y) + self.two(y.view(-1, 8)).view_as(y)
        if self.kind == "shared":
            return out + self.spare(x)
        if self.kind == "twice":
            return out + self.one(x)
        return out + y if self.kind == "residual" else out


@pytest.mark.parametrize("kind", ["residual", "shared", "twice", "idle"])
def test_what_is_not_exact_is_left_out(kind):
    assert find_folds(View(Net(kind).eval()), {"x": torch.randn(3, 5, 8)}) == []


def test_a_view_of_the_norm_counts():
    net = Net("plain").eval()
    (place,) = find_folds(View(net), {"x": torch.randn(3, 5, 8)})
    assert (place.producer, place.consumers, place.kind) == ("norm", ("one", "two"), "norm")


def test_answers_that_are_not_finite_prove_nothing():
    net = Net("plain").eval()
    with torch.no_grad():
        net.one.weight[0, 0] = torch.nan
    assert find_folds(View(net), {"x": torch.randn(3, 5, 8)}) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_finds_the_same(dtype):
    model, batch = MODELS["llama"]()
    assert find_folds(View(model.to(dtype)), batch) == find_folds(View(model.float()), batch)


def test_a_norm_before_which_tokens_merge_folds_as_ever():
    """Its hook would merge again what it is tried with."""
    model, batch = MODELS["vit"]()
    stock = {(fold.producer, fold.kind) for fold in find_folds(View(model), batch)}
    view, method = View(model), Merge(ratio=0.3, metric="keys")
    method.apply(view, method.plan(view))
    found = {(fold.producer, fold.kind) for fold in find_folds(View(model), batch)}
    assert found == stock and any("layernorm_after" in producer for producer, _ in found)
