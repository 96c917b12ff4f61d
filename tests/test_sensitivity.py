"""Sensitivities: relevance keeps its sum, estimates foretell the measured loss, skipped blocks change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.compare import divergence
from compress.errors import CompressError
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.outputs import run
from compress.probing import Answers, block_answers, instead, one_at_a_time
from compress.relevance import Propagation, relevance
from compress.sensitivity import costs, pivot
from compress.view import View
from models import MODELS, HalfUsed


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


RULES = {
    "linear": lambda x, y: F.linear(x, randn(7, 32), randn(7)),
    "matmul": lambda x, y: x @ y.transpose(-1, -2),
    "conv": lambda x, y: F.conv2d(x, randn(5, 3, 3, 3), randn(5), padding=1),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True),
    "add": lambda x, y: x + y,
    "add in place": lambda x, y: x.clone().__iadd__(y[:1, :1]),
    "subtract": lambda x, y: 1 - (x - 2 * y),
    "multiply": lambda x, y: 0.5 * x * y[..., :1],
    "divide": lambda x, y: x / y.norm(dim=-1, keepdim=True),
    "rms": lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + y,
    "norm": lambda x, y: F.layer_norm(x, (32,), randn(32), randn(32)) + y,
    "softmax": lambda x, y: F.softmax(x + y, -1),
    "gelu": lambda x, y: F.gelu(x) * torch.sigmoid(y),
    "sum": lambda x, y: (x * y).sum(1) / 4,
    "mean": lambda x, y: torch.cat((x, -y), 1).mean((1, 2)),
    "rotate": lambda x, y: torch.cat((-x[..., 16:], x[..., :16]), -1) * randn(32) + y * randn(32),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_the_sum_of_relevance(rule):
    x, y = (torch.randn(2, 3, 8, 32, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (1, 2))
    with torch.no_grad():
        expected = RULES[rule](x, y)
    with Propagation():
        value = RULES[rule](x, y)
    assert torch.allclose(value, expected, atol=1e-5)
    start = torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
    value.backward(start)
    reached = sum(leaf.grad for leaf in (x, y) if leaf.grad is not None)
    assert (reached >= 0).all()
    assert reached.sum().item() == pytest.approx(start.sum().item(), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "swin", "unet2d"])
def test_every_layer_hands_on_what_it_was_given(name):
    model, batch = MODELS[name]()
    layers = View(model).linears()
    given, handed = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def count(into, path):
        return lambda passed: into.update({path: into[path] + passed.sum().item()})

    def on_input(path):
        def hook(module, arguments):
            x = arguments[0].clone()
            if x.requires_grad:
                x.register_hook(count(handed, path))
            return (x,)

        return hook

    for path, module in layers.items():
        module.register_forward_pre_hook(on_input(path))
    given = relevance(model, layers, [batch])
    start = max(given.values()) if name in ("llama", "bert", "vit") else 1.0
    assert start == pytest.approx(1, rel=1e-3)
    total = given[max(given, key=given.get)]
    seen = {path: value for path, value in handed.items() if value}
    assert len(seen) >= len(layers) - 4  # a layer of the time alone has no input that relevance could reach
    scale = sum(seen.values()) / sum(given[path] for path in seen)
    for path, value in seen.items():
        assert value / scale == pytest.approx(given[path], rel=1e-3, abs=1e-6 * total), path


def test_relevance_that_grows_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.einsum("bi,ij->bj", self.one(x), self.two.weight.abs() * 50)

    net = Net()
    with pytest.raises(CompressError, match="relevance is not kept on the way back to one"):
        relevance(net, {"one": net.one}, [{"x": randn(4, 8)}])


def estimated(kind, name="llama", choices=("4", "3", "2")):
    model, batch = MODELS[name]()
    view = View(model.eval())
    layers = view.linears()

    def build(path, choice):
        return WeightOnlyLinear.from_linear(layers[path], int(choice), 16)

    return view, batch, build, costs(kind, view, layers, list(choices), build, [batch], [batch])


@pytest.mark.parametrize("kind", ["output_kl", "fisher", "hessian", "lrp"])
def test_fewer_bits_cost_more_and_rows_are_counted(kind):
    _, batch, _, found = estimated(kind)
    for row in found.table.values():
        assert 0 < row["4"] < row["3"] < row["2"]
    assert set(found.rows.values()) == {batch["input_ids"].numel()}


@pytest.mark.parametrize(("kind", "within"), [("output_kl", 2), ("fisher", 4), ("hessian", 4)])
@pytest.mark.parametrize("name", ["llama", "bert", "dinov2", "t5"])
def test_the_sum_of_costs_foretells_the_measured_loss(kind, name, within):
    view, batch, build, found = estimated(kind, name)
    predicted = sum(row["4"] for row in found.table.values())
    answers = Answers.of(view.model, [batch])
    with instead({view.module(path): build(path, "4").forward for path in found.table}):
        measured = answers.distance(view.model)
    assert measured / within < predicted < measured * within


def test_a_layer_that_answers_do_not_depend_on_costs_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.last(self.used(x) + 0 * self.idle(x))

    torch.manual_seed(0)
    view = View(Net())
    layers = view.linears()
    batches = [{"x": randn(64, 32)}]

    def build(path, choice):
        return WeightOnlyLinear.from_linear(layers[path], int(choice), 16)

    for kind in ("output_kl", "fisher", "hessian", "lrp"):
        table = costs(kind, view, layers, ["4", "2"], build, batches, batches).table
        assert table["idle"]["2"] <= 1e-9 * table["used"]["2"], kind


@pytest.mark.parametrize("name", ["llama", "bert", "dinov2", "t5", "whisper", "unet2d_condition", "flux"])
def test_blocks_that_are_not_run_again_change_nothing(name, monkeypatch):
    model, batch = MODELS[name]()
    view = View(model.eval())
    layers = dict(list(view.linears().items())[::3])

    def replaced():
        return {path: (lambda m=m: WeightOnlyLinear.from_linear(m, 4, 0)) for path, m in layers.items()}

    with torch.no_grad():
        assert block_answers(view, Answers.of(model, [batch])), "blocks of this model can be skipped"
    skipping = one_at_a_time(view, replaced(), [batch])
    monkeypatch.setattr("compress.probing.block_answers", lambda view, answers: [])
    assert skipping == one_at_a_time(view, replaced(), [batch])
    assert not any("forward" in vars(module) for module in model.modules())


def test_distance_is_the_divergence_of_predictions_without_padding():
    model, batch = MODELS["llama"]()
    other, _ = MODELS["llama"]()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
        answers = Answers.of(model, [batch])
        expected = divergence(run(other, batch), run(model, batch), batch).mean
    assert answers.distance(model) == 0.0
    assert answers.distance(other) == pytest.approx(expected) and expected > 0


def test_the_choice_to_measure_is_the_second_coarsest_with_an_error():
    assert pivot({"w8": 1e-4, "w4": 1e-2, "w2": 0.1}) == "w4"
    assert pivot({"w8": 0.0, "w4": 0.0, "w2": 0.1}) == "w2"
    assert pivot({"w4": 0.1}) == "w4"
    assert pivot({"w8": 0.0, "w4": 0.0}) in ("w8", "w4")


def test_only_layers_that_data_reached_have_a_cost():
    view = View(HalfUsed())
    layers, batches = view.linears(), [{"x": randn(4, 32)}]

    def build(path, choice):
        return WeightOnlyLinear.from_linear(layers[path], int(choice), 16)

    assert set(costs("fisher", view, layers, ["4"], build, batches, batches).table) == {"used"}
    with pytest.raises(CompressError, match="no calibration data reached"):
        costs("fisher", view, {"other": layers["other"]}, ["4"], build, batches, batches)


def test_functions_that_stood_in_before_are_put_back():
    layer = nn.Linear(2, 2)
    layer.forward = first = lambda x: x
    with instead({layer: lambda x: 2 * x}):
        assert layer(torch.ones(1)).item() == 2
    assert layer.forward is first
