"""tokens.downsample_kv: the coarser grid against its definition, where it is exact, and whole models."""

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
from compress.nn.coarse_keys import CoarseKeys, coarse, counts
from compress.nn.window import ImageSize
from compress.outputs import relative_error, run
from compress.transform import Plan
from compress.transforms.heads.exact import Exact
from compress.transforms.linear.window import Window
from compress.transforms.quantize.int8 import Int8
from compress.transforms.tokens.downsample_kv import DownsampleKv
from compress.transforms.tokens.merge import Merge
from compress.view import View

grids = {"height": st.integers(1, 7), "width": st.integers(1, 7), "factor": st.integers(1, 4)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def core(height, width, factor=2, average=False, least=0, others=0):
    size = ImageSize()
    size.height, size.width = height, width
    made = CoarseKeys("attention", factor, average, least, 1, others, size)
    made.inner = Softmax()
    return made


@settings(deadline=None, max_examples=40)
@given(**grids)
def test_cells_are_their_definition(height, width, factor):
    grid = draw(2, 3, height, width, 4)
    first, mean = coarse(grid, factor, False), coarse(grid, factor, True)
    sizes = counts(height, factor)[:, None] * counts(width, factor)
    assert first.shape == mean.shape == (2, 3, *sizes.shape, 4) and sizes.sum() == height * width
    for y in range(sizes.shape[0]):
        for x in range(sizes.shape[1]):
            cell = grid[:, :, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].flatten(2, 3)
            assert first[:, :, y, x].equal(cell[:, :, 0]) and cell.shape[2] == sizes[y, x]
            torch.testing.assert_close(mean[:, :, y, x], cell.mean(2))


@settings(deadline=None, max_examples=40)
@given(
    **grids,
    average=st.booleans(),
    others=st.sampled_from([0, 1, 2, "before", "after"]),
    seed=st.integers(0, 99),
)
def test_it_is_exact_where_cells_are_constant(height, width, factor, average, others, seed):
    """Also in odd grids and beside other tokens, whose keys stay their own."""
    beside = others if isinstance(others, int) else 3
    down, right = (torch.arange(side) // factor for side in (height, width))
    cell = (down[:, None] * 9 + right).flatten()
    query, key, value = (draw(2, 2, beside + height * width, 8, seed=seed + i) for i in range(3))
    for x in (key, value):
        image = draw(2, 2, 99, 8, seed=seed + 5)[:, :, cell]
        x[:, :, : height * width if others == "after" else None][:, :, -height * width :] = image
    wanted = Softmax()(None, query, key, value, None, None, False)
    given_to = core(height, width, factor, average, others=others)
    torch.testing.assert_close(given_to(nn.Identity(), query, key, value, None, None, False), wanted)


@given(**grids)
def test_tokens_beside_the_grid_stay_to_the_bit(height, width, factor):
    x, image = draw(2, 3 + height * width, 4), -(-height // factor) * -(-width // factor)
    before, after = (
        core(height, width, factor, others="before").thin(x),
        core(height, width, factor, others="after").thin(x),
    )
    assert before.shape[1] == after.shape[1] == 3 + image
    assert before[:, :3].equal(x[:, :3]) and after[:, image:].equal(x[:, -3:])


def test_small_grids_are_left_alone():
    x = draw(2, 16, 4)
    assert core(4, 4, least=17).thin(x) is x and core(4, 4, least=16).thin(x).shape[1] == 4
    assert core(4, 4, least=17, others="after").log_counts(draw(1, 1, 20, 8)) is None
    assert core(4, 4).log_counts(draw(1, 1, 16, 8)) is None
    log = core(4, 3, others=1).log_counts(draw(1, 1, 13, 8))
    assert log.exp().flatten().tolist() == pytest.approx([1, 4, 2, 4, 2])


def test_an_image_it_does_not_know_and_masks_are_refused():
    query = draw(1, 1, 15, 8)
    with pytest.raises(CompressError, match="attention: 15 tokens are not the 4 x 4 of an image of 4 x 4"):
        core(4, 4)(nn.Identity(), query, query, query, None, None, False)
    with pytest.raises(CompressError, match="attention: 15 tokens"):
        core(2, 7, others=2).thin(query)
    with pytest.raises(CompressError, match="15 tokens are not the 0 x 0"):
        core(0, 0).thin(query)
    with pytest.raises(CompressError, match="attention mask"):
        core(3, 5)(nn.Identity(), query, query, query, torch.ones(1, 1, 15, 15), None, False)


def compressed(model, method=DownsampleKv, **options):
    """A copy with the method applied, through the plan's JSON as a checkpoint keeps it."""
    model = copy.deepcopy(model)
    view = View(model)
    plan = method(**options).plan(view)
    method.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits)), plan.tensors))
    return model


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


TAKEN = ["vit", "dinov2", "clip", "dit", "pixart", "sd3", "flux", "unet2d_condition", "unet2d"]


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("by", ["nearest", "average"])
def test_every_model_it_takes(name, by):
    model, batch = models.MODELS[name]()
    stock = answers(model, batch)
    if (name, by) == ("flux", "average"):
        plan = DownsampleKv(by=by).plan(View(model))
        assert plan.edits == {} and "there is no average; by: nearest" in str(plan.notes)
        return
    thin = compressed(model, by=by)
    out = answers(thin, batch)
    assert out.shape == stock.shape and out.isfinite().all() and not out.equal(stock)
    assert out.equal(answers(thin, batch)), "two runs must agree"
    assert answers(model, batch).equal(stock), "the original must not be touched through its copy"
    assert DownsampleKv(factor=1, by=by).plan(View(model)).edits == {}
    assert answers(compressed(model, by=by, least=10**6), batch).equal(stock)
    assert [*thin.state_dict()] == [*model.state_dict()]
    assert count(thin, batch) < count(model, batch)


