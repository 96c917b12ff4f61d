"""tokens.prune: scores against the full attention matrix, what the choice and the fusion conserve, and whole models."""

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
from compress.nn.token_merge import Tokens
from compress.nn.token_prune import ROWS, Keep, PruneAfter, Score, choose, even_rows, fuse
from compress.outputs import relative_error, run
from compress.transform import Plan
from compress.transforms.tokens.merge import Merge
from compress.transforms.tokens.prune import Prune, quarters
from compress.view import View

keeps = {"share": st.floats(0.05, 1), "first": st.integers(0, 2), "last": st.booleans(), "spread": st.booleans()}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pruned(x, score, keep, alive=None):
    """What a hook makes of x with these scores, and its state."""
    tokens = Tokens(alive=alive, score=score)
    return PruneAfter(tokens, keep).fewer(x), tokens


@settings(deadline=None, max_examples=60)
@given(**keeps, batch=st.integers(1, 3), tokens=st.integers(1, 24), seed=st.integers(0, 999))
def test_what_goes_becomes_one_convex_combination(share, first, last, spread, batch, tokens, seed):
    x, score, keep = draw(batch, tokens, 4, seed=seed), draw(batch, tokens, seed=seed + 1).abs(), None
    keep = Keep(share, first, last, spread)
    out, state = pruned(x, score, keep)
    left = min(keep.kept(tokens) + 1, tokens)
    assert out.shape[1] == left
    if state.slot is None:
        assert out is x and left == tokens
        return
    assert state.size.dtype == torch.float32 and (state.size.sum(1) == tokens).all() and (state.size >= 1).all()
    assert state.slot.gather(1, state.origin).equal(torch.arange(left).expand(batch, -1))
    for row in range(batch):
        fused = int(state.size[row].argmax())
        rest = (state.slot[row] == fused).nonzero()[:, 0]
        weight = score[row, rest] / score[row, rest].sum()
        torch.testing.assert_close(out[row, fused], weight @ x[row, rest])
        others = [i for i in range(left) if i != fused]
        assert out[row, others].equal(x[row, state.origin[row, others]])
        kept = [i for i in range(tokens) if i not in rest]
        assert {*range(min(first, tokens)), *range(tokens - int(last), tokens)} <= {*kept}
        middle = [i for i in kept if first <= i < tokens - int(last)]
        if not spread and middle:
            assert score[row, middle].min() >= score[row, rest].max()
    whole, slot = out.gather(1, state.slot[..., None].expand_as(x)), state.slot
    assert state.unmerge(out).equal(whole) and slot.shape == (batch, tokens)


def test_the_stages_of_the_paper():
    tokens, seen = 197, []
    for _ in range(3):
        tokens = Keep(0.7, 1).kept(tokens)
        seen.append(tokens - 1)
    assert seen == [138, 97, 68]
    assert torch.tensor([Keep(0.7, 2, True).kept(n) for n in range(40)]).equal(
        Keep(0.7, 2, True).kept(torch.arange(40))
    )
    assert [quarters(length) for length in (1, 2, 3, 6, 12)] == [{0}, {0}, {0, 1}, {1, 3, 4}, {3, 6, 9}]


def test_ties_go_to_the_first():
    matching, fused = choose(torch.ones(1, 9), Keep(0.5, 1))
    assert matching.kept.tolist() == [[0, 1, 2, 3, 4, 5]] and fused.nonzero()[:, 1].tolist() == [5, 6, 7, 8]


def test_equal_tokens_that_go_are_what_they_were_to_rounding():
    x, score = draw(2, 12, 4), draw(2, 12, seed=1).abs()
    score[:, 4:9] *= 1e-3
    x[:, 4:9] = x[:, 4:5]
    out, tokens = pruned(x, score, Keep(7 / 12))
    assert tokens.size.sort(1).values.tolist() == [[1] * 7 + [5]] * 2
    torch.testing.assert_close(tokens.unmerge(out), x, rtol=1e-14, atol=1e-14)


def test_a_rest_that_nobody_looks_at_is_averaged():
    x, score = torch.ones(1, 8, 2), torch.zeros(1, 8)
    score[0, :3] = 1
    out, tokens = pruned(x, score, Keep(3 / 8))
    assert out.equal(torch.ones(1, 4, 2)) and tokens.size.tolist() == [[1, 1, 1, 5]]


