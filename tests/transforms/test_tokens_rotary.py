"""Fewer tokens in vision transformers with rotary positions (DINOv3) and before heads that pool by attention."""

import copy
import json

import pytest
import torch

import models
from compress.checkpoint import load
from compress.emit import write
from compress.errors import CompressError
from compress.nn.token_merge import turned
from compress.outputs import relative_error, run
from compress.recipe import Emit
from compress.replay import record
from compress.source import Source
from compress.token_layout import follows_rows
from compress.transform import Plan
from compress.transforms.tokens.merge import Merge
from compress.transforms.tokens.pool import Pool
from compress.transforms.tokens.prune import Prune
from compress.view import View

METHODS = {"merge": Merge(ratio=0.3), "pool": Pool(blocks=(0,)), "prune": Prune(keep=0.5, blocks=(0, 1))}


def dinov3(registers=2, **options):
    sizes = models.IMAGE | {"num_hidden_layers": 4, "num_register_tokens": registers} | options
    return models.of("dinov3_vit", "AutoModel", **sizes).double()


def changed(model, method):
    """A copy with the method, through the plan's JSON."""
    view = View(copy.deepcopy(model))
    plan = Plan(json.loads(json.dumps(method.plan(view).edits)))
    method.apply(view, plan)
    return view.model, plan


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


def images(side=32):
    return {"pixel_values": models.noise(2, 3, side, side).double()}


@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_turned_by_the_row_of_its_place(method):
    """Attention by hand in the third block: the rows of the places that the tokens kept, and their sizes."""
    model = dinov3()
    reduced, plan = changed(model, METHODS[method])
    assert all(edit["rotary"] and edit.get("rule", edit)["first"] == 3 for edit in plan.edits.values())
    layer, seen = reduced.model.layer[2], {}
    layer.attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0], tokens=copy.copy(layer.merge.tokens)), with_kwargs=True
    )
    layer.attention.register_forward_hook(lambda module, args, output: seen.update(out=output[0]))
    out = answers(reduced, images())
    assert out.shape == answers(model, images()).shape and relative_error(out, answers(model, images())) > 1e-3

    x, tokens, attention = seen["x"], seen["tokens"], layer.attention
    assert x.shape[1] < 19 and tokens.origin[:, :3].equal(torch.arange(3).expand(2, -1))
    cos, sin = (row[tokens.origin[:, 3:] - 3][:, None] for row in reduced.rope_embeddings(images()["pixel_values"]))
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    query, key, value = (linear(x).unflatten(-1, (4, 8)).transpose(1, 2) for linear in linears)

    def turn(part):
        one, other = part[:, :, 3:].chunk(2, -1)
        return torch.cat([part[:, :, :3], part[:, :, 3:] * cos + torch.cat([-other, one], -1) * sin], 2)

    weights = turn(query) @ turn(key).transpose(2, 3) / 8**0.5
    if method != "prune":
        weights = weights + tokens.size.double().log()[:, None, None]
    expected = attention.o_proj((weights.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["out"], expected, rtol=1e-5, atol=1e-6)


def test_equal_tokens_merge_without_an_error_where_nothing_turns():
    model, (one, other) = dinov3(0), models.noise(2, 1, 3, 8, 8).double()
    model.rope_embeddings.inv_freq.zero_()
    pixels = torch.cat([torch.cat([one * row, one * row, other * row, other * row], 3) for row in (1, 2, 3, 4)], 2)
    merged, _ = changed(model, Merge(r=8, only=("model.layer.0",)))
    batch = {"pixel_values": pixels}
    torch.testing.assert_close(answers(merged, batch), answers(model, batch), rtol=1e-6, atol=1e-6)


def test_images_of_other_sizes_have_their_own_rows():
    model = dinov3()
    merged, _ = changed(model, Merge(ratio=0.3))
    for side in (32, 64, 32):
        out = answers(merged, images(side))
        assert out.shape == answers(model, images(side)).shape and out.isfinite().all()
    nothing, _ = changed(model, Merge(ratio=1e-6))
    assert answers(nothing, images()).equal(answers(model, images()))


def test_rows_are_asked_for_by_trying():
    assert follows_rows(View(dinov3()), View(dinov3()).attentions()[0])
    for name in ("llama", "t5", "vit", "swin"):
        view = View(models.MODELS[name]()[0])
        assert not follows_rows(view, view.attentions()[0])
    pixtral = models.of("pixtral", "AutoModel", **models.IMAGE)
    assert "positions are those of the full input" in str(Merge().plan(View(pixtral)).notes["refused"])
    with pytest.raises(CompressError, match="protect is 1, it must be at least 3: leading tokens have no rotary"):
        Merge(protect=1).plan(View(dinov3()))
    assert turned((torch.arange(6.0).view(3, 2),), torch.tensor([[2, 0]]))[0].tolist() == [[[[4, 5], [0, 1]]]]


def test_rotary_models_are_saved_and_loaded(tmp_path):
    model = dinov3().float()
    view, batch, method = View(model), {"pixel_values": images()["pixel_values"].float()}, Merge(ratio=0.3)
    plan = method.plan(view)
    steps = [record(model, "tokens.merge", plan)]
    method.apply(view, plan)
    write(Source("dinov3", model, "transformers"), tmp_path, steps, batch, Emit(), {})
    assert answers(load(tmp_path).eval(), batch).equal(answers(model, batch))


def test_a_head_that_pools_by_attention_counts_merged_tokens_for_all_they_stand_for():
    """It sees them copied back to their places, which is what adding log size to its logits would give."""
    model = models.of("siglip_vision_model", "AutoModel", **models.IMAGE | {"num_hidden_layers": 3}).double()
    merged, _ = changed(model, Merge(ratio=0.4))
    seen, head = {}, merged.head
    last = merged.encoder.layers[-1]
    tokens = last.merge.tokens
    last.mlp.register_forward_pre_hook(lambda module, args: seen.update(size=tokens.size, left=args[0].shape[1]))
    head.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        pooled = merged(**images()).pooler_output
        whole, size = seen["x"], seen["size"].double()
        assert whole.shape[1] == 16 and seen["left"] == size.shape[1] < 16
        for row in range(2):  # the tokens that are left, once each, with the logarithm of how many they are
            each, counts = whole[row].unique(dim=0, return_counts=True)
            assert sorted(counts.tolist()) == sorted(size[row].tolist())
            mask = counts.double().log().expand(4, 1, -1)
            hidden = head.attention(head.probe, each[None], each[None], attn_mask=mask)[0]
            hidden = hidden + head.mlp(head.layernorm(hidden))
            torch.testing.assert_close(hidden[0, 0], pooled[row], rtol=1e-8, atol=1e-10)
