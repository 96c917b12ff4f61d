"""tokens.pack: a packed batch is its images one by one, the choice by its share of the scores, and whole models."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from compress.attend import Softmax
from compress.errors import CompressError
from compress.flops import count
from compress.nn.token_pack import Apart, Mass, PackAfter, Packed, fewest, packing, stop
from compress.outputs import run
from compress.transform import Plan
from compress.transforms.tokens.merge import Merge
from compress.transforms.tokens.pack import Pack
from compress.view import View

masses = {"mass": st.floats(0.05, 1), "first": st.integers(0, 2), "last": st.booleans()}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed(x, score, rule, alive=None):
    """What a hook makes of x with these scores, and its state."""
    tokens = Packed(alive=alive, score=score)
    return PackAfter(tokens, rule).shrink(None, (), x), tokens


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 4), tokens=st.integers(1, 20), mass=st.floats(0, 1), seed=st.integers(0, 999))
def test_the_fewest_tokens_that_hold_the_mass(rows, tokens, mass, seed):
    score = draw(rows, tokens, seed=seed).abs()
    chosen = fewest(score, mass)
    for row, own in zip(chosen, score, strict=True):
        held, total = own[row].sum(), own.sum()
        assert held >= mass * total - 1e-12
        if row.any():
            assert held - own[row].min() < mass * total + 1e-12, "one less would do"
            assert row.all() or own[row].min() >= own[~row].max()
    assert chosen.all() if mass == 1 else chosen.sum(1).max() <= Mass(mass).at_most(tokens)


@settings(deadline=None, max_examples=60)
@given(**masses, batch=st.integers(1, 4), tokens=st.integers(1, 16), seed=st.integers(0, 999))
def test_what_stops_is_fused_and_nothing_else_changes(mass, first, last, batch, tokens, seed):
    x, score, rule = (
        draw(batch, tokens, 3, seed=seed),
        draw(batch, tokens, seed=seed + 1).abs(),
        Mass(mass, first, last),
    )
    out, state = packed(x, score, rule)
    assert sum(images * number for images, number in state.groups) == out.shape[1]
    assert max(number for _, number in state.groups) <= rule.at_most(tokens)
    for row in range(batch):
        stays, fused = state.inside[row, :tokens], state.inside[row, tokens]
        assert stays[: min(first, tokens)].all() and stays[tokens - int(last) :].all()
        mine = [(place, at) for at, place in enumerate(state.index.tolist()) if place // (tokens + 1) == row]
        assert [place % (tokens + 1) for place, _ in mine] == state.inside[row].nonzero()[:, 0].tolist()
        assert out[0, [at for _, at in mine][: int(stays.sum())]].equal(x[row, stays])
        assert bool(fused) == (not stays.all())
        if fused:
            weight = score[row, ~stays] / score[row, ~stays].sum()
            torch.testing.assert_close(out[0, mine[-1][1]], weight @ x[row, ~stays])
            assert (~stays).sum() > 1, "one alone must stay itself"
    assert state.unmerge(out).equal(x) and state.groups is None


def test_what_stopped_moves_as_the_fused_one_does_also_when_it_is_fused_again():
    x, score = draw(2, 9, 3), draw(2, 9, seed=1).abs()
    tokens, rule = Packed(score=score), Mass(0.7, 1)
    out = tokens.pack(x, rule)
    first = ~tokens.inside[:, :9]
    assert first.any(1).all()
    step = draw(3, seed=2)
    tokens.score = draw(out.shape[1], seed=3).abs()
    out = tokens.pack(out + step, rule)
    second = ~tokens.inside[:, :9]
    assert (second & ~first).any() and (second | ~first).all()
    fused = tokens.index % 10 == 9
    end = tokens.unmerge(out + 2 * step * fused[None, :, None])
    torch.testing.assert_close(end, x + step + 2 * step * second[..., None])


@settings(deadline=None, max_examples=40)
@given(
    **masses,
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    extra=st.integers(0, 4),
    left=st.booleans(),
    seed=st.integers(0, 999),
)
def test_padding_is_left_out_and_comes_back(mass, first, last, lengths, extra, left, seed):
    rule, longest = Mass(mass, first, last), max(lengths) + extra
    batch = torch.full((len(lengths), longest, 4), torch.nan, dtype=torch.float64)
    score, alive = torch.zeros(len(lengths), longest, dtype=torch.float64), torch.zeros(len(lengths), longest).bool()
    rows = []
    for i, length in enumerate(lengths):
        here = slice(longest - length, None) if left else slice(length)
        rows.append((draw(1, length, 4, seed=seed + i), draw(1, length, seed=seed - i).abs(), here))
        batch[i, here], score[i, here], alive[i, here] = rows[i][0][0], rows[i][1][0], True
    out, tokens = packed(batch, score, rule, alive)
    assert out.isfinite().all()
    whole = tokens.unmerge(2 * out)
    for i, (x, own, here) in enumerate(rows):
        alone, state = packed(x, own, rule)
        torch.testing.assert_close(whole[i, here], state.unmerge(2 * alone)[0])


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=6), groups=st.sampled_from([1, 2]))
def test_attention_apart_is_that_under_a_block_diagonal_mask(counts, groups):
    inside = torch.arange(6) < torch.tensor(counts)[:, None]
    index, sizes = packing(inside)
    image = index // 6
    assert sum(number for number, _ in sizes) == len(counts) and len(sizes) == len({*counts})
    total = int(inside.sum())
    query, key, value = draw(1, 4, total, 8), *(draw(1, 4 // groups, total, 8, seed=seed) for seed in (1, 2))
    core = Apart(Packed(groups=sizes))
    core.inner = Softmax()
    out = core(nn.Identity(), query, key, value, None, 0.3, False)
    full = core.inner(nn.Identity(), query, key, value, (image[:, None] == image)[None, None], 0.3, False)
    torch.testing.assert_close(out, full, rtol=1e-12, atol=1e-12)


def test_the_largest_scores_of_each_image_decide_alone():
    score = torch.tensor([[9.0, 5, 3, 1, 1], [9.0, 1, 1, 1, 1]])
    inside = torch.ones(2, 6, dtype=torch.bool).index_fill(1, torch.tensor(5), False)
    keep, x = stop(torch.zeros(2, 6, 1), inside, torch.nn.functional.pad(score, (0, 1)), Mass(0.75, 1))
    assert keep.tolist() == [[True, True, True, False, False, True], [True, True, True, True, True, False]]
    assert x.equal(torch.zeros(2, 6, 1))


def compressed(model, **options):
    """A packed copy, through the plan's JSON as a checkpoint keeps it."""
    model = copy.deepcopy(model)
    view = View(model)
    plan = Pack(**options).plan(view)
    Pack.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits))))
    return model


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