def test_spread_reaches_where_the_highest_scores_are_not():
    score = torch.tensor([[0.0, 3, 3, 3, 3, 2, 2, 2, 2, 2]])
    top, _ = choose(score, Keep(4 / 9, 1))
    spread, _ = choose(score, Keep(4 / 9, 1, spread=True))
    assert top.kept[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert spread.kept[0].tolist() == [0, 1, 2, 3, 5, 8]  # 2 is the first of the rest


@settings(deadline=None, max_examples=40)
@given(
    **keeps,
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    extra=st.integers(0, 5),
    left=st.booleans(),
    seed=st.integers(0, 999),
)
def test_padding_changes_nothing(share, first, last, spread, lengths, extra, left, seed):
    """Every row of a padded batch gives what it gives alone; padding may even be nan."""
    keep, longest = Keep(share, first, last, spread), max(lengths) + extra
    batch = torch.full((len(lengths), longest, 4), torch.nan, dtype=torch.float64)
    score, mask = torch.zeros(len(lengths), longest, dtype=torch.float64), torch.zeros(len(lengths), longest).bool()
    rows = []
    for i, length in enumerate(lengths):
        here = slice(longest - length, None) if left else slice(length)
        rows.append((draw(1, length, 4, seed=seed + i), draw(1, length, seed=seed - i).abs(), here))
        batch[i, here], score[i, here], mask[i, here] = rows[i][0][0], rows[i][1][0], True
    out, tokens = pruned(batch, score, keep, mask)
    alive = mask if tokens.slot is None else tokens.alive
    whole = tokens.unmerge(out)
    for i, (x, own, here) in enumerate(rows):
        expected, alone = pruned(x, own, keep)
        torch.testing.assert_close(out[i][alive[i]], expected[0])
        torch.testing.assert_close(whole[i, here], alone.unmerge(expected)[0])


@settings(deadline=None, max_examples=20)
@given(**keeps, order=st.permutations([0, 1, 2]))
def test_rows_of_a_batch_do_not_know_each_other(share, first, last, spread, order):
    x, score, keep = draw(3, 12, 4), draw(3, 12, seed=1).abs(), Keep(share, first, last, spread)
    out, tokens = pruned(x, score, keep)
    other, others = pruned(x[order], score[order], keep)
    torch.testing.assert_close(other, out[order])
    assert tokens.slot is None or others.slot.equal(tokens.slot[order])


@pytest.mark.parametrize("masked", [None, "bool", "float", "rows"])
@pytest.mark.parametrize("groups", [4, 2])
def test_scores_are_those_of_the_full_matrix(masked, groups):
    query, key, value = draw(2, 4, 20, 8), draw(2, groups, 20, 8, seed=1), draw(2, groups, 20, 8, seed=2)
    alive, mask = torch.ones(2, 20, dtype=torch.bool), None
    if masked:
        alive[1, 14:] = False
        mask = alive[:, None, None]
        mask = mask if masked != "float" else torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
        mask = mask.expand(-1, -1, 20, -1) if masked == "rows" else mask
    scores = query @ key.repeat_interleave(4 // groups, 1).transpose(2, 3) * 0.3
    full = scores.masked_fill(~alive[:, None, None], -torch.inf).softmax(-1)
    added = full[:, :, 0, :, None] * value.repeat_interleave(4 // groups, 1)
    rows = even_rows(alive, 2, 20, None)
    assert rows.shape == (2, ROWS) and rows[:, 0].tolist() == [0, 0] and (rows[1].max() < 14) == bool(masked)
    received = torch.stack([full[i, :, rows[i]].mean((0, 1)) for i in range(2)])
    wanted = {
        "class_attention": full[:, :, 0].mean(1),
        "value_aware": added.square().sum((1, 3)).sqrt(),
        "received": received,
    }
    for by, score in wanted.items():
        tokens = Tokens(alive=alive if masked else None)
        core = Score(tokens, by)
        core.inner = Softmax()
        plain = core.inner(nn.Identity(), query, key, value, mask, 0.3, False)
        assert core(nn.Identity(), query, key, value, mask, 0.3, False).equal(plain)
        torch.testing.assert_close(tokens.score, score)


def compressed(model, **options):
    """A pruned copy, through the plan's JSON as a checkpoint keeps it."""
    model = copy.deepcopy(model)
    view = View(model)
    plan = Prune(**options).plan(view)
    Prune.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits))))
    return model


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


def image(name, **options):
    model = models.of(name, "AutoModel", **(models.IMAGE | {"num_hidden_layers": 4} | options))
    return model, {"pixel_values": models.noise(3, 3, 32, 32)}


