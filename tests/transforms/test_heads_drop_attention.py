"""heads.drop_attention: affine attention goes exactly, its cache is gone, the choice is made after replacement."""

import copy

import pytest
import torch
from torch import nn

from compress.attend import attend_through
from compress.errors import CompressError
from compress.nn.stand_in import Nothing, StandIn, summary
from compress.outputs import relative_error, run
from compress.probing import Answers
from compress.replay import record, replay
from compress.stand_ins import Lesson, Moments, Place, fit, ridge, weights
from compress.transforms.heads.drop_attention import DropAttention
from compress.view import View
from models import IMAGE, MODELS, image, text


def done(model, batches, **options):
    method = DropAttention(**options)
    plan = method.calibrate(View(model), method.plan(View(model)), batches)
    steps = [record(model, "heads.drop_attention", plan)]
    method.apply(View(model), plan)
    return plan, steps


def decoder(layers=4):
    model, _ = text("llama", num_key_value_heads=2, num_hidden_layers=layers)
    ids = torch.randint(3, 99, (6, 4, 16), generator=torch.Generator().manual_seed(3))
    return model, [{"input_ids": rows} for rows in ids]


def photos(kind="AutoModelForImageClassification", count=12):
    model, _ = image("vit", kind, **IMAGE | {"num_hidden_layers": 3})
    pixels = torch.randn(count, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return model, [{"pixel_values": rows} for rows in pixels]


def test_the_fit_is_that_of_least_squares_and_its_ridge_draws_to_the_mean():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 3, generator=generator)
    seen = Moments()
    seen.add(x[:20], y[:20])
    seen.add(x[20:], y[20:])
    wide = torch.cat([x, torch.ones(50, 1)], 1).double()
    exact = torch.linalg.lstsq(wide, y.double()).solution
    torch.testing.assert_close(ridge(seen, 1e-12), exact, atol=1e-5, rtol=0)
    rest = (y.double() - wide @ exact).square().sum().item()
    assert seen.error(exact) == pytest.approx(rest, rel=1e-5)
    flat = ridge(seen, 1e9)
    assert flat[:-1].abs().max() < 1e-6
    torch.testing.assert_close(flat[-1], y.double().mean(0), atol=1e-6, rtol=0)


def test_fewer_rows_than_features_stay_finite_and_the_held_rows_choose_the_ridge():
    generator = torch.Generator().manual_seed(0)
    seen, held = Moments(), Moments()
    seen.add(torch.randn(5, 40, generator=generator), torch.randn(5, 3, generator=generator))
    held.add(torch.randn(50, 40, generator=generator), torch.randn(50, 3, generator=generator))
    best = fit(seen, held)
    assert best.isfinite().all()
    assert held.error(best) <= held.error(ridge(seen, 1e-6))


class Oneself(nn.Module):
    """A core in which every token attends to itself alone."""

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs):
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


def test_attention_to_oneself_is_replaced_exactly():
    model, batches = decoder(2)
    attend_through(View(model), View(model).attention("model.layers.0.self_attn"), Oneself())
    before = [run(model, batch) for batch in batches]
    done(model, batches, remove=1, only=("model.layers.0.self_attn",), refit=False)
    assert isinstance(model.model.layers[0].self_attn, StandIn)
    for batch, answer in zip(batches, before, strict=True):
        assert relative_error(run(model, batch), answer) < 1e-4


@pytest.mark.parametrize("context", [True, False])
def test_attention_to_all_alike_is_exact_with_context_only(context):
    model, batches = photos()
    attention = model.vit.layers[1].attention
    attention.q_proj.weight.data.zero_()
    attention.q_proj.bias.data.zero_()
    before = run(model, batches[0])
    done(model, batches, remove=1, only=("vit.layers.1",), context=context, refit=False)
    assert (relative_error(run(model, batches[0]), before) < 1e-4) == context