def image(name, kind="AutoModel", **options):
    """A tiny model with attention as sharp as a trained one's, and images that differ in contrast."""
    model = models.of(name, kind, **(models.IMAGE | {"num_hidden_layers": 4} | options))
    for attention in View(model).attentions():
        for role in {"q", "k"} & attention.projections().keys():
            model.get_submodule(attention.projections()[role]).weight.data *= 8
    return model, {"pixel_values": models.noise(5, 3, 32, 32) * torch.tensor([0.2, 1, 3, 1, 9])[:, None, None, None]}


def lengths(model):
    """The groups of images that each block of the next forward sees."""
    found = []
    for block in View(model).blocks():
        model.get_submodule(block.path).register_forward_pre_hook(lambda it, _: found.append(it.merge.tokens.groups))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"score": "received"}, {"score": "class_attention"}])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_packed_batch_is_its_images_one_by_one(name, options, attention):
    model, batch = image(name, attn_implementation=attention)
    less = compressed(model.double(), mass=0.6, **options)
    pixels = batch["pixel_values"].double()
    groups = lengths(less)
    together = answers(less, {"pixel_values": pixels})
    assert any(found and len(found) > 1 for found in groups), "images must need different numbers of tokens"
    alone = torch.cat([answers(less, {"pixel_values": row[None]}) for row in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
    order = [3, 0, 4, 1, 2]
    moved = answers(less, {"pixel_values": pixels[order]})
    torch.testing.assert_close(moved, together[order], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("score", ["class_attention", "value_aware", "received"])
def test_a_padded_batch_gives_what_its_rows_give_alone(attention, score):
    model = models.text("bert", "AutoModel", num_hidden_layers=4, attn_implementation=attention)[0].double()
    less, lengths = compressed(model, mass=0.6, score=score), [12, 7, 2, 9]
    ids, mask, padded = models.tokens(12, batch=4), torch.zeros(4, 14, dtype=torch.long), torch.zeros(4, 14).long()
    for i, length in enumerate(lengths):
        mask[i, :length], padded[i, :length] = 1, ids[i, :length]
    together = answers(less, {"input_ids": padded, "attention_mask": mask})
    for i, length in enumerate(lengths):
        alone = answers(less, {"input_ids": ids[i : i + 1, :length]})
        torch.testing.assert_close(together[i : i + 1, :length], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["bert", "vit", "dinov2", "clip"])
def test_every_model_it_takes(name):
    model, batch = models.MODELS[name]()
    stock, less = answers(model, batch), compressed(model, mass=0.5)
    out = answers(less, batch)
    assert out.shape == stock.shape and out.isfinite().all() and not out.equal(stock)
    assert out.equal(answers(less, batch)), "two runs must agree"
    assert answers(model, batch).equal(stock), "the original must not be touched through its copy"
    assert [*less.state_dict()] == [*model.state_dict()]
    assert count(less, batch) < count(model, batch)


def test_with_all_of_the_mass_the_model_is_what_it_was():
    model, batch = image("vit")
    for options in ({"mass": 1.0}, {"blocks": ()}):
        assert Pack(**options).plan(View(model)).edits == {}
    whole = compressed(model, mass=0.5)
    for block in View(whole).blocks():
        part = whole.get_submodule(block.path).merge
        if hasattr(part, "rule") and part.rule is not None:
            part.rule = Mass(1.0, 1)
    groups = lengths(whole)
    torch.testing.assert_close(answers(whole, batch), answers(model, batch))
    assert groups[-1] == [(5, 17)], "all tokens in one group"


def test_operations_are_those_of_the_tokens_that_are_left():
    model, batch = image("vit", "AutoModelForImageClassification")
    less = compressed(model, mass=0.4, blocks=(0,))
    groups = lengths(less)
    told, left, images = count(less, batch), groups[1], len(batch["pixel_values"])
    width, between, size = model.config.hidden_size, model.config.intermediate_size, 17
    assert len(left) > 1
    linears = 2 * (4 * width * width + 2 * width * between)

    def block(tokens):
        return tokens * linears + 4 * tokens * tokens * width

    saved = 3 * (images * block(size) - sum(number * block(tokens) for number, tokens in left))
    scores, means = images * 2 * size * width, images * 2 * (size + 1) * width  # one query of each head
    assert told == count(model, batch) - saved + scores + means
    one = {"pixel_values": batch["pixel_values"][:1]}
    assert count(copy.deepcopy(less).to("meta"), one) >= count(less, one), "on meta as many as there can be"


def test_the_mass_is_found_for_a_budget():
    model, batch = image("vit")
    batches = [batch, {"pixel_values": 3 * models.noise(4, 3, 32, 32)}]
    view, found = View(copy.deepcopy(model)), {}
    method = Pack(flops=0.75)
    assert method.needs_data and not Pack(mass=0.5).uses_data
    for budget in (0.75, 0.85):
        method = Pack(flops=budget)
        plan = method.calibrate(view, method.plan(view), batches)
        found[budget] = plan.notes["mass"]
        assert {edit["rule"]["mass"] for edit in plan.edits.values()} == {plan.notes["mass"]}
    assert 0 < found[0.75] < found[0.85] < 1
    less = compressed(model, mass=found[0.75])
    part = sum(count(less, batch) for batch in batches) / sum(count(model, batch) for batch in batches)
    assert 0.7 < part <= 0.75
    method = Pack(flops=0.1)
    with pytest.raises(CompressError, match="it must be at least 0"):
        method.calibrate(view, method.plan(view), batches)
    with pytest.raises(CompressError, match="both given"):
        Pack(flops=0.5, mass=0.5).plan(view)


def test_a_mask_that_hides_more_than_padding_is_refused():
    model, batch = models.text("bert", "AutoModel", num_hidden_layers=4)
    less, length = compressed(model, mass=0.5), batch["input_ids"].shape[1]
    causal = torch.ones(length, length).tril().bool()[None, None].expand(len(batch["input_ids"]), 1, -1, -1)
    with pytest.raises(CompressError, match="hides more than padding"):
        answers(less, batch | {"attention_mask": causal})
    for _ in range(2):  # what failed is forgotten
        assert answers(less, batch).isfinite().all()


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("llama", "model.layers.0", "it is causal"),
        ("swin", "encoder.layers.0.blocks.0", "within windows"),
        ("dit", "transformer_blocks.0", "hand on the full image"),
        ("whisper", "model.encoder.layers.0", "no class token"),
    ],
)
def test_refused_by_name_with_the_reason(name, path, reason):
    view = View(models.MODELS[name]()[0])
    plan = Pack().plan(view)
    assert path not in plan.edits and reason in plan.notes["refused"][path]
    with pytest.raises(CompressError, match=f"cannot change {re.escape(path)}: .*{re.escape(reason)}"):
        Pack(only=(path,)).plan(view)


def test_what_packs_already_is_refused():
    model, batch = image("siglip_vision_model")
    assert Pack().plan(View(model)).edits == {}
    less = compressed(model, score="received", mass=0.5)
    assert count(less, batch) < count(model, batch)
    assert "merges tokens already" in str(Merge().plan(View(less)).notes)


def test_compiled_it_answers_the_same_for_every_number_of_tokens():
    model, batch = image("vit")
    less = compressed(model, mass=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(less, backend="eager")
    for scale in (1, 4):
        scaled = {"pixel_values": batch["pixel_values"] * scale}
        torch.testing.assert_close(answers(compiled, scaled), answers(less, scaled))
    half = {"pixel_values": batch["pixel_values"].bfloat16()}
    assert answers(compressed(model.bfloat16(), mass=0.5), half).isfinite().all()
