"""quantize.weight_only: groups that fit, the error of its widths, ties, and models around it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress.errors import CompressError
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.outputs import relative_error, run
from compress.transform import Plan
from compress.transforms.quantize.weight_only import WeightOnly, fitting
from compress.view import View
from models import MODELS


def applied(model, batches=(), **options):
    method, view = WeightOnly(**options), View(model)
    plan = method.plan(view)
    if batches:
        plan = method.calibrate(view, plan, list(batches))
    method.apply(view, plan)
    return plan


@pytest.mark.parametrize(
    ("group", "width", "expected"), [(64, 576, 64), (64, 96, 32), (64, 40, 0), (128, 48, 16), (0, 64, 0), (64, 33, 0)]
)
def test_groups_are_halved_until_they_fit(group, width, expected):
    assert fitting(group, width) == expected


def test_groups_that_did_not_fit_are_told():
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 33), nn.Linear(33, 64))
    plan = applied(net, bits=4)
    assert {path: edit["group"] for path, edit in plan.edits.items()} == {"0": 64, "1": 32, "2": 0}
    assert plan.notes["groups"] == {"1": 32, "2": 0}
    assert [layer.weight_scale.shape[1] for layer in net] == [1, 3, 1]
    assert net(torch.randn(2, 64)).shape == (2, 64)


@pytest.mark.parametrize("options", [{"bits": 5}, {"group": -16}, {"group": 24}, {"groups": 32}, {"solver": "best"}])
def test_options_are_checked(options):
    with pytest.raises(ValidationError):
        WeightOnly(**options)


@pytest.mark.parametrize(
    ("bits", "group", "least", "most"),
    [
        (8, 0, 2e-3, 1e-2),
        (8, 32, 1e-3, 8e-3),
        (6, 32, 8e-3, 3e-2),
        (4, 32, 3e-2, 0.12),
        (3, 32, 0.1, 0.25),
        (2, 32, 0.2, 0.6),
    ],
)
@pytest.mark.parametrize("solver", ["rtn", "hqq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_that_of_the_bits(bits, group, least, most, solver, symmetric):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(128, 64)), torch.randn(200, 128)
    with torch.no_grad():
        expected = net(x)
        applied(net, bits=bits, group=group, solver=solver, symmetric=symmetric)
        assert least < relative_error(net(x), expected) < most


def test_the_layer_tells_its_weight_and_sizes():
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = WeightOnlyLinear.from_linear(linear, 4, 32)
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == linear.weight.shape
    assert relative_error(layer.weight, linear.weight) < 0.12
    assert layer.weight_shape.tolist() == [32, 64] and (layer.in_features, layer.out_features) == (64, 32)
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert layer.bias is linear.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casting_the_layer_changes_no_weight(dtype):
    layer = WeightOnlyLinear.from_linear(nn.Linear(64, 32, dtype=dtype), 4, 32)
    assert torch.equal(layer.weight_scale.bfloat16().to(dtype), layer.weight_scale)


def test_shared_weights_stay_shared():
    left, right = nn.Linear(32, 32), nn.Linear(32, 32)
    right.weight = left.weight
    net = nn.Sequential(left, right, left)
    plan = applied(net, bits=4, group=16)
    assert set(plan.edits) == {"0", "1"}
    assert net[0] is net[2] and net[0].weight_packed is net[1].weight_packed
    assert net[0].bias is not net[1].bias


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_broken_weights_are_refused_in_one_line(value):
    net = nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        net[0].weight[3, 3] = value
    with pytest.raises(CompressError, match=r"^quantize.weight_only: 0.weight holds NaN or infinite values, .*$"):
        WeightOnly().plan(View(net))


def test_zero_rows_and_groups():
    net = nn.Sequential(nn.Linear(32, 16))
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].weight[:, 16:] = 0
    applied(net, bits=4, group=16)
    assert torch.equal(net[0].weight[2], torch.zeros(32)) and torch.equal(net[0].weight[:, 16:], torch.zeros(16, 16))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "dit", "whisper"])
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "group": 16}])
def test_models_answer_almost_the_same_and_shrink(name, options):
    model, batch = MODELS[name]()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        expected = run(model, batch)
        plan = applied(model, **options)
        assert 1e-4 < relative_error(run(model, batch), expected) < {4: 0.25, 8: 0.02}[options["bits"]]
    assert all(isinstance(model.get_submodule(path), WeightOnlyLinear) for path in plan.edits)
    assert sum(parameter.nbytes for parameter in model.parameters()) < 0.6 * size


@pytest.mark.parametrize("solver", ["awq", "gptq", "signround", "auto"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "dinov2", "dit", "sd3"])
def test_calibrated_models_are_nearer_than_rounded_ones(name, solver):
    model, batch = MODELS[name]()
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        expected = run(model, batch)
        applied(rounded, bits=4, group=16, solver="rtn")
        plan = applied(model, [batch] * 4, bits=4, group=16, solver=solver)
        assert relative_error(run(model, batch), expected) < relative_error(run(rounded, batch), expected)
    assert set(plan.notes["errors"]) == set(plan.edits)
    solvers = {edit["solver"] for edit in plan.edits.values()}
    assert solvers <= ({"gptq", "awq"} if solver == "auto" else {solver, "gptq"})


def test_what_calibration_wrote_into_the_weights_is_what_the_layers_hold():
    model, batch = MODELS["llama"]()
    method, view = WeightOnly(bits=4, group=16, solver="gptq", symmetric=False), View(model)
    plan = method.calibrate(view, method.plan(view), [batch])
    values = {path: view.module(path).weight.clone() for path in plan.edits}
    method.apply(view, plan)
    for path, weight in values.items():
        assert relative_error(view.module(path).weight, weight) < 1e-6


def test_awq_moves_factors_into_norms_values_and_gated_branches_and_leaves_the_others_with_the_layer():
    (llama, batch), (bert, sentences) = MODELS["llama"](), MODELS["bert"]()
    before = {name: value.clone() for name, value in llama.named_parameters() if "layernorm" in name}
    plan = applied(llama, [batch], bits=3, group=0, solver="awq", only=("*layers*",))
    assert not any("input_factor" in edit for edit in plan.edits.values())
    assert any(relative_error(llama.get_parameter(name), value) > 0.02 for name, value in before.items())
    plan = applied(bert, [sentences], bits=3, group=16, solver="awq")
    kept = [path for path, edit in plan.edits.items() if "input_factor" in edit]
    assert kept and all(bert.get_submodule(path).input_factor is not None for path in kept)
    empty = MODELS["bert"]()[0].to("meta")
    WeightOnly().apply(View(empty), Plan(json.loads(json.dumps(plan.edits))))
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in bert.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in empty.state_dict().items()} == shapes


def test_layers_that_share_a_weight_share_its_codes_after_calibration():
    net, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), torch.randn(64, 32)
    net[2].weight = net[0].weight
    plan = applied(net, [{"input": x}], bits=4, group=16, solver="awq")
    assert net[0].weight_packed is net[2].weight_packed and plan.edits["0"] == plan.edits["2"]


def test_a_layer_that_no_data_reaches_is_rounded_without():
    class Idle(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    net = Idle(nn.Linear(32, 32), nn.Linear(32, 32))
    plan = applied(net, [{"x": torch.randn(64, 32)}], bits=4, group=16, solver="gptq")
    assert {path: edit["solver"] for path, edit in plan.edits.items()} == {"0": "gptq", "1": "rtn"}
    assert isinstance(net[1], WeightOnlyLinear)


def test_solvers_that_look_at_data_say_so():
    assert [WeightOnly(solver=solver).needs_data for solver in ("rtn", "hqq", "auto", "awq", "gptq", "signround")] == [
        False, False, False, True, True, True]  # fmt: skip
    assert [WeightOnly(solver=solver).uses_data for solver in ("rtn", "hqq", "auto")] == [False, False, True]
    with pytest.raises(CompressError, match=r"^calibration: there is no batch, there must be at least one$"):
        model = MODELS["llama"]()[0]
        WeightOnly(solver="gptq").calibrate(View(model), WeightOnly().plan(View(model)), [])
