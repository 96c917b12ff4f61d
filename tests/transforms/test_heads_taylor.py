"""The maths of Taylor scores: gradients of gates, invariances, what counts as one unit."""

import copy

import pytest
import torch

from compress.errors import CompressError
from compress.outputs import relative_error, run
from compress.selection import unit_scores
from compress.transforms.heads.taylor import Taylor, head_scores
from compress.view import View
from models import MODELS


def scores(model, batches, unit="group"):
    view = View(model)
    return head_scores(view, view.attentions(), batches, lambda score, at: unit_scores(score, at, unit))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "dit", "sd3"])
def test_scores_leave_the_model_as_it_was(name):
    model, batch = MODELS[name]()
    before, flags = run(model, batch), [parameter.requires_grad for parameter in model.parameters()]
    found = scores(model, [batch])
    assert torch.equal(run(model, batch), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all((score >= 0).all() and score.sum() > 0 for score in found.values())


def test_the_gate_gradient_is_that_of_finite_differences():
    model, batch = MODELS["dinov2"]()
    model.double()
    one = {"pixel_values": batch["pixel_values"][:1].double()}
    view = View(model)
    at = view.attentions()[0]
    found = head_scores(view, [at], [one], lambda score, _: score)[at.path]
    direction = torch.randn(run(model, one).shape, generator=torch.Generator().manual_seed(0)).double()
    output = view.module(at.o)
    for head in range(at.heads):
        sides = []
        for step in (1e-4, -1e-4):
            changed = copy.deepcopy(model)
            columns = slice(head * at.value_dim, (head + 1) * at.value_dim)
            View(changed).module(at.o).weight.data[:, columns] *= 1 + step
            sides.append((run(changed, one) * direction).sum().item())
        assert found[head].item() == pytest.approx(abs(sides[0] - sides[1]) / 2e-4, rel=1e-4)
    assert output.weight.requires_grad


def test_a_dead_head_scores_nothing_and_goes_first_without_a_trace():
    model, batch = MODELS["bert"]()
    at = View(model).attentions()[1]
    View(model).module(at.o).weight.data[:, 2 * at.value_dim : 3 * at.value_dim] = 0
    found = scores(model, [batch])
    assert found[at.path][2] == 0 == min(score.min() for score in found.values())
    method = Taylor(keep=7 / 8)
    plan = method.calibrate(View(model), method.plan(View(model)), [batch])
    assert plan.edits == {at.path: {"groups": [0, 1, 3], "queries": None}}
    before = run(model, batch)
    method.apply(View(model), plan)
    assert relative_error(run(model, batch), before) < 1e-6


def test_scaling_values_up_and_the_output_down_changes_no_score():
    model, batch = MODELS["vit"]()
    found = scores(model, [batch])
    at = View(model).attentions()[0]
    rows = slice(at.value_dim, 2 * at.value_dim)
    View(model).module(at.v).weight.data[rows] *= 8
    View(model).module(at.v).bias.data[rows] *= 8
    View(model).module(at.o).weight.data[:, rows] /= 8
    again = scores(model, [batch])
    for path in found:
        torch.testing.assert_close(again[path], found[path], rtol=1e-4, atol=1e-7)


def test_permuted_heads_permute_their_scores():
    model, batch = MODELS["vit"]()
    at = View(model).attentions()[0]
    found = scores(model, [batch])[at.path]
    order = [2, 0, 3, 1]
    rows = [head * at.head_dim + i for head in order for i in range(at.head_dim)]
    for path in (at.q, at.k, at.v):
        linear = View(model).module(path)
        linear.weight.data, linear.bias.data = linear.weight.data[rows], linear.bias.data[rows]
    View(model).module(at.o).weight.data = View(model).module(at.o).weight.data[:, rows]
    torch.testing.assert_close(scores(model, [batch])[at.path], found[order], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("unit", "heads", "groups"), [("group", 2, 1), ("query", 2, 2)])
def test_grouped_query_attention_keeps_whole_groups_or_equal_queries(unit, heads, groups):
    model, batch = MODELS["llama"]()
    method = Taylor(keep=0.5, unit=unit, layout="uniform")
    plan = method.calibrate(View(model), method.plan(View(model)), [batch])
    method.apply(View(model), plan)
    for at in View(model).attentions():
        assert (at.heads, at.kv_heads) == (heads, groups)
    ids = batch["input_ids"][:1]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_gradients_that_are_no_numbers_are_an_error():
    model, batch = MODELS["vit"]()
    View(model).module(View(model).attentions()[0].v).weight.data.fill_(float("inf"))
    with pytest.raises(CompressError, match="not finite"):
        scores(model, [batch])
