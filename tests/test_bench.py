"""The benchmark's own parts: turns, tables, packed layers, and recipes that can be read."""

from __future__ import annotations

import csv
from itertools import count
from pathlib import Path

import pytest
import torch

from models import MODELS

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "quantize").glob("*.yaml"))


@pytest.fixture(autouse=True)
def benches(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_ratios_are_taken_turn_by_turn():
    from benches.paired import paired

    now, slow = [0.0], count(1)

    def work(seconds):
        now[0] += seconds

    # The machine gets slower with every call of the first, and the second takes half of what the first just took.
    last = [0.0]

    def first():
        last[0] = float(next(slow))
        work(last[0])

    found = paired({"a": first, "b": lambda: work(last[0] / 2)}, rounds=7, seconds=1e-9, clock=lambda: now[0])
    assert found["a"].ratio == 1
    assert found["a"].spread == 0
    # In every second round b comes first and sees the time of the round before.
    assert 0.4 < found["b"].ratio <= 0.5
    assert found["b"].spread < 0.1


def test_a_table_keeps_what_was_not_measured(tmp_path):
    from benches.tables import update

    table = tmp_path / "new" / "table.csv"
    update(table, ["model", "batch", "ms"], [["a", "1", "3"], ["b", "1", "4"]], keys=2)
    update(table, ["model", "batch", "ms"], [["a", "1", "5"], ["a", "32", "6"]], keys=2, gone=("b",))
    with table.open(newline="") as file:
        assert list(csv.reader(file)) == [["model", "batch", "ms"], ["a", "1", "5"], ["a", "32", "6"]]


def test_a_packed_layer_answers_like_the_layer():
    from benches.stock import packed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 8, bias=False))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(packed(model)(x), expected)
        torch.testing.assert_close(packed(model)(x[:1]), expected[:1])


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    from benches.quantize import ready
    from benches.stock import contenders

    for name in ("torchao", "torchao.quantization", "openvino", "nncf"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    model = torch.nn.Linear(4, 4)
    makers = {name: make for name, make in contenders(model, []).items() if name.startswith(("torchao", "OpenVINO"))}
    calls, skipped = ready(makers)
    assert not calls
    assert skipped == ["torchao int8 compiled: pip install torchao", "OpenVINO int8 PTQ: pip install openvino nncf"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_benchmark_are_read(path):
    from benches.ours import model_of

    from compress.recipe import Recipe

    recipe = Recipe.read(path)
    assert recipe.calibrate
    assert recipe.validate_.limits
    assert model_of(path)[0].parent == ROOT / "models"


@pytest.mark.parametrize("name", ["bert", "llama", "dinov2"])
def test_contenders_for_heads_remove_as_many(name):
    from benches.heads import CONTENDERS

    from compress.outputs import run
    from compress.view import View

    for label, prune in CONTENDERS.items():
        model, batch = MODELS[name]()
        if label.startswith("Torch-Pruning"):  # a peer, which takes query heads where others take groups
            continue
        total = prune(model, 1, [batch])
        assert sum(at.kv_heads for at in View(model).attentions()) == total - 1
        assert run(model, batch).isfinite().all()


def test_torch_pruning_is_left_out_where_it_is_not_installed(monkeypatch, capsys):
    from benches.heads import torch_pruning

    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    model, batch = MODELS["llama"]()
    assert torch_pruning(model, 1, [batch]) is None
    assert "pip install --no-deps torch-pruning" in capsys.readouterr().out


def test_flap_puts_the_mean_of_what_goes_into_the_bias():
    from benches.heads import flap

    from compress.outputs import relative_error, run
    from compress.view import View

    model, batch = MODELS["dinov2"]()
    for at in View(model).attentions():
        View(model).module(at.v).weight.data[8:16] = 0  # one head of each writes the same everywhere
    before = run(model, batch)
    flap(model, 2, [batch])
    assert [at.heads for at in View(model).attentions()] == [3, 3]
    assert relative_error(run(model, batch), before) < 1e-5
