"""Attention seams: a plain softmax core is the stock model to the bit, wherever it is put."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from compress.attend import NAME, Softmax, attend_through, refusal, softmax
from compress.errors import CompressError
from compress.nn.fused_attention import FusedAttention
from compress.outputs import relative_error, run
from compress.view import View
from models import MODELS, handed


class Plain(nn.Module):
    """Counts its calls and hands on to the core below."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs):
        self.calls += 1
        return self.inner(module, query, key, value, mask, scale, causal, **kwargs)


def put(model, paths, core=Plain):
    view, cores = View(model), [core() for _ in paths]
    attentions = [view.attention(path) for path in paths]  # before the first core counts: looking may run a forward
    for attention, one in zip(attentions, cores, strict=True):
        attend_through(view, attention, one)
    return cores


def llama(attn_implementation="sdpa"):
    model, _ = MODELS["llama"]()
    model.set_attn_implementation(attn_implementation)
    return model


LLAMA = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def tokens(pad="none"):
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if pad == "left":
        mask[0, :4] = 0
    if pad == "right":
        mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_llama_is_bitwise_the_stock_model(pad):
    model, batch = llama(), tokens(pad)
    with torch.no_grad():
        before = model(**batch).logits
        cores = put(model, LLAMA)
        after = model(**batch).logits
    assert torch.equal(before, after)
    assert [core.calls for core in cores] == [1, 1]


@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_eager_mask_format(pad):
    model, batch = llama("eager"), tokens(pad)
    with torch.no_grad():
        before = model(**batch).logits
        put(model, LLAMA)
        after = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(before[real], after[real], atol=1e-6)


@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_flash_mask_format(pad):
    """Under a flash implementation the modules get the 2-D padding mask itself."""
    model, batch = llama(), tokens(pad)
    with torch.no_grad():
        before = model(**batch).logits
        put(model, LLAMA)
        model.config._attn_implementation_internal = "flash_attention_2"
        after = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(before[real], after[real], atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_flash_style_prefill_in_chunks(window):
    """No padding, so no mask at all: causality, the cache's length and a sliding window come from other arguments."""
    config = MistralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=99, sliding_window=window
    )
    config.num_attention_heads = config.num_key_value_heads = 2
    model, ids = MistralForCausalLM(config).eval(), tokens()["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        put(model, LLAMA[:1])
        model.config._attn_implementation_internal = "flash_attention_2"
        cache, parts = DynamicCache(), []
        for chunk in ids.split((4, 3, 2), 1):
            parts.append(model(chunk, **handed(model, cache)).logits)
    assert torch.allclose(before, torch.cat(parts, 1), atol=1e-6)


def test_implementation_set_later_state_dict_and_deepcopy():
    model, batch = llama(), tokens("left")
    keys = list(model.state_dict())
    cores = put(model, LLAMA)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.model.layers[0].self_attn.v_proj.weight)
    with torch.no_grad():
        before = model(**batch).logits
        assert not torch.equal(before, twin(**batch).logits)
        assert [core.calls for core in cores] == [1, 1]
        model.set_attn_implementation("eager")
        assert twin.config._attn_implementation == "sdpa"
        assert model.model.layers[0].self_attn.config._attn_implementation == NAME
        real = batch["attention_mask"].bool()
        assert torch.allclose(before[real], model(**batch).logits[real], atol=1e-6)
    assert [core.calls for core in cores] == [2, 2]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_cached_is_uncached(cache):
    model, batch = llama(), tokens("left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(**batch, **options)
    put(model, LLAMA)
    assert torch.equal(stock, model.generate(**batch, **options, cache_implementation=cache))
    assert torch.equal(stock, model.generate(**batch, **options, use_cache=False))


def test_gradients_flow_and_are_the_stock_ones():
    model, batch = llama(), tokens("right")
    grads = []
    for wrap in (False, True):
        if wrap:
            put(model, LLAMA)
        model.zero_grad()
        model(**batch).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_cores_chain():
    model, batch = llama(), tokens()
    with torch.no_grad():
        before = model(**batch).logits
        inner, outer = put(model, LLAMA[:1]) + put(model, LLAMA[:1])
        assert torch.equal(before, model(**batch).logits)
    assert outer.inner is inner and isinstance(inner.inner, Softmax)
    assert (inner.calls, outer.calls) == (1, 1)


def test_compiles_in_one_graph():
    model, batch = llama(), tokens("left")
    put(model, LLAMA, core=Softmax)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, compiled(**batch).logits, atol=1e-6)


