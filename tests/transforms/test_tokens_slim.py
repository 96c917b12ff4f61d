"""tokens.slim: what the mixing conserves, how it begins, the way back, and whole models."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from compress.errors import CompressError
from compress.flops import count
from compress.nn.token_slim import SlimAfter, Slimmed, mixed
from compress.outputs import relative_error, run
from compress.slimming import begin, clusters, distances, recalibration, settle
from compress.teaching import seen
from compress.transform import Plan
from compress.transforms.tokens.merge import Merge
from compress.transforms.tokens.slim import Slim
from compress.view import View


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(count=3, special=1, width=32, random=True):
    made = SlimAfter(Slimmed(), special, count, width, draw(1))
    for number, weight in enumerate(made.parameters()):
        weight.data = draw(*weight.shape, seed=number) if random else weight.data
    return made


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), tokens=st.integers(2, 12), count=st.integers(1, 6), seed=st.integers(0, 99))
def test_new_tokens_are_convex_combinations_and_old_ones_have_whole_shares(batch, tokens, count, seed):
    x, logits = draw(batch, tokens, 4, seed=seed), 5 * draw(batch, tokens, count, seed=seed + 1)
    y, share = mixed(x, logits)
    assert y.shape == (batch, count, 4) and (share >= 0).all()
    torch.testing.assert_close(share.sum(2), torch.ones(batch, tokens).double())
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    assert ((y >= low - 1e-12) & (y <= high + 1e-12)).all()
    torch.testing.assert_close(mixed(x, logits + draw(1, 1, count))[0], y, msg="a constant of a new token changes none")
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    moved, shares = mixed(x[:, order], logits[:, order])
    torch.testing.assert_close(moved, y)
    torch.testing.assert_close(shares, share[:, order])


def test_hard_logits_are_means_of_clusters_and_copies_on_the_way_back():
    x, home = draw(2, 6, 4), torch.tensor([0, 0, 1, 2, 2, 2])
    y, share = mixed(x, 1e4 * torch.nn.functional.one_hot(home, 3).double().expand(2, -1, -1))
    torch.testing.assert_close(y, torch.stack([x[:, :2].mean(1), x[:, 2], x[:, 3:].mean(1)], 1))
    torch.testing.assert_close(share @ y, y[:, home])


def test_special_tokens_stay_and_the_way_back_moves_each_token_as_its_parts():
    slim, again, x = module(), module(count=2), draw(2, 9, 32)
    again.tokens = slim.tokens
    first = slim.fewer(x)
    assert first.shape == (2, 4, 32) and first[:, 0].equal(x[:, 0])
    torch.testing.assert_close(slim.tokens.whole(first), x)
    second = again.fewer(first + 1)
    assert second.shape == (2, 3, 32)
    torch.testing.assert_close(slim.tokens.whole(second + 1), x + 2, msg="what all parts share all tokens get")
    share = slim.tokens.stages[0].share_BnK
    step = draw(2, 3, 32, seed=5)
    slim.tokens.stages = slim.tokens.stages[:1]
    moved = slim.tokens.unmerge(torch.cat([first[:, :1], first[:, 1:] + step], 1))
    torch.testing.assert_close(moved[:, 1:], x[:, 1:] + share @ step)
    assert slim.tokens.stages == []
    few = draw(1, 3, 32)
    assert slim.fewer(few).equal(few) and slim.tokens.stages == [], "two tokens are no more than three"


@settings(deadline=None, max_examples=20)
@given(kinds=st.integers(1, 6), extra=st.integers(0, 6), seed=st.integers(0, 99))
def test_clusters_find_what_is_planted_and_each_is_there(kinds, extra, seed):
    home = torch.cat([torch.arange(kinds), torch.arange(extra) % kinds])
    order = torch.randperm(len(home), generator=torch.Generator().manual_seed(seed))
    x = 10 * draw(3, kinds, 16, seed=seed)[:, home[order]] + 0.01 * draw(3, len(home), 16, seed=seed + 1)
    found = clusters(distances(x), kinds)
    assert sorted(found.unique().tolist()) == [*range(kinds)]
    same = home[order][:, None] == home[order]
    assert ((found[:, None] == found) == same).all()


def test_the_beginning_finds_planted_clusters_wherever_they_are():
    slim = module(count=4, special=0, random=False)
    centres, home = 3 * draw(4, 32), torch.arange(12) // 3
    x = centres[home] + 0.05 * draw(6, 12, 32, seed=1)
    told = settle(slim, x)
    assert told["by clusters"] < told["left out"] < 0.05
    y, order = slim.fewer(x), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slim.fewer(x[:, order]), y, msg="tokens are found by what they are")
    share = slim.tokens.stages[0].share_BnK
    assert (share.argmax(2)[:, :, None] == share.argmax(2)[:, None]).equal((home[:, None] == home).expand(6, 12, 12))
    assert (share.amax(2) > 0.9).all()


def test_more_new_tokens_than_the_mlp_has_room_for_are_still_told_apart():
    slim, x = module(count=12, special=0, random=False), 3 * draw(20, 32).expand(5, -1, -1) + draw(5, 20, 32, seed=1)
    assert len(slim.inner) == 16
    assert settle(slim, x)["left out"] < 0.5


def image(name="vit", kind="AutoModel", **options):
    model = models.of(name, kind, **(models.IMAGE | {"num_hidden_layers": 4} | options))
    return model, [{"pixel_values": models.noise(8, 3, 32, 32)[at : at + 2]} for at in range(0, 8, 2)]


def compressed(model, batches, **options):
    """A slimmed copy, through the plan's JSON as a checkpoint keeps it."""
    view = View(copy.deepcopy(model))
    method = Slim(**options)
    plan = method.calibrate(view, method.plan(view), batches)
    Slim.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits)), plan.tensors))
    return view.model, plan


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


