"""heads.prune as a whole: what goes, what the repair leaves, and models that still work."""

import pytest
import torch

from compress.outputs import relative_error, run
from compress.scoring import names
from compress.transforms.heads.prune import Prune
from compress.view import View
from models import MODELS
from planted import inducing


def pruned(name, **options):
    """A tiny model after the method, with its batch, what it answered before, and the plan."""
    model, batch = MODELS[name]()
    before = run(model, batch)
    method, view = Prune(**options), View(model)
    plan = method.calibrate(view, method.plan(view), [batch])
    method.apply(view, plan)
    return model, batch, before, plan


@pytest.mark.parametrize("score", [name for name in names() if name != "retrieval"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_a_dead_head_goes_first_without_a_trace(name, score):
    model, batch = MODELS[name]()
    view = View(model)
    at = view.attentions()[1]
    output = view.module(at.o)
    matrix = output.weight.data if isinstance(output, torch.nn.Linear) else output.weight.data.T
    matrix[:, at.value_dim : 2 * at.value_dim] = 0
    method = Prune(keep=7 / 8, score=score)
    before = run(model, batch)
    plan = method.calibrate(view, method.plan(view), [batch])
    assert plan.edits == {at.path: {"groups": [0, 2, 3], "queries": None}}
    method.apply(view, plan)
    assert relative_error(run(model, batch), before) < 1e-4


@pytest.mark.parametrize(("unit", "heads", "groups"), [("group", 2, 1), ("query", 2, 2)])
def test_grouped_query_attention_keeps_whole_groups_or_equal_queries(unit, heads, groups):
    model, batch, _, _ = pruned("llama", keep=0.5, unit=unit, layout="uniform")
    for at in View(model).attentions():
        assert (at.heads, at.kv_heads) == (heads, groups)
    ids = batch["input_ids"][:1]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_without_data_the_weights_decide_and_nothing_is_repaired():
    model, batch = MODELS["vit"]()
    method = Prune(keep=0.5, score="magnitude")
    assert not method.needs_data
    view = View(model)
    plan = method.plan(view)
    before = {path: view.module(view.attention(path).o).weight.clone() for path in plan.edits}
    method.apply(view, plan)
    for path, weight in before.items():
        columns = [8 * head + at for head in plan.edits[path]["groups"] for at in range(8)]
        assert torch.equal(view.module(view.attention(path).o).weight, weight[:, columns])


def test_on_an_empty_model_it_plans_the_same_number_of_heads():
    method = Prune(keep=0.5, layout="uniform", score="magnitude")
    real = method.plan(View(MODELS["vit"]()[0])).edits
    empty = method.plan(View(MODELS["vit"]()[0].to("meta"))).edits
    assert {path: len(edit["groups"]) for path, edit in real.items()} == {
        path: len(edit["groups"]) for path, edit in empty.items()
    }


@pytest.mark.parametrize("name", ["llama", "bert", "dinov2", "dit"])
def test_repaired_it_answers_better_than_cut(name):
    errors = []
    for fix in (False, True):
        model, batch, before, _ = pruned(name, keep=0.5, repair=fix, rounds=1)
        errors.append(relative_error(run(model, batch), before))
    assert errors[1] < errors[0]


def test_auto_keeps_the_best_of_what_it_tried_and_says_so():
    model, batch, _, plan = pruned("bert", keep=0.5, score="auto", rounds=1)
    curves, taken = plan.notes["curves"], plan.notes["taken"]
    assert len(curves) > 2
    ends = {score: curve[-1][1] for score, curve in curves.items()}
    assert ends[taken] == min(ends.values())
    assert f"taken: {taken}" in plan.notes["remarks"][0]
    again = pruned("bert", keep=0.5, score=taken, rounds=1)
    assert again[3].edits == plan.edits
    torch.testing.assert_close(run(model, batch), run(again[0], batch))


def test_heads_that_retrieve_stay():
    batch = {"input_ids": torch.arange(8, 40).repeat(2, 2)}
    for protect, heads in ((None, [1]), (0.9, [0])):
        model = inducing()
        view = View(model)
        method = Prune(keep=0.5, score="magnitude", protect=protect, repair=False)
        plan = method.calibrate(view, method.plan(view), [batch])
        path = view.attentions()[1].path
        assert plan.edits.get(path, {"groups": [0, 1]})["groups"] == heads
        assert any("retrieve" in remark for remark in plan.notes["remarks"]) == (protect is not None)
