"""heads.prune as a whole: what goes, what the repair leaves, and models that still work."""

import pytest
import torch

from compress.errors import CompressError
from compress.flops import count
from compress.formats import native_config
from compress.outputs import relative_error, run
from compress.parts import bring_forward, channels_of, heads_of
from compress.savings import seconds
from compress.scoring import names
from compress.transforms.heads.prune import Prune
from compress.view import MLP, View
from models import MODELS, text
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
    matrix *= 10  # heads of a random model matter so little that the rounding of some CPUs hides it
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "flux", "opt"])
def test_channels_that_come_first_change_no_answer(name):
    model, batch = MODELS[name]()
    before, view = run(model, batch), View(model)
    chosen = torch.rand(view.mlps()[0].width, generator=torch.Generator().manual_seed(0)) < 0.5
    for mlp in view.mlps():
        old = view.module(mlp.down).weight.clone()
        bring_forward(view, mlp, chosen)
        assert not torch.equal(view.module(mlp.down).weight, old)
    assert relative_error(run(model, batch), before) < 1e-5


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_channels_of_mlps_go_in_slices(name):
    model, batch, before, plan = pruned(name, keep=0.5, include=("mlp",))
    assert set(plan.edits) <= {mlp.path for mlp in View(model).mlps()}
    assert all(edit["width"] % 8 == 0 for edit in plan.edits.values())
    assert sum(mlp.width for mlp in View(model).mlps()) == 64
    assert relative_error(run(model, batch), before) < 1


def test_idle_channels_go_first_without_a_trace():
    model, batch = MODELS["vit"]()
    view = View(model)
    idle = torch.arange(64) % 8 == 3
    view.module(view.mlps()[1].down).weight.data[:, idle] = 0
    before = run(model, batch)
    method = Prune(keep=15 / 16, include=("mlp",), score="energy")
    plan = method.calibrate(view, method.plan(view), [batch])
    assert plan.edits == {view.mlps()[1].path: {"width": 56}}
    method.apply(view, plan)
    assert relative_error(run(model, batch), before) < 1e-4


@pytest.mark.parametrize("include", [("heads",), ("heads", "mlp")])
@pytest.mark.parametrize("name", ["bert", "swin", "dit"])
def test_a_budget_of_operations_is_kept_and_not_by_much(name, include):
    model, batch = MODELS[name]()
    whole = count(model, batch)
    pruned_, *_ = pruned(name, flops=0.8, include=include, score="fisher", repair=False)
    assert 0.7 < count(pruned_, batch) / whole <= 0.8


def test_budgets_that_cannot_be_kept_and_two_budgets_are_refused():
    view = View(MODELS["bert"]()[0])
    with pytest.raises(CompressError, match=r"flops is 0.1, with one unit a layer it is 0\.\d"):
        Prune(flops=0.1).plan(view)
    with pytest.raises(CompressError, match="keep and flops are given"):
        Prune(flops=0.9, keep=0.5).plan(view)
    with pytest.raises(CompressError, match="protect is about heads"):
        Prune(protect=0.1, include=("mlp",)).plan(view)


def test_time_is_what_a_unit_saves_here(monkeypatch):
    from compress_kernels import timing

    model, batch = MODELS["bert"]()
    view = View(model)
    clock = {"heads": 0.8, "mlp": 0.6, None: 1.0}

    def paired(calls, **options):
        kinds = [kind if kind is None else "mlp" if kind[0] is MLP else "heads" for kind in calls]
        assert all(torch.is_tensor(call()) for call in calls.values())
        return dict(zip(calls, map(clock.get, kinds)))

    monkeypatch.setattr(timing, "paired", paired)
    parts = [heads_of(attention, "group") for attention in view.attentions()]
    parts += [channels_of(mlp, torch.arange(mlp.width)) for mlp in view.mlps()]
    costs, whole = seconds(view, parts, batch)
    assert whole == 1
    assert costs == pytest.approx([0.2 / 4] * 2 + [0.4 / 8] * 2)
    clock.update(heads=1.1, mlp=1.2)
    with pytest.raises(CompressError, match="no faster"):
        seconds(view, parts, batch)


def test_uniform_cuts_of_heads_and_channels_are_an_ordinary_config():
    model, batch, *_ = pruned("llama", keep=0.5, layout="uniform", include=("heads", "mlp"), score="fisher")
    config = native_config(model)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 32)
    assert config.head_dim == 8


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_ragged_decoders_generate_with_and_without_cache(kv_heads):
    model, batch = text("llama", num_key_value_heads=kv_heads, num_hidden_layers=3)
    method, view = Prune(keep=0.7, score="fisher"), View(model)
    plan = method.calibrate(view, method.plan(view), [batch])
    method.apply(view, plan)
    assert len({(at.heads, at.kv_heads) for at in view.attentions()}) > 1
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(batch["input_ids"][:1], use_cache=False, **options)
    for cache in ({"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(batch["input_ids"][:1], **cache, **options), plain)