@pytest.mark.parametrize("name", ["bert", "vit", "dinov2", "clip"])
@pytest.mark.parametrize("score", ["class_attention", "value_aware", "received"])
def test_every_model_it_takes(name, score):
    model, batch = models.MODELS[name]()
    stock, less = answers(model, batch), compressed(model, keep=0.5, score=score, select="spread")
    out = answers(less, batch)
    assert out.shape == stock.shape and out.isfinite().all() and not out.equal(stock)
    assert out.equal(answers(less, batch)), "two runs must agree"
    assert answers(model, batch).equal(stock), "the original must not be touched through its copy"
    # Nothing goes where all but one token stay: the hooks and cores are there and change no bit.
    assert answers(compressed(model, keep=0.99, score=score), batch).equal(stock)
    assert [*less.state_dict()] == [*model.state_dict()]
    assert count(less, batch) < count(model, batch)


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [("vit", {}, 1), ("deit", {}, 2), ("dinov2_with_registers", {"num_register_tokens": 4}, 5)],
)
def test_blocks_after_it_see_fewer_and_special_tokens_keep_their_place(name, options, first):
    model, batch = image(name, **options)
    less, seen, view = compressed(model, keep=0.5, blocks=(0, 2)), [], None
    view = View(less)
    for block in view.blocks():
        module = view.module(block.path)
        module.register_forward_pre_hook(lambda block, args: seen.append((args[0].shape[1], block.merge.tokens.size)))
    out = answers(less, batch)
    assert [tokens for tokens, _ in seen] == [first + 16, first + 9, first + 9, first + 6]
    for tokens, size in seen[1:]:
        assert (size[:, :first] == 1).all() and (size.sum(1) == first + 16).all() and size.shape[1] == tokens
    assert out.shape == answers(model, batch).shape


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pruning_equal_tokens_is_exact_when_they_weigh_what_they_stand_for(attention):
    model, batch = image("vit", attn_implementation=attention)
    model = model.double()
    with torch.no_grad():
        model.get_parameter("embeddings.position_embeddings").zero_()
    batch = {"pixel_values": models.noise(2, 3, 8, 8).double().repeat(1, 1, 4, 4)}
    stock = answers(model, batch)
    for score in ("class_attention", "value_aware", "received"):
        exact = answers(compressed(model, keep=0.3, score=score, blocks=(0, 1), proportional=True), batch)
        torch.testing.assert_close(exact, stock, rtol=1e-6, atol=1e-6)
    assert relative_error(answers(compressed(model, keep=0.3), batch), stock) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options", [{"score": "class_attention"}, {"score": "received"}, {"score": "value_aware", "select": "spread"}]
)
def test_a_padded_batch_gives_what_its_rows_give_alone(attention, options):
    model = models.text("bert", "AutoModel", num_hidden_layers=4, attn_implementation=attention)[0]
    less, lengths = compressed(model, keep=0.5, proportional=True, **options), [12, 7, 2, 9]
    ids, mask, padded = models.tokens(12, batch=4), torch.zeros(4, 14, dtype=torch.long), torch.zeros(4, 14).long()
    for i, length in enumerate(lengths):
        mask[i, :length], padded[i, :length] = 1, ids[i, :length]
    together = answers(less, {"input_ids": padded, "attention_mask": mask})
    for i, length in enumerate(lengths):
        alone = answers(less, {"input_ids": ids[i : i + 1, :length]})
        torch.testing.assert_close(together[i : i + 1, :length], alone, rtol=1e-4, atol=1e-5)


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
    plan = Prune().plan(view)
    assert path not in plan.edits and reason in plan.notes["refused"][path]
    with pytest.raises(CompressError, match=f"cannot change {re.escape(path)}: .*{re.escape(reason)}"):
        Prune(only=(path,)).plan(view)


def test_what_merges_or_prunes_already_is_refused():
    model, _ = image("vit")
    for options in ({"keep": 1.0}, {"blocks": ()}):
        assert Prune(**options).plan(View(model)).edits == {}
    less = compressed(model)
    assert "merges tokens already" in str(Merge().plan(View(less)).notes)
    assert "merges tokens already" in str(Prune().plan(View(less)).notes)


def test_without_a_class_token_what_tokens_receive_decides():
    model, batch = image("siglip_vision_model")
    assert Prune().plan(View(model)).edits == {}
    assert count(compressed(model, score="received", keep=0.5), batch) < count(model, batch)


@pytest.mark.parametrize("select", ["top", "spread"])
def test_compiles_without_a_graph_break_and_once(select):
    model, batch = image("vit")
    less = compressed(model, keep=0.5, select=select)
    torch._dynamo.reset()
    compiled = torch.compile(less, backend="eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled, batch), answers(less, batch))
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers(compiled, batch)
    half = {"pixel_values": batch["pixel_values"].bfloat16()}
    assert answers(compressed(model.bfloat16(), keep=0.5), half).isfinite().all()


def test_weights_stay_finite_in_half_precision():
    x, score = torch.ones(1, 6, 2, dtype=torch.float16), torch.full((1, 6), 1e-38)
    matching, fused = choose(score, Keep(0.5))
    assert fuse(x, score, matching, fused).equal(x[:, :4])