@pytest.mark.parametrize(("name", "early"), [("dit", True), ("sd3", True), ("unet2d", True), ("vit", False)])
@pytest.mark.parametrize("by", ["nearest", "average"])
def test_sparing_the_projections_changes_nothing_but_the_work(name, early, by):
    model, batch = models.MODELS[name]()
    view = View(model)
    plan = DownsampleKv(by=by).plan(view)
    assert {edit["early"] for edit in plan.edits.values()} == {early}
    late = copy.deepcopy(model)
    DownsampleKv().apply(View(late), Plan({path: edit | {"early": False} for path, edit in plan.edits.items()}))
    spared = compressed(model, by=by)
    torch.testing.assert_close(answers(late, batch), answers(spared, batch), rtol=1e-4, atol=1e-5)
    assert (count(spared, batch) < count(late, batch)) == early


def test_wide_images_keep_their_grid():
    model = models.of("dinov2", "AutoModel", **models.IMAGE)
    for height, width in ((32, 32), (24, 56)):
        batch = {"pixel_values": models.noise(2, 3, height, width)}
        out = answers(compressed(model, factor=3), batch)
        assert out.shape == answers(model, batch).shape
    dit, batch = models.MODELS["unet2d"]()
    batch["sample"] = models.noise(2, 1, 8, 16)
    assert answers(compressed(dit), batch).shape == (2, 1, 8, 16)


def test_images_of_constant_cells_are_answered_exactly():
    """A transformer without positions: every token is a function of its cell, block after block."""
    for name, scale in (("dit", 2), ("sd3", 2)):
        model, batch = models.MODELS[name]()
        model = model.double()
        model.get_buffer("pos_embed.pos_embed").zero_()
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        patches = batch["hidden_states"].unflatten(2, (-1, scale)).unflatten(4, (-1, scale))[:, :, ::2, :, ::2]
        batch["hidden_states"] = patches.repeat_interleave(2, 2).repeat_interleave(2, 4).flatten(4, 5).flatten(2, 3)
        stock = answers(model, batch)
        for by in ("nearest", "average"):
            torch.testing.assert_close(answers(compressed(model, by=by), batch), stock, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("llama", "model.layers.0.self_attn", "it is causal"),
        ("bert", "bert.encoder.layer.0.attention.self", "no patches of an image"),
        ("swin", "encoder.layers.0.blocks.0.attention", "relative_position_bias"),
        ("pixart", "transformer_blocks.0.attn2", "keys come from another sequence"),
        ("whisper", "model.encoder.layers.0.self_attn", "no patches of an image"),
        ("beit", "layers.0.attention", "relative_position_bias"),
        ("sana", "transformer_blocks.0.attn1", "did not call scaled_dot_product_attention"),
    ],
)
def test_refused_by_name_with_the_reason(name, path, reason):
    view = View((models.MODELS | models.MORE)[name]()[0])
    plan = DownsampleKv().plan(view)
    assert path not in plan.edits and reason in plan.notes["refused"][path]
    with pytest.raises(CompressError, match=f"cannot change {re.escape(path)}: .*{re.escape(reason)}"):
        DownsampleKv(only=(path,)).plan(view)


def test_other_cores_beside_it_are_refused():
    model, _ = models.MODELS["vit"]()
    thin = compressed(model)
    for method in (Merge(), Window(radius=1), DownsampleKv()):
        plan = method.plan(View(thin))
        assert plan.edits == {} and "coarser grid" in str(plan.notes)
    assert "merged already" in str(DownsampleKv().plan(View(compressed(model, Merge, ratio=0.3))).notes)
    closed = compressed(model, Exact)
    assert "computes its class token only" in str(DownsampleKv().plan(View(closed)).notes)


@pytest.mark.parametrize("name", ["vit", "dit", "unet2d"])
def test_int8_after_it_stays_close(name):
    model, batch = models.MODELS[name]()
    thin = compressed(model)
    both = compressed(thin, Int8)
    assert relative_error(answers(both, batch), answers(thin, batch)) < 0.1
    assert count(both, batch) == count(thin, batch), "keys and values are made of as few tokens as before"


@pytest.mark.parametrize("name", ["vit", "dit"])
def test_compiles_and_settles(name):
    model, batch = models.MODELS[name]()
    thin = compressed(model)
    torch._dynamo.reset()
    compiled = torch.compile(thin, backend="eager", fullgraph=name == "vit")
    for _ in range(2):  # a host's forward in pieces meets its second shape in the second call
        torch.testing.assert_close(answers(compiled, batch), answers(thin, batch))
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers(compiled, batch)


def test_the_plan_on_meta_is_the_plan():
    for name in ("dit", "sd3", "vit"):
        model, _ = models.MODELS[name]()
        empty = copy.deepcopy(model).to("meta")
        assert DownsampleKv().plan(View(empty)).edits == DownsampleKv().plan(View(model)).edits != {}
        assert str(compressed(empty)) == str(compressed(model))
