"""tokens.merge_unmerge: the laws of a matching among neighbours, and of merges around the attentions of denoisers."""

import copy
import json
import re

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from compress.errors import CompressError
from compress.nn.token_match import unmerge
from compress.nn.token_merge import Sized, Tokens
from compress.nn.token_windows import Near, match_near, places
from compress.outputs import relative_error, run
from compress.transform import Plan
from compress.transforms.tokens.merge_unmerge import MergeUnmerge
from compress.view import View
from compress_kernels.token_merge.reference import merge

DENOISERS = ["dit", "pixart", "sd3", "unet2d_condition"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compressed(model, **options):
    """A copy with merged tokens, through the plan's JSON as a checkpoint keeps it."""
    model = copy.deepcopy(model)
    view = View(model)
    plan = MergeUnmerge(**options).plan(view)
    MergeUnmerge.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits))))
    return model


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


grids = {
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "cell": st.integers(2, 3),
    "reach": st.sampled_from([0, 1, 2, None]),
}


@settings(deadline=None, max_examples=60)
@given(**grids, share=st.floats(0, 0.99), seed=st.integers(0, 99), similarity=st.sampled_from(["cosine", "euclidean"]))
def test_a_merge_is_a_partition_that_conserves(height, width, cell, reach, share, seed, similarity):
    tokens = height * width
    r = Near(share, cell, reach, similarity, False, 0).removes(height, width)
    x = draw(2, tokens, 3, seed=seed)
    matching = match_near(x, r, places(height, width, cell, reach), similarity)
    size = torch.randint(1, 9, (2, tokens), generator=torch.Generator().manual_seed(seed)).float()
    merged, merged_size = merge(x, matching, size)
    assert torch.cat([matching.kept, matching.gone], 1).sort(1).values.tolist() == [list(range(tokens))] * 2
    assert merged.shape == (2, tokens - r, 3) and merged_size.sum(1).equal(size.sum(1))
    torch.testing.assert_close((merged * merged_size[..., None]).sum(1), (x * size[..., None]).sum(1))
    assert unmerge(merged, matching.slot).shape == x.shape
    into = matching.kept.gather(1, matching.slot.gather(1, matching.gone))
    assert not ((into // width % cell) | (into % width % cell)).any(), "only the first token of a cell takes others"
    for axis in (lambda index: index // width, lambda index: index % width):
        assert reach is None or ((axis(into) // cell - axis(matching.gone) // cell).abs() <= reach).all()


def test_every_token_is_a_source_or_the_first_of_a_cell():
    for height, width, cell in ((4, 6, 2), (5, 7, 2), (7, 4, 3), (1, 1, 2)):
        sources, near = places(height, width, cell, 1)
        found = torch.cat([sources.flatten(), near[:, near.shape[1] // 2]])
        assert found[found >= 0].sort().values.tolist() == list(range(height * width))
        assert near.shape[1] == 9


@given(seed=st.integers(0, 99), reach=st.sampled_from([1, None]))
@settings(deadline=None, max_examples=20)
def test_against_a_loop(seed, reach):
    height, width, r = 5, 6, 9
    x = draw(1, 30, 4, seed=seed)
    unit, proposals = x[0] / x[0].norm(dim=1, keepdim=True), []
    for token in range(30):
        row, column = divmod(token, width)
        if row % 2 == column % 2 == 0:
            continue
        firsts = [
            (a, b)
            for a in range(0, height, 2)
            for b in range(0, width, 2)
            if reach is None or (abs(a // 2 - row // 2) <= reach and abs(b // 2 - column // 2) <= reach)
        ]
        likeness, target = max(((unit[token] @ unit[a * width + b]).item(), a * width + b) for a, b in firsts)
        proposals.append((likeness, token, target))
    expected = {token: target for _, token, target in sorted(proposals, reverse=True)[:r]}
    matching = match_near(x, r, places(height, width, 2, reach))
    into = matching.kept[0, matching.slot[0, matching.gone[0]]]
    assert dict(zip(matching.gone[0].tolist(), into.tolist(), strict=True)) == expected


def test_a_pair_is_matched_alike():
    x, near = draw(4, 16, 3), places(4, 4, 2, 1)
    matching = match_near(x, 6, near, pair=True)
    assert matching.gone[:2].equal(matching.gone[2:]) and matching.slot[:2].equal(matching.slot[2:])
    assert not matching.gone[0].equal(matching.gone[1])
    assert match_near(x[:3], 6, near, pair=True).gone.equal(match_near(x[:3], 6, near).gone)


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("options", [{}, {"blocks": 2, "reach": "all"}, {"pair": True, "similarity": "euclidean"}])
def test_every_model_it_takes(name, options):
    model, batch = models.MODELS[name]()
    stock, merged = answers(model, batch), compressed(model, **options)
    out = answers(merged, batch)
    assert out.shape == stock.shape and out.isfinite().all() and not out.equal(stock)
    assert out.equal(answers(merged, batch)), "two runs must agree"
    assert relative_error(out, stock) < 0.6
    assert MergeUnmerge(ratio=0).plan(View(model)).edits == {}
    for nothing in ({"ratio": 1e-6}, {"least": 10**6}):
        assert answers(compressed(model, **nothing), batch).equal(stock)
    assert [*merged.state_dict()] == [*model.state_dict()]


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("vit", "vit.layers.1.attention", "there is tokens.merge"),
        ("swinv2", "encoder.layers.0.blocks.0.attention.self", "computes attention by itself"),
        ("flux", "transformer_blocks.0.attn", "positions are those of the full input"),
        ("flux", "single_transformer_blocks.0.attn", "positions are those of the full input"),
        ("unet2d", "mid_block.attentions.0", "a map (B, C, H, W)"),
        ("pixart", "transformer_blocks.0.attn2", "keys come from another sequence"),
    ],
)
def test_refused_by_name_with_the_reason(name, path, reason):
    view = View((models.MODELS | models.MORE)[name]()[0])
    plan = MergeUnmerge().plan(view)
    assert path not in plan.edits and reason in plan.notes["refused"][path]
    with pytest.raises(CompressError, match=f"cannot change {re.escape(path)}: .*{re.escape(reason)}"):
        MergeUnmerge(only=(path,)).plan(view)


def test_a_merge_twice_is_refused():
    plan = MergeUnmerge().plan(View(compressed(models.MODELS["dit"]()[0])))
    assert plan.edits == {} and "merges tokens already" in str(plan.notes)


def test_equal_tokens_merge_without_an_error():
    """SD3 as well: the log sizes belong to the image's keys, the text's weigh one."""
    for name in ("dit", "sd3"):
        model, batch = models.MODELS[name]()
        model = model.double()
        model.get_buffer("pos_embed.pos_embed").zero_()
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        batch["hidden_states"] = batch["hidden_states"][..., :1, :1].repeat(1, 1, 8, 8)
        stock = answers(model, batch)
        torch.testing.assert_close(answers(compressed(model), batch), stock, rtol=1e-6, atol=1e-6)
        light = relative_error(answers(compressed(model, proportional=False), batch), stock)
        assert light > 1e-5 if name == "sd3" else light < 1e-6


def counted(model, monkeypatch):
    """How many matchings were made since the last look."""
    from compress.nn import token_windows

    made, real = [], token_windows.match_near
    monkeypatch.setattr(token_windows, "match_near", lambda *args: made.append(1) or real(*args))

    def look():
        number = len(made)
        made.clear()
        return number

    return look


def test_blocks_share_a_matching_within_a_forward_only(monkeypatch):
    model, batch = models.MODELS["dit"]()
    look, number = counted(model, monkeypatch), len(model.transformer_blocks)
    answers(compressed(model), batch)
    assert look() == number
    merged = compressed(model, blocks=number)
    first = answers(merged, batch)
    assert look() == 1
    other = batch | {"hidden_states": batch["hidden_states"].flip(-1)}
    assert not answers(merged, other).equal(first)
    assert look() == 1
    assert answers(merged, batch).equal(first)


def test_steps_share_a_matching_within_a_generation_only(monkeypatch):
    model, batch = models.MODELS["dit"]()
    look, merged = counted(model, monkeypatch), compressed(model, steps=2)
    number = len(model.transformer_blocks)
    made = []
    for timestep in (900, 700, 500, 300):
        answers(merged, batch | {"timestep": torch.full_like(batch["timestep"], timestep)})
        made.append(look())
    assert made == [number, 0, number, 0]
    fresh = batch | {"timestep": torch.full_like(batch["timestep"], 900)}
    again = answers(merged, fresh)
    assert look() == number
    assert again.equal(answers(compressed(model, steps=2), fresh))


def test_log_sizes_stand_beside_the_text_of_a_joint_attention():
    size = {"sample_size": 8, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
    size |= {"num_mmdit_layers": 1, "caption_projection_dim": 32, "joint_attention_dim": 24, "out_channels": 4}
    plan = MergeUnmerge().plan(View(diffusers.AuraFlowTransformer2DModel(**size, pos_embed_max_size=64)))
    assert plan.edits["joint_transformer_blocks.0.attn"]["text"] == "before"
    assert "may hold the text" in plan.notes["refused"]["single_transformer_blocks.0.attn"]
    assert MergeUnmerge().plan(View(models.sd3()[0])).edits["transformer_blocks.0.attn"]["text"] == "after"
    tokens = Tokens(size=torch.tensor([[1.0, 4.0]]))
    for text, expected in (("after", [1, 4, 1, 1]), ("before", [1, 1, 1, 4])):
        assert Sized(tokens, True, text)._log_size(2).exp().flatten().tolist() == pytest.approx(expected)


def test_what_it_cannot_follow_is_refused():
    attention = compressed(models.MODELS["dit"]()[0]).transformer_blocks[0].attn1
    with pytest.raises(CompressError, match="attention mask"):
        attention(hidden_states=models.noise(2, 16, 32), attention_mask=torch.ones(2, 1, 16))
    with pytest.raises(CompressError, match=r"\(2, 16, 32\) are not the tokens of a grid of 0 x 0"):
        attention(hidden_states=models.noise(2, 16, 32))


def test_the_plan_on_meta_gives_the_same_tree():
    model, batch = models.MODELS["sd3"]()
    empty = copy.deepcopy(model).to("meta")
    assert MergeUnmerge().plan(View(empty)).edits == MergeUnmerge().plan(View(model)).edits != {}
    merged, empty = compressed(model), compressed(empty)
    assert str(empty) == str(merged)
    assert answers(empty, {key: value.to("meta") for key, value in batch.items()}).shape == answers(merged, batch).shape


def test_matching_with_all_cells_gathers_no_tokens_for_each():
    """The first tokens of all cells are compared once, not copied for every cell."""
    sources, near = places(64, 64, 2, None)
    assert sources.shape == (1, 3 * 1024) and near.shape == (1, 1024)


def swin(**options):
    sizes = models.SWIN | {"image_size": 64, "window_size": 7} | options  # grids of 16 and 8, padded to 21 and 14
    return models.of("swin", "AutoModel", **sizes).double(), {"pixel_values": models.noise(2, 3, 64, 64).double()}


@pytest.mark.parametrize("side", [4, 6, 7])
def test_windows_are_merged_one_by_one(side):
    model, batch = swin(window_size=side)
    stock, merged, seen = answers(model, batch), compressed(model, ratio=0.5), []
    for module in merged.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.register_forward_pre_hook(lambda linear, args: seen.append(args[0].shape[1]))
    out = answers(merged, batch)
    assert seen == [side**2 - side**2 // 2] * 4
    assert out.shape == stock.shape and 1e-4 < relative_error(out, stock) < 0.6
    assert out.equal(answers(merged, batch)) and [*merged.state_dict()] == [*model.state_dict()]
    order = torch.tensor([1, 0])
    swapped = answers(merged, {"pixel_values": batch["pixel_values"][order]})
    torch.testing.assert_close(swapped, out[order], rtol=1e-6, atol=1e-8)
    for nothing in ({"ratio": 1e-6}, {"least": 10**6}):
        torch.testing.assert_close(answers(compressed(model, **nothing), batch), stock, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_by_hand(attention):
    """A merged token has the position and the neighbours of the one that stays, and counts for all it stands for."""
    model, batch = swin(attn_implementation=attention)
    module, seen = compressed(model).get_submodule("encoder.layers.0.blocks.1.attention"), {}
    x, beside = draw(18, 49, 16), torch.zeros(9, 49, 49, dtype=torch.float64)
    beside[4, :20, 20:] = beside[4, 20:, :20] = -100.0
    module.q_proj.register_forward_pre_hook(
        lambda linear, args: seen.update(x=args[0], tokens=copy.copy(module.merge.tokens))
    )
    with torch.no_grad():
        out = module(x, beside)[0]
        x, tokens, origin = seen["x"], seen["tokens"], seen["tokens"].origin
        query, key, value = (
            linear(x).unflatten(-1, (2, 8)).transpose(1, 2) for linear in (module.q_proj, module.k_proj, module.v_proj)
        )
        mask = module.relative_position_bias() + beside.repeat(2, 1, 1)[:, None]
        mask = mask.gather(2, origin[:, None, :, None].expand(-1, 2, -1, 49))
        mask = mask.gather(3, origin[:, None, None].expand(-1, 2, origin.shape[1], -1))
        weights = query @ key.transpose(2, 3) / 8**0.5 + mask + tokens.size.double().log()[:, None, None]
        expected = module.o_proj((weights.softmax(-1) @ value).transpose(1, 2).flatten(2))
    expected = unmerge(expected, tokens.slot)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    groups = tokens.slot[4]
    assert not {*groups[:20].tolist()} & {*groups[20:].tolist()}, "parts of a shifted window stay apart"
    assert {*tokens.slot[3][:20].tolist()} & {*tokens.slot[3][20:].tolist()}, "where nothing divides them they do not"


def test_equal_tokens_of_a_window_merge_without_an_error():
    model, _ = swin()
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table"):
            module.relative_position_bias_table.data.zero_()
    batch = {"pixel_values": models.noise(2, 3, 1, 1).double().expand(-1, -1, 56, 56)}
    torch.testing.assert_close(answers(compressed(model), batch), answers(model, batch), rtol=1e-6, atol=1e-6)


def test_what_windows_cannot_share_or_follow_is_refused():
    model, _ = swin()
    for option in ({"blocks": 2}, {"steps": 2}, {"pair": True}):
        with pytest.raises(CompressError, match=f"{next(iter(option))} is for diffusion models"):
            MergeUnmerge(**option).plan(View(model))
    assert MergeUnmerge().plan(View(compressed(model))).edits == {}
    attention = compressed(model).get_submodule("encoder.layers.0.blocks.0.attention")
    with pytest.raises(CompressError, match="a window has 16 tokens, it must have 49"):
        attention(draw(2, 16, 16))
    empty = copy.deepcopy(model).to("meta")
    assert MergeUnmerge().plan(View(empty)).edits == MergeUnmerge().plan(View(model)).edits != {}
