"""tokens.pool: the cells of a grid, what pooling conserves, and the same on whole models."""

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
from compress.nn.token_merge import Tokens
from compress.nn.token_pool import PoolAfter, cells, halved, pooling
from compress.nn.window import ImageSize
from compress.outputs import relative_error, run
from compress.transform import Plan
from compress.transforms.heads.exact import Exact
from compress.transforms.tokens.merge import Merge
from compress.transforms.tokens.pool import Pool
from compress.view import View
from compress_kernels.token_merge.reference import merge

grids = {"height": st.integers(1, 7), "width": st.integers(1, 7), "first": st.integers(0, 3)}


def draw(batch, tokens, seed=0):
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(x, height, width, first, times=1, alive=None):
    """What hooks for a grid of this size make of x, one after the other, and their state."""
    tokens, size = Tokens(alive=alive), ImageSize()
    size.height, size.width = height, width
    for done in range(times):
        x = PoolAfter(tokens, size, first, 1, done).fewer(x)
    return x, tokens


@given(**grids)
def test_cells_are_their_definition(height, width, first):
    slot = cells(height, width, first).tolist()
    assert slot[:first] == [*range(first)]
    for y in range(height):
        for x in range(width):
            assert slot[first + y * width + x] == first + y // 2 * halved(width, 1) + x // 2


@settings(deadline=None, max_examples=40)
@given(**grids, times=st.integers(1, 3), seed=st.integers(0, 99))
def test_pooling_is_a_partition_into_means(height, width, first, times, seed):
    x = draw(2, first + height * width, seed)
    out, tokens = pooled(x, height, width, first, times)
    assert out.shape[1] == first + halved(height, times) * halved(width, times)
    assert (tokens.size.sum(1) == x.shape[1]).all() and tokens.size.dtype == torch.float32
    partition = torch.nn.functional.one_hot(tokens.slot, out.shape[1]).double()
    assert (partition.sum(1) == tokens.size).all(), "no place may be empty"
    torch.testing.assert_close(out, partition.transpose(1, 2) @ x / tokens.size[..., None])
    assert out[:, :first].equal(x[:, :first]) and (tokens.size[:, :first] == 1).all()
    assert tokens.slot.gather(1, tokens.origin).equal(torch.arange(out.shape[1]).expand(2, -1))
    sizes, slot = tokens.size, tokens.slot
    whole = tokens.unmerge(out)
    assert whole.shape == x.shape and tokens.slot is None
    for row, (source, group) in enumerate(zip(whole, slot, strict=True)):
        assert source.equal(out[row][group])
    assert (whole.mean(1) - x.mean(1)).abs().max() < 1e-12 and sizes.sum() == 2 * x.shape[1]


def test_even_grids_are_averaged_as_torch_does():
    x = draw(3, 2 + 6 * 8)
    out, _ = pooled(x, 6, 8, 2)
    picture = x[:, 2:].unflatten(1, (6, 8)).permute(0, 3, 1, 2)
    torch.testing.assert_close(out[:, 2:], torch.nn.functional.avg_pool2d(picture, 2).flatten(2).transpose(1, 2))


def test_constant_cells_stay_to_the_bit_and_come_back_whole():
    coarse = draw(2, 9).unflatten(1, (3, 3))
    x = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    out, tokens = pooled(x, 6, 6, 0)
    assert out.equal(coarse.flatten(1, 2)) and tokens.unmerge(out).equal(x)


def test_padding_never_enters_a_mean():
    x, alive = draw(2, 1 + 16), torch.ones(2, 17, dtype=torch.bool)
    alive[0, [1, 2, 5]] = False  # three of the four tokens of the first cell
    alive[1, [3, 4, 7, 8]] = False  # a whole cell
    x[~alive] = torch.nan
    out, tokens = pooled(x, 4, 4, 1, alive=alive)
    assert out[0].isfinite().all() and out[0, 1].equal(x[0, 6]) and tokens.origin[0, 1] == 6
    assert out[1, 2].isnan().all() and not tokens.alive[1, 2] and out[1, [0, 1, 3, 4]].isfinite().all()
    assert tokens.alive.sum(1).tolist() == [5, 4] and tokens.size.sum(1).tolist() == [14, 13]


@given(st.permutations([0, 1, 2]))
def test_rows_of_a_batch_do_not_know_each_other(order):
    x, alive = draw(3, 17), draw(3, 17, 1)[..., 0] > -1
    out, tokens = pooled(x, 4, 4, 1, alive=alive)
    other, others = pooled(x[order], 4, 4, 1, alive=alive[order])
    assert other.equal(out[order]) and others.origin.equal(tokens.origin[order])


def test_a_matching_of_cells_is_one_of_the_kind_that_merges_use():
    matching = pooling(cells(3, 3, 1), 5, 2)
    assert matching.kept.tolist() == [[0, 1, 3, 7, 9]] * 2
    assert matching.gone.tolist() == [[2, 4, 5, 6, 8]] * 2
    _, size = merge(draw(2, 10), matching, torch.ones(2, 10))
    assert size.tolist() == [[1, 4, 2, 2, 1]] * 2


def compressed(model, **options):
    """A pooled copy, through the plan's JSON as a checkpoint keeps it."""
    model = copy.deepcopy(model)
    view = View(model)
    plan = Pool(**options).plan(view)
    Pool.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits))))
    return model


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