def test_runs_on_meta():
    model = llama().to("meta")
    put(model, LLAMA)
    assert model(torch.ones(1, 5, dtype=torch.long, device="meta")).logits.shape == (1, 5, 99)


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_bitwise_the_stock_one(name):
    """All models of the zoo: grouped heads, relative biases, joint and cross attention, convolutional denoisers."""
    model, batch = MODELS[name]()
    view, keys = View(model), list(model.state_dict())
    with torch.no_grad():
        before = run(model, batch)
        cores = put(model, [attention.path for attention in view.attentions()])
        assert torch.equal(before, run(model, batch))
        assert len(cores) > 1 and all(core.calls == 1 for core in cores)
        assert torch.equal(before, run(copy.deepcopy(model), batch))
        assert all(core.calls == 1 for core in cores)
    assert list(model.state_dict()) == keys


def denoiser():
    model, batch = MODELS["dit"]()
    return model, batch, ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def test_reroute_ends_with_the_forward_even_when_it_raises():
    model, batch, paths = denoiser()

    class Breaks(nn.Module):
        def forward(self, *args, **kwargs):
            raise KeyError("core")

    put(model, paths[:1], core=Breaks)
    with pytest.raises(KeyError, match="core"):
        model(**batch)
    q = torch.randn(1, 2, 3, 4)
    assert torch.equal(nn.functional.scaled_dot_product_attention(q, q, q), softmax(q, q, q))


def test_reroute_compiles_in_one_graph():
    model, batch, paths = denoiser()
    put(model, paths, core=Softmax)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], compiled(**batch)[0])


def test_another_processor_is_an_error_not_a_silent_no_op():
    from diffusers.models.attention_processor import AttnProcessor

    model, batch, paths = denoiser()
    put(model, paths)
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with pytest.raises(CompressError, match="would be ignored"):
        model(**batch)


def test_modules_outside_the_seam_are_refused_by_name():
    from transformers import DebertaV2Config, DebertaV2Model, Gemma2Config, Gemma2Model

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    gemma = Gemma2Model(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8))
    with pytest.raises(CompressError, match="layers.0.self_attn: .*softcap"):
        put(gemma, ["layers.0.self_attn"])
    config = DebertaV2Config(**sizes, relative_attention=True, pos_att_type=["p2c"])
    with pytest.raises(CompressError, match="attention.self: .*attention interface"):
        put(DebertaV2Model(config), ["encoder.layer.0.attention.self"])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("queries", [1, 5])
def test_softmax_groups(groups, queries):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 4 // groups, 7, 8)
    mask = torch.rand(2, 4, queries, 7) > 0.3
    mask[..., 0] = True
    full = key.repeat_interleave(groups, 1)
    scores = (query @ full.mT * 0.3).masked_fill(~mask, -torch.inf)
    assert torch.allclose(softmax(query, key, key, mask, 0.3), scores.softmax(-1) @ full, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "vit", "dinov2", "llama", "dit", "unet2d"])
def test_the_fused_softmax_changes_only_rounding(name):
    model, batch = MODELS[name]()
    view = View(model)
    paths = [attention.path for attention in view.attentions() if not refusal(view, attention)]
    with torch.no_grad():
        before = run(model, batch)
        put(model, paths, FusedAttention)
        after = run(model, batch)
    assert paths
    assert relative_error(after, before) < 2e-3
    assert any(isinstance(module, FusedAttention) for module in model.modules())
