"""What every score has to keep, and the maths of single ones."""

import copy

import pytest
import torch

from compress.errors import CompressError
from compress.outputs import run
from compress.parts import heads_of
from compress.probing import Answers
from compress.scores.magnitude import head_norms, head_weights
from compress.scoring import find, gate_gradients, names
from compress.view import View
from models import MODELS
from planted import inducing

SCORES = [name for name in names() if name != "retrieval"]  # which only decoders have


def parts_of(model, unit="group"):
    return [heads_of(attention, unit) for attention in View(model).attentions()]


def scores(name, model, batch, unit="group"):
    """The scores of the units, by the number of their attention."""
    parts = parts_of(model, unit)
    found = find(name)(View(model), parts, [batch]).alone
    return found.split([part.count for part in parts])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "dit", "sd3"])
def test_scores_leave_the_model_as_it_was(name, kind):
    model, batch = MODELS[kind]()
    before, flags = run(model, batch), [parameter.requires_grad for parameter in model.parameters()]
    found = scores(name, model, batch)
    assert torch.equal(run(model, batch), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all((score >= 0).all() and score.isfinite().all() and score.max() > 0 for score in found)


@pytest.mark.parametrize("name", SCORES)
def test_a_dead_head_scores_nothing(name):
    model, batch = MODELS["bert"]()
    model.double()  # its heads change answers by less than float32 can tell
    at = View(model).attentions()[1]
    View(model).module(at.o).weight.data[:, 2 * at.value_dim : 3 * at.value_dim] = 0
    found = scores(name, model, batch)
    assert abs(found[1][2]) < 1e-6 * max(score.max() for score in found)
    assert found[1][2] == min(score.min() for score in found)


@pytest.mark.parametrize("name", SCORES)
def test_scaling_values_up_and_the_output_down_changes_no_score(name):
    model, batch = MODELS["vit"]()
    found = scores(name, model, batch)
    at = View(model).attentions()[0]
    rows = slice(at.value_dim, 2 * at.value_dim)
    View(model).module(at.v).weight.data[rows] *= 8
    View(model).module(at.v).bias.data[rows] *= 8
    View(model).module(at.o).weight.data[:, rows] /= 8
    for before, after in zip(found, scores(name, model, batch), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SCORES)
def test_permuted_heads_permute_their_scores(name):
    model, batch = MODELS["vit"]()
    at = View(model).attentions()[0]
    found = scores(name, model, batch)[0]
    order = [2, 0, 3, 1]
    rows = [head * at.head_dim + i for head in order for i in range(at.head_dim)]
    for path in (at.q, at.k, at.v):
        linear = View(model).module(path)
        linear.weight.data, linear.bias.data = linear.weight.data[rows], linear.bias.data[rows]
    View(model).module(at.o).weight.data = View(model).module(at.o).weight.data[:, rows]
    torch.testing.assert_close(scores(name, model, batch)[0], found[order], rtol=1e-4, atol=1e-7)


def test_the_gate_gradient_is_that_of_finite_differences():
    model, batch = MODELS["dinov2"]()
    model.double()
    one = {"pixel_values": batch["pixel_values"][:1].double()}
    view = View(model)
    at = view.attentions()[0]
    found = gate_gradients(view, [heads_of(at, "group")], [one])[0]
    direction = torch.randn(run(model, one).shape, generator=torch.Generator().manual_seed(0)).double()
    for head in range(at.heads):
        sides = []
        for step in (1e-4, -1e-4):
            changed = copy.deepcopy(model)
            columns = slice(head * at.value_dim, (head + 1) * at.value_dim)
            View(changed).module(at.o).weight.data[:, columns] *= 1 + step
            sides.append((run(changed, one) * direction).sum().item())
        assert found[head].item() == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-4)


def test_gradients_that_are_no_numbers_are_an_error():
    model, batch = MODELS["vit"]()
    View(model).module(View(model).attentions()[0].v).weight.data.fill_(float("inf"))
    with pytest.raises(CompressError, match="not finite"):
        scores("taylor", model, batch)


def test_twins_score_a_quarter_each_and_the_whole_together():
    model, batch = MODELS["vit"]()
    at, view = View(model).attentions()[0], View(model)
    width = at.value_dim
    for path in (at.q, at.k, at.v):
        linear = view.module(path)
        for tensor in (linear.weight.data, linear.bias.data):
            tensor[width : 2 * width] = tensor[:width]
    columns = view.module(at.o).weight.data
    columns[:, width : 2 * width] = 0  # one head does it all
    whole = find("fisher")(view, parts_of(model), [batch]).alone[0]
    columns[:, width : 2 * width] = columns[:, :width] = columns[:, :width] / 2
    found = find("fisher")(view, parts_of(model), [batch])
    torch.testing.assert_close(found.alone[:2], whole.expand(2) / 4, rtol=1e-3, atol=0)
    both = found.alone[:2].sum() + found.together[0, 1]
    torch.testing.assert_close(both, whole, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit", "swin", "t5", "dit", "sd3", "flux"])
def test_the_norm_is_that_of_the_product(name):
    view = View(MODELS[name]()[0])
    for at in view.attentions():
        values, outputs = head_weights(view, at)
        norms = head_norms(view, at)
        assert norms.shape == (at.heads,)
        for head in range(at.heads):
            exact = (outputs[head].double() @ values[head].double()).norm().item()
            assert norms[head].item() == pytest.approx(exact, rel=1e-4)


def test_a_planted_induction_head_is_found():
    model = inducing()
    found = find("retrieval")(View(model), parts_of(model), []).alone
    assert found[2] > 0.9
    assert found[[0, 1, 3]].max() < 0.1


def test_models_without_decoders_are_refused_what_retrieves():
    for kind in ("bert", "vit", "dit", "t5"):
        model, batch = MODELS[kind]()
        with pytest.raises(CompressError, match="only decoders"):
            scores("retrieval", model, batch)


def test_retrieval_leaves_the_model_as_it_was():
    model, batch = MODELS["llama"]()
    before = run(model, batch)
    implementation = model.config._attn_implementation
    assert all(score.shape == (2,) for score in scores("retrieval", model, batch))
    assert torch.equal(run(model, batch), before)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks for module in model.modules())


def test_a_unit_that_others_can_stand_in_for_costs_nothing_to_leave_out():
    model, batch = MODELS["vit"]()
    model.double()
    view, batch = View(model), {"pixel_values": batch["pixel_values"].double()}
    at = view.attentions()[0]
    width = at.value_dim
    for path in (at.q, at.k, at.v):
        for tensor in (view.module(path).weight.data, view.module(path).bias.data):
            tensor[width : 2 * width] = tensor[:width]
    found = scores("leave_one_out", model, batch)[0]
    answers = Answers.of(model, [batch])
    view.mask_heads(at, [1, 2, 3])
    assert found[:2].max() < 1e-3 * answers.distance(model)
