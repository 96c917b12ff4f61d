"""heads.prune as a whole: what goes, what the repair leaves, and models that still work."""

import pytest
import torch

from compress.outputs import relative_error, run
from compress.transforms.heads.prune import Prune
from compress.view import View
from models import MODELS


def pruned(name, **options):
    """A tiny model after the method, with its batch, what it answered before, and the plan."""
    model, batch = MODELS[name]()
    before = run(model, batch)
    method, view = Prune(**options), View(model)
    plan = method.calibrate(view, method.plan(view), [batch])
    method.apply(view, plan)
    return model, batch, before, plan


@pytest.mark.parametrize("score", ["fisher", "taylor", "magnitude"])
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