def test_a_first_token_that_does_otherwise_has_its_own_map():
    lesson, x = Lesson(context=True), torch.randn(400, 5, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    y[:, 0] = 3 * x.mean(1) - x[:, 0] + 1
    lesson.add(x, None, y, None)
    stand_in = StandIn(4, 4, True, False, torch.zeros(1))
    stand_in.load_state_dict(weights(lesson, lesson))
    torch.testing.assert_close(stand_in(x)[:, 0], y[:, 0], atol=1e-3, rtol=0)


def test_padding_is_in_no_mean():
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    short = summary(x[:, :3], None)
    for mask in (
        torch.tensor([[1, 1, 1, 0, 0]] * 2),
        torch.zeros(2, 1, 5, 5).index_fill(3, torch.tensor([3, 4]), -1e9),
    ):
        torch.testing.assert_close(summary(x, mask), short)


def test_the_cache_of_what_went_is_gone_and_generation_is_that_without_one():
    model, batches = decoder()
    plan, steps = done(model, batches, remove=2, only=("model.layers.0", "model.layers.2"))
    assert list(plan.edits) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    ids = batches[0]["input_ids"][:, :6]
    cache = model(ids, use_cache=True).past_key_values
    held = [layer for layer in cache.layers if layer.is_initialized]
    assert len(held) == 2 and cache.get_seq_length() == 6
    assert sum(layer.keys.numel() + layer.values.numel() for layer in held) == 2 * 2 * 4 * 2 * 6 * 8
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    wanted = model.generate(ids, use_cache=False, **options)
    for kind in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        found = model.generate(ids, use_cache=True, **options, **kind)
        if "num_beams" in kind:
            wanted = model.generate(ids, use_cache=False, **options, **kind)
        assert found.equal(wanted)
    left = torch.ones_like(ids)
    left[0, :2] = 0
    padded = {"input_ids": ids, "attention_mask": left}
    assert model.generate(**padded, **options).equal(model.generate(**padded, use_cache=False, **options))
    empty = text("llama", num_key_value_heads=2, num_hidden_layers=4)[0].to("meta")
    replay(empty, steps)
    assert [layer.self_attn.layer_idx for layer in empty.model.layers[1::2]] == [0, 1]


def test_a_layer_that_adds_nothing_goes_first_by_every_choice():
    for by in ("kl", "entropy", "cosine"):
        model, batches = photos()
        output = model.vit.layers[1].attention.o_proj
        output.weight.data.zero_()
        output.bias.data.zero_()
        before = run(model, batches[0])
        plan, _ = done(model, batches, remove=1, by=by, stand_in="nothing")
        assert list(plan.edits) == ["vit.layers.1.attention"]
        assert isinstance(model.vit.layers[1].attention, Nothing)
        assert run(model, batches[0]).equal(before)


def test_stand_ins_are_nearer_than_nothing_and_context_nearer_than_none():
    model, batches = photos(count=24)
    reference = Answers.of(model, batches[-4:])
    distances = []
    for options in ({"stand_in": "nothing"}, {"context": False, "refit": False}, {"refit": False}):
        copied = copy.deepcopy(model)
        done(copied, batches[:-4], remove=2, by="cosine", **options)
        distances.append(reference.distance(copied))
    assert distances[2] < distances[1] < distances[0]


def test_a_second_fit_makes_up_for_the_first_stand_in():
    model, batches = photos(count=24)
    plan, _ = done(model, batches, remove=2)
    assert set(plan.notes["fitted to"]) == set(plan.edits)
    assert list(plan.notes["chosen"].values()) == sorted(plan.notes["chosen"].values())
    assert run(model, batches[0]).isfinite().all()


def test_bound_tells_what_no_linear_map_explains():
    model, batches = decoder(2)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()  # what leaves is what came
    plan, _ = done(model, batches, remove=1, by="bound", refit=False)
    scores = plan.notes["scores"]
    assert list(plan.edits) == ["model.layers.0.self_attn"]
    assert scores["model.layers.0.self_attn"] < 1e-6 < scores["model.layers.1.self_attn"]


def test_the_output_beside_an_attention_goes_with_it():
    model, batch = MODELS["bert"]()
    done(model, [batch], remove=1, only=("bert.encoder.layer.1",))
    attention = model.bert.encoder.layer[1].attention
    assert isinstance(attention.self, StandIn) and isinstance(attention.output.dense, nn.Identity)
    assert run(model, batch).isfinite().all()


def test_what_cannot_go_is_refused_by_name():
    refused = DropAttention().plan(View(MODELS["t5"]()[0])).notes["refused"]
    assert all("another sequence" in why or "more than tokens" in why for why in refused.values()) and refused
    mixed, _ = text("gemma2", num_key_value_heads=2, head_dim=8)
    assert "several kinds" in next(iter(DropAttention().plan(View(mixed)).notes["refused"].values()))
    model, _ = decoder(2)
    with pytest.raises(CompressError, match="one attention at least must stay"):
        DropAttention(remove=2).plan(View(model))
    with pytest.raises(CompressError, match="1 of 2"):
        DropAttention(remove=2, only=("model.layers.0",)).plan(View(decoder()[0]))
    assert DropAttention(remove=0).plan(View(model)).edits == {}


def test_places_answer_without_a_change_of_the_tree():
    module = Nothing(pair=True)
    place = Place("x", nn.Linear(2, 2), nn.Linear(2, 2), module)
    forwards = place.forwards()
    assert not place.context and forwards[place.attention](torch.ones(1, 1, 2))[0].eq(0).all()
    assert forwards[place.output](torch.ones(1)).eq(1).all()
