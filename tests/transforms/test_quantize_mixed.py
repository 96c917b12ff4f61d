"""quantize.mixed: budgets are kept to the byte, mixed is held against uniform, impossible wishes are refused."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress.errors import CompressError
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.outputs import relative_error, run
from compress.transforms.quantize.mixed import Mixed
from compress.view import View
from models import MODELS, MORE, HalfUsed


def applied(model, batches, **options):
    method, view = Mixed(**{"solver": "rtn"} | options), View(model.eval())
    plan = method.calibrate(view, method.plan(view), batches)
    method.apply(view, plan)
    return plan


def held(model):
    """Bytes of the quantized layers' weights and how many weights they have."""
    size = count = 0
    for module in model.modules():
        if isinstance(module, (Int8Linear, WeightOnlyLinear)):
            own = dict(module.named_parameters(recurse=False))
            size += sum(own[name].nbytes for name in own if name.startswith("weight") and name != "weight_shape")
            count += module.in_features * module.out_features
    return size, count


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "unet2d"])
@pytest.mark.parametrize("bits", [4.0, 5.5, 8.0])
def test_stored_bits_are_within_the_budget_and_no_worse_than_uniform(name, bits):
    model, batch = MODELS[name]()
    plan = applied(model, [batch, batch], bits=bits, group=16, choices=("w8", "w6", "w4", "w3", "w2"), only=("*",))
    size, count = held(model)
    told = plan.notes["allocation"]
    assert size * 8 / count == pytest.approx(told["average"]) and told["average"] <= bits * (1 + 1e-9)
    for path, stored in told["bits"].items():
        assert stored == pytest.approx(8 * held(nn.ModuleList([model.get_submodule(path)]))[0] / held(
            nn.ModuleList([model.get_submodule(path)]))[1])  # fmt: skip
    points = told["points"]
    uniform = next((name for name in points if name.startswith("uniform")), None)
    same = points.get(f"mixed at the size of {uniform}")  # only where it is none of the others
    if same:
        assert same["weight"] <= points[uniform]["weight"] * (1 + 1e-9)
        assert same["predicted"] <= points[uniform]["predicted"] * (1 + 1e-9)
    assert points[told["taken"]]["measured"] == min(point["measured"] for point in points.values())
    assert all(point["weight"] <= told["budget"] * (1 + 1e-9) for point in points.values())
    assert json.loads(json.dumps(plan.notes)) == plan.notes | {"allocation": json.loads(json.dumps(told))}


def test_size_is_a_share_or_bytes():
    shares = []
    for size in (0.25, 27_000.0):
        model, batch = MODELS["llama"]()
        whole = 4 * sum(module.weight.numel() for module in View(model).linears().values())
        applied(model, [batch], size=size, group=16)
        shares.append(held(model)[0])
        assert held(model)[0] <= (size if size > 1 else size * whole)
    assert shares[0] > 0.9 * 0.25 * whole


def test_bops_take_int8_activations_where_they_pay():
    model, batch = MODELS["llama"]()
    plan = applied(model, [batch], bops=0.1, group=16)
    kinds = [model.get_submodule(path) for path in plan.edits]
    assert any(isinstance(module, Int8Linear) for module in kinds)
    work = [8 * (8 if isinstance(m, Int8Linear) else 32) if isinstance(m, Int8Linear) else m.bits * 32 for m in kinds]
    sizes = [module.in_features * module.out_features for module in kinds]
    assert sum(map(int.__mul__, work, sizes)) <= 0.1 * 32 * 32 * sum(sizes)


def test_latency_is_what_the_machine_says(monkeypatch):
    def table(layers, choices, rows, make):
        assert set(rows.values()) == {24}
        return {path: {"keep": 4.0, "w8a8": 1.0, "w8": 5.0, "w4": 2.0} for path in layers}

    monkeypatch.setattr("compress.mixing.seconds", table)
    model, batch = MODELS["llama"]()
    plan = applied(model, [batch], latency=0.3, group=16, choices=("keep", "w8a8", "w8", "w4"))
    told = plan.notes["allocation"]
    assert told["unit"] == "s" and set(told["choices"].values()) == {"w8a8", "keep"}  # w4 is slower and worse
    assert told["points"]["mixed"]["weight"] == 1.0 * len(plan.edits) + 4.0 * (len(told["choices"]) - len(plan.edits))


def test_time_is_not_refused_before_it_is_measured():
    plan = Mixed(latency=0.01, group=16, choices=("w8", "w4")).plan(View(MODELS["llama"]()[0].to("meta")))
    assert {edit["bits"] for edit in plan.edits.values()} == {4}


def test_times_are_measured_through_the_layers():
    from compress.budgets import seconds
    from compress.transforms.quantize.mixed import rounded

    layers = {name: nn.Linear(32, 48) for name in ("one", "two")} | {"other": nn.Linear(48, 32)}
    choices = {
        "keep": None,
        "w8a8": {"bits": 8, "activations": 8},
        "w4": {"bits": 4, "group": 16, "symmetric": True, "solver": "rtn"},
    }
    table = seconds(layers, dict.fromkeys(layers, choices), dict.fromkeys(layers, 7), rounded)
    assert table["one"] == table["two"]
    assert all(value > 0 for row in table.values() for value in row.values())