@pytest.mark.parametrize(
    ("name", "options", "special"),
    [
        ("vit", {}, 1),
        ("deit", {}, 2),
        ("dinov2_with_registers", {"num_register_tokens": 4}, 5),
        ("clip_vision_model", {}, 1),
    ],
)
def test_blocks_after_it_see_fewer_and_special_tokens_are_left_alone(name, options, special):
    model, batches = image(name, **options)
    stock = answers(model, batches[0])
    less, plan = compressed(model, batches, keep=0.5, blocks=(0, 2), steps=1)
    lengths, view = [], View(less)
    for block in view.blocks():
        view.module(block.path).register_forward_pre_hook(lambda it, args: lengths.append(args[0].shape[1] - special))
    out = answers(less, batches[0])
    assert lengths == [16, 8, 8, 4] and out.shape == stock.shape and out.isfinite().all()
    assert [edit["count"] for edit in plan.edits.values()] == [8, 4]
    assert answers(less, batches[0]).equal(out) and answers(model, batches[0]).equal(stock)
    assert count(less, batches[0]) < count(model, batches[0])
    assert count(copy.deepcopy(less).to("meta"), batches[0]) == count(less, batches[0])


def test_images_of_another_size_give_as_many_tokens():
    model, batches = image("dinov2")
    small = [{"pixel_values": batch["pixel_values"][..., :24, :24]} for batch in batches]
    _, plan = compressed(model, small, keep=0.5, blocks=(0,), steps=1)
    assert [edit["count"] for edit in plan.edits.values()] == [4], "of the nine patches that the data have"
    less, _ = compressed(model, batches, keep=0.5, blocks=(0,), steps=1)
    assert answers(less, small[0]).shape == answers(model, small[0]).shape
    with pytest.raises(CompressError, match="differ in size"):
        compressed(model, batches[:2] + small, keep=0.5)


def test_training_is_kept_only_where_it_helps_data_held_out(monkeypatch):
    model, batches = image(kind="AutoModelForImageClassification")
    batches = batches[:1] * 4  # so that what is learned holds for what is held out
    trained, better = compressed(model, batches, keep=0.5, steps=40)
    monkeypatch.setattr("compress.transforms.tokens.slim.RATE", 1e3)
    spoilt, worse = compressed(model, batches, keep=0.5, steps=5)
    monkeypatch.setattr("compress.transforms.tokens.slim.RATE", 0.0)
    start, _ = compressed(model, batches, keep=0.5, steps=1)
    assert better.notes["error"] < better.notes["error at the start"]
    assert worse.notes["error"] == worse.notes["error at the start"]
    torch.testing.assert_close(answers(spoilt, batches[-1]), answers(start, batches[-1]))
    errors = [relative_error(answers(it, batches[-1]), answers(model, batches[-1])) for it in (start, trained)]
    assert errors[1] < errors[0]
    for name, weight in model.state_dict().items():
        assert trained.state_dict()[name].equal(weight), "the model's own weights stay"


def test_recalibration_is_the_distance_of_the_tokens():
    model, batches = image()
    distance = recalibration(model, batches)
    with torch.no_grad():
        layers = seen(model, batches[1])[1]
    assert distance(layers, batches[1]) == 0
    assert distance([2 * layers[-1]], batches[1]).item() == pytest.approx(1)


def test_it_begins_nearer_than_by_chance():
    model, batches = image()
    view = View(model)
    plan = Slim(keep=0.5, blocks=(0,)).plan(view)
    student = copy.deepcopy(model)
    Slim.model_construct().apply(View(student), plan)
    slim = student.get_submodule(next(iter(plan.edits))).merge
    even = relative_error(answers(student, batches[0]), answers(model, batches[0]))
    (told,) = begin(student, [slim], batches)
    assert told["left out"] < 1
    assert relative_error(answers(student, batches[0]), answers(model, batches[0])) < even


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("llama", "model.layers.0", "it is causal"),
        ("bert", "bert.encoder.layer.0", "no patches of an image"),
        ("swin", "encoder.layers.0.blocks.0", "within windows"),
        ("dit", "transformer_blocks.0", "hand on the full image"),
    ],
)
def test_refused_by_name_with_the_reason(name, path, reason):
    view = View(models.MODELS[name]()[0])
    plan = Slim().plan(view)
    assert path not in plan.edits and reason in plan.notes["refused"][path]
    with pytest.raises(CompressError, match=f"cannot change {re.escape(path)}: .*{re.escape(reason)}"):
        Slim(only=(path,)).plan(view)


def test_nothing_to_slim_is_nothing_and_what_slims_already_is_refused():
    model, batches = image()
    for options in ({"keep": 1.0}, {"blocks": ()}):
        assert Slim(**options).plan(View(model)).edits == {}
    less, _ = compressed(model, batches, keep=0.5, steps=1)
    assert "merges tokens already" in str(Merge().plan(View(less)).notes)


def test_compiles_without_a_graph_break_and_once():
    model, batches = image()
    less, _ = compressed(model, batches, keep=0.5, steps=1)
    torch._dynamo.reset()
    compiled = torch.compile(less, backend="eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled, batches[0]), answers(less, batches[0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers(compiled, batches[0])
    halves = [{"pixel_values": batch["pixel_values"].bfloat16()} for batch in batches]
    half, _ = compressed(model.bfloat16(), halves, keep=0.5, steps=1)
    assert answers(half, halves[0]).isfinite().all() and answers(less.bfloat16(), halves[0]).isfinite().all()