def image(name, height=32, width=32, **options):
    model = models.of(name, "AutoModel", **(models.IMAGE | {"num_hidden_layers": 4} | options))
    return model, {"pixel_values": models.noise(3, 3, height, width)}


def watched(model):
    """A list that fills with the number of tokens that each block is given."""
    seen, view = [], View(model)
    for block in view.blocks():
        view.module(block.path).register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip"])
def test_every_model_it_takes(name):
    model, batch = models.MODELS[name]()
    stock, merged = answers(model, batch), compressed(model)
    out = answers(merged, batch)
    assert out.shape == stock.shape and out.isfinite().all() and not out.equal(stock)
    assert out.equal(answers(merged, batch)), "two runs must agree"
    assert answers(model, batch).equal(stock), "the original must not be touched through its copy"
    assert Pool(blocks=()).plan(View(model)).edits == {}
    assert [*merged.state_dict()] == [*model.state_dict()]
    assert count(merged, batch) < count(model, batch)


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [
        ("vit", {}, 1),
        ("deit", {}, 2),
        ("dinov2_with_registers", {"num_register_tokens": 4}, 5),
        ("siglip_vision_model", {}, 0),
    ],
)
def test_blocks_after_it_see_a_quarter_and_the_model_gives_all(name, options, first):
    model, batch = image(name, **options)
    merged = compressed(model, blocks=(0, 1))
    seen = watched(merged)
    hidden = answers(merged, batch)
    assert seen == [first + 16, first + 4, first + 1, first + 1]
    assert hidden.shape == answers(model, batch).shape


def test_wide_and_odd_images_keep_their_grid():
    model, batch = image("dinov2", 24, 56)
    merged = compressed(model, blocks=(0, 1))
    seen = watched(merged)
    out = answers(merged, batch)
    assert seen == [1 + 3 * 7, 1 + 2 * 4, 1 + 1 * 2, 1 + 1 * 2]
    torch.testing.assert_close(out[:, 1], out[:, 2])  # one cell of four by four
    assert not out[:, 4].equal(out[:, 5])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pooling_equal_tokens_is_exact_when_they_weigh_what_they_stand_for(attention):
    model, batch = image("vit", attn_implementation=attention)
    model = model.double()
    with torch.no_grad():
        model.get_parameter("embeddings.position_embeddings").zero_()
    patch = models.noise(2, 3, 2, 8, 2, 8).permute(0, 1, 2, 4, 3, 5).double()  # B, 3, rows, columns, height, width
    patch = patch.repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch = {"pixel_values": patch.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)}
    stock = answers(model, batch)
    torch.testing.assert_close(answers(compressed(model, blocks=(0,)), batch), stock, rtol=1e-6, atol=1e-6)
    assert relative_error(answers(compressed(model, blocks=(0,), proportional=False), batch), stock) > 1e-3


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("llama", "model.layers.0", "it is causal"),
        ("bert", "bert.encoder.layer.0", "no patches of an image"),
        ("whisper", "model.encoder.layers.0", "no patches of an image"),
        ("swin", "encoder.layers.0.blocks.0", "within windows"),
        ("dit", "transformer_blocks.0", "hand on the full image"),
    ],
)
def test_refused_by_name_with_the_reason(name, path, reason):
    view = View(models.MODELS[name]()[0])
    plan = Pool(blocks=(0,)).plan(view)
    assert path not in plan.edits and reason in plan.notes["refused"][path]
    with pytest.raises(CompressError, match=f"cannot change {re.escape(path)}: .*{re.escape(reason)}"):
        Pool(blocks=(0,), only=(path,)).plan(view)


def test_what_it_cannot_follow_is_refused():
    model, batch = image("vit")
    with pytest.raises(CompressError, match="blocks has 4, it must be from 0 to 3"):
        Pool(blocks=(4,)).plan(View(model))
    reader, _ = models.MODELS["vit"]()
    Exact().apply(View(reader), Exact().plan(View(reader)))  # computes its class token only in the last block
    assert "last of its stack" in str(Pool(blocks=(1,)).plan(View(reader)).notes)
    merged = compressed(model)
    assert "merges tokens already" in str(Merge().plan(View(merged)).notes)
    assert "merges tokens already" in str(Pool().plan(View(merged)).notes)
    hidden, batch = models.MORE["vit_mae"]()  # which encodes half of its patches only
    with pytest.raises(CompressError, match="9 tokens are not 1 and the 4 x 4 patches of an image of 32 x 32"):
        answers(compressed(hidden), batch)


def test_compiles_without_a_graph_break_and_once():
    model, batch = image("vit")
    merged = compressed(model)
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled, batch), answers(merged, batch))
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers(compiled, batch)


def test_a_copy_shares_its_state_only_with_itself():
    model, batch = image("vit")
    merged = compressed(model)
    twin = copy.deepcopy(merged)
    assert twin.layers[1].merge.size is not merged.layers[1].merge.size
    wide = {"pixel_values": models.noise(1, 3, 32, 32)}
    out = answers(merged, batch)
    answers(twin, wide)
    assert answers(merged, batch).equal(out)
    assert answers(compressed(model.bfloat16()), {"pixel_values": batch["pixel_values"].bfloat16()}).isfinite().all()