@pytest.mark.parametrize("winner", ["mixed", "uniform w4"])
def test_what_is_best_on_held_out_data_is_taken(winner, monkeypatch):
    def trial(view, replaced, batches):
        assert [batch["mark"] for batch in batches] == [3]
        return {name: 0.0 if name == winner else 1.0 for name in replaced}

    monkeypatch.setattr("compress.mixing.trial", trial)
    monkeypatch.setattr("compress.probing.inputs", lambda batch: {k: v for k, v in batch.items() if k != "mark"})
    model, batch = MODELS["llama"]()
    plan = applied(model, [batch | {"mark": mark} for mark in range(4)], bits=6.5, group=16, choices=("w8", "w4", "w2"))
    assert plan.notes["allocation"]["taken"] == winner
    assert plan.notes["allocation"]["data"] == "held-out data"
    widths = {edit["bits"] for edit in plan.edits.values()}
    assert widths == {4} if winner == "uniform w4" else len(widths) > 1


def test_layers_that_share_a_weight_choose_together_and_are_paid_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.right.weight = self.left.weight

        def forward(self, x):
            return self.last(torch.relu(self.left(x)) + self.right(x))

    torch.manual_seed(0)
    net = Net()
    plan = applied(net, [{"x": torch.randn(40, 32)}], bits=5.0, group=16, choices=("w8", "w6", "w4", "w2"))
    assert plan.edits["left"] == plan.edits["right"]
    assert net.left.weight_packed is net.right.weight_packed
    assert plan.notes["allocation"]["average"] <= 5.0
    assert plan.notes["allocation"]["bits"]["left"] == plan.notes["allocation"]["bits"]["right"] >= 3
    assert plan.notes["allocation"]["average"] == pytest.approx(
        8 * (held(net)[0] - held(nn.ModuleList([net.left]))[0]) / 2048
    )


def test_plans_keep_the_budget_without_data_also_on_meta():
    model, _ = MODELS["bert"]()
    plan = Mixed(bits=4.5, group=16).plan(View(model.to("meta")))
    count = sum(model.get_submodule(path).weight.numel() for path in plan.edits)
    stored = sum(
        model.get_submodule(path).weight.numel() * (edit["bits"] + (32 / edit["group"] if edit["group"] else 1))
        for path, edit in plan.edits.items()
    )
    assert 4.0 < stored / count <= 4.5


def test_a_group_in_a_choice_comes_before_the_option():
    from compress.transforms.quantize.mixed import settings

    plain = {"bits": 4, "group": 32, "symmetric": True, "solver": "rtn"}
    assert settings("w4g32", 64, True, 96) == plain
    assert settings("w4", 64, False, 96) == plain | {"symmetric": False}  # 64 does not divide 96
    assert settings("w8", 64, True, 128)["group"] == 0
    assert settings("w8a8", 64, True, 128) == {"bits": 8, "activations": 8}
    assert settings("keep", 64, True, 128) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "no budget given, it must be one of size, bits, bops and latency"),
        ({"bits": 4.0, "size": 0.3}, "size and bits given, it must be one"),
        (
            {"bits": 1.0, "group": 16},
            "bits is 1, the smallest possible is 4 with the choices w8a8, w8, w6",
        ),
        ({"size": 0.1, "choices": ("w8",)}, r"size is 0.1, the smallest possible is 0\.2\d+"),
        ({"bops": 0.01}, r"bops is 0.01, the smallest possible is 0\.06\d*"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(options, told):
    with pytest.raises(CompressError, match=told):
        Mixed(**options).plan(View(MODELS["llama"]()[0]))


@pytest.mark.parametrize("options", [{"choices": ("w5",)}, {"choices": ("w4g12",)}, {"bops": 2.0}, {"choices": ()}])
def test_options_outside_their_ranges_are_refused(options):
    with pytest.raises(ValidationError):
        Mixed(**options)


@pytest.mark.parametrize("solver", ["auto", "hqq", "gptq"])
def test_codes_are_found_by_the_methods_of_both_kinds(solver):
    errors = {}
    for kind in ("rtn", solver):
        model, batch = MODELS["opt"]()
        with torch.no_grad():
            exact = run(model.eval(), batch)
            plan = applied(model, [batch], bits=7.5, group=16, choices=("w8a8", "w4"), solver=kind)
            errors[kind] = relative_error(run(model, batch), exact)
    assert {edit.get("activations") for edit in plan.edits.values()} == {8, None}
    assert {edit["solver"] for edit in plan.edits.values() if "solver" in edit} <= {solver, "gptq", "awq", "hqq"}
    assert errors[solver] < errors["rtn"]


def test_layers_that_no_data_reached_stay_and_are_told():
    plan = applied(HalfUsed(), [{"x": torch.randn(9, 32)}], bits=7.0, group=16)
    assert set(plan.edits) == {"used"} and plan.notes["refused"] == {"other": "no calibration data reached it"}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_packed_experts_are_refused_by_name(name):
    model, batch = MORE[name]()
    plan = applied(model, [batch], bits=5.0, group=16)
    assert any("experts" in path and "3-D" in why for path, why in plan.notes["refused"].items())
    assert not any("experts" in path for path in plan.edits)
