"""heads.factorize: full rank is exact, truncation loses the tail, and what is cut is what was zero."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.factoring import Seen, bases, turn, white, whole
from compress.factors import allocate, key_basis, missed, outputs, value_basis
from compress.outputs import relative_error, run
from compress.probing import Answers
from compress.steps import answer_when_masked
from compress.transforms.heads.factorize import Factorize
from compress.view import View
from models import IMAGE, MODELS, image, text


def spread(size, seed=0):
    """A random symmetric positive matrix."""
    x = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.t() / (3 * size)


def narrowed(model, batches=(), **options):
    method = Factorize(**options)
    plan = method.plan(View(model))
    if method.needs_data:
        plan = method.calibrate(View(model), plan, list(batches))
    masked = answer_when_masked(model, method, plan, batches[0]) if batches else None
    method.apply(View(model), plan)
    return plan, masked


def photos(name="vit", count=8):
    kind = "AutoModelForImageClassification" if name == "vit" else "AutoModel"
    model, _ = image(name, kind, **IMAGE | {"num_hidden_layers": 3})
    pixels = torch.randn(count, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return model, [{"pixel_values": rows} for rows in pixels]


def decoder():
    model, _ = text("llama", num_key_value_heads=2, num_hidden_layers=3)
    ids = torch.randint(3, 99, (8, 4, 16), generator=torch.Generator().manual_seed(3))
    return model, [{"input_ids": rows} for rows in ids]


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 12), seed=st.integers(0, 99))
def test_value_directions_are_exact_together_and_lose_the_tail_alone(size, seed):
    moment, importance = spread(size, seed), spread(size, seed + 1)
    down, up, energies = value_basis(moment, importance)
    torch.testing.assert_close(down @ up, torch.eye(size, dtype=torch.float64))
    for rank in range(size):
        left = torch.eye(size, dtype=torch.float64) - (down[:, :rank] @ up[:rank]).t()
        lost = torch.trace(importance @ left @ moment @ left.t())
        torch.testing.assert_close(lost, energies[rank:].sum(), atol=1e-9, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 12), seed=st.integers(0, 99))
def test_key_directions_are_exact_together_and_lose_the_tail_alone(size, seed):
    queries, keys = spread(size, seed), spread(size, seed + 1)
    left, right, energies = key_basis(queries, keys)
    torch.testing.assert_close(left @ right.t(), torch.eye(size, dtype=torch.float64))
    for rank in range(size):
        rest = torch.eye(size, dtype=torch.float64) - left[:, :rank] @ right[:, :rank].t()
        lost = torch.trace(rest.t() @ queries @ rest @ keys)
        torch.testing.assert_close(lost, energies[rank:].sum(), atol=1e-9, rtol=1e-6)


def test_the_refit_is_never_worse_than_the_projection_of_the_bases():
    weight, moment = torch.randn(5, 8, dtype=torch.float64), spread(8)
    down, up, _ = value_basis(moment, weight.t() @ weight)
    down, up = down[:, :3], up[:3]
    new, error = outputs(weight, moment, down, up, None)
    plain = missed(weight - weight @ up.t() @ down.t(), moment) / missed(weight, moment)
    assert error**2 <= plain * (1 + 1e-9) and new.shape == (5, 3)


def test_ranks_go_where_they_matter_and_cost_what_they_may():
    flat, steep = torch.ones(8), torch.tensor([8.0, 4, 2, 1, 0, 0, 0, 0])
    assert allocate([flat, steep], [1, 1], 0.75, 4) == [8, 4]
    assert allocate([flat, 1e-3 * flat], [1, 1], 0.5, 2) == [6, 2]
    assert allocate([steep, steep], [3, 1], 0.99, 4) == [4, 8]  # a third of the loss for each weight that goes
    assert allocate([flat], [1], 0.01, 3) == [3]  # no head without a channel


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_whole_bases_change_nothing_and_follow_any_writing_of_the_weights(name):
    model, batches = photos() if name == "vit" else decoder()
    model = model.double()
    batches = [{k: x.double() if x.is_floating_point() else x for k, x in batch.items()} for batch in batches]
    before, view = run(model, batches[0]), View(model)
    attentions = view.attentions()
    seen = whole(view, attentions, batches)
    energies = {at.path: bases(view, at, seen[at.path]).values for at in attentions}
    for at in attentions:
        ranks = {"values": at.value_dim} | ({"keys": at.head_dim} if name == "vit" else {})
        turn(view, at, bases(view, at, seen[at.path]), ranks, seen[at.path], None)
    assert relative_error(run(model, batches[0]), before) < 1e-9
    again = whole(view, attentions, batches)
    for at in attentions:
        torch.testing.assert_close(bases(view, at, again[at.path]).values, energies[at.path], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["vit", "bert", "opt", "llama", "qwen3", "dit", "whisper"])
def test_what_is_cut_was_zero(name):
    model, batch = MODELS[name]()
    before = run(model, batch)
    plan, masked = narrowed(model, [batch], keep=0.5, step=2)
    assert masked is not None and relative_error(run(model, batch), masked) < 1e-5
    assert relative_error(masked, before) > 1e-7
    attention = View(model).attention(next(iter(plan.edits)))
    assert attention.value_dim == plan.edits[attention.path].get("values", 8)
    assert model.get_submodule(attention.v).out_features == attention.kv_heads * attention.value_dim


def test_rotary_positions_and_norms_keep_their_keys():
    for name in ("llama", "qwen3"):
        edits = Factorize(keep=0.5, step=2).plan(View(MODELS[name]()[0])).edits
        assert edits and all("keys" not in edit for edit in edits.values())
    edits = Factorize(keep=0.5, step=2, parts="values").plan(View(MODELS["vit"]()[0])).edits
    assert edits and all("keys" not in edit for edit in edits.values())


def test_streams_that_meet_and_fused_projections_are_refused_by_name():
    for name, why in (("sd3", "two streams"), ("gpt2", "not separate")):
        plan = Factorize(keep=0.5, step=2).plan(View(MODELS[name]()[0]))
        assert plan.edits == {} and all(why in text for text in plan.notes["refused"].values())
    once = MODELS["llama"]()[0]
    narrowed(once, by="weights", keep=0.5, step=2)
    assert "narrowed already" in next(iter(Factorize(keep=0.5, step=2).plan(View(once)).notes["refused"].values()))


def test_data_beat_weights_on_what_they_have_not_seen():
    model, batches = photos(count=16)
    for batch in batches:  # a few directions carry almost all, as in real models
        batch["pixel_values"] *= torch.linspace(0.01, 3, 32)
    reference, distances = Answers.of(model, batches[-4:]), []
    for by in ("weights", "data"):
        copied = copy.deepcopy(model)
        narrowed(copied, batches[:-4], by=by, keep=0.5, step=2)
        distances.append(reference.distance(copied))
    assert distances[1] < 0.5 * distances[0]


def test_the_cache_holds_shorter_values_and_generation_is_that_without_one():
    model, batches = decoder()
    narrowed(model, batches, keep=0.5, step=2)
    ids = batches[0]["input_ids"][:, :6]
    layers = model(ids, use_cache=True).past_key_values.layers
    kept = [View(model).attention(f"model.layers.{index}.self_attn").value_dim for index in range(3)]
    assert [layer.values.shape[-1] for layer in layers] == kept and min(kept) < 8
    assert all(layer.keys.shape[-1] == 8 for layer in layers)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, use_cache=False, **options)
    assert model.generate(ids, **options).equal(wanted)
    assert model.generate(ids, cache_implementation="static", **options).equal(wanted)


def test_white_inputs_give_the_singular_values_of_the_weights():
    model, _ = photos()
    view = View(model)
    at = view.attentions()[0]
    seen = white(view, at)
    assert isinstance(seen, Seen)
    values = model.vit.layers[0].attention.v_proj.weight.double().unflatten(0, (4, 8))
    output = model.vit.layers[0].attention.o_proj.weight.double().unflatten(1, (4, 8)).transpose(0, 1)
    singular = torch.linalg.svdvals(output @ values)[:, :8].square().sum(0)
    torch.testing.assert_close(bases(view, at, seen).values, singular, rtol=1e-6, atol=1e-9)


def test_all_of_it_is_nothing_to_do():
    assert Factorize(keep=1).plan(View(MODELS["vit"]()[0])).edits == {}
