"""Attention seams: a plain softmax core is the stock model to the bit, wherever it is put."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compress.attend import NAME, Softmax, attend_through, softmax
from compress.errors import CompressError


class Plain(nn.Module):
    """Counts its calls and hands on to the core below."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs):
        self.calls += 1
        return self.inner(module, query, key, value, mask, scale, causal, **kwargs)


def view_of(model, library):
    return SimpleNamespace(model=model, library=library, module=model.get_submodule)


def put(model, paths, library="transformers", core=Plain):
    cores = []
    for path in paths:
        cores.append(core())
        attend_through(view_of(model, library), SimpleNamespace(path=path), cores[-1])
    return cores


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **options)
    return LlamaForCausalLM(config).eval()


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
    model, batch = llama(attn_implementation="sdpa"), tokens(pad)
    with torch.no_grad():
        before = model(**batch).logits
        cores = put(model, LLAMA)
        after = model(**batch).logits
    assert torch.equal(before, after)
    assert [core.calls for core in cores] == [1, 1]


@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_eager_mask_format(pad):
    model, batch = llama(attn_implementation="eager"), tokens(pad)
    with torch.no_grad():
        before = model(**batch).logits
        put(model, LLAMA)
        after = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(before[real], after[real], atol=1e-6)


@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_flash_mask_format(pad):
    """Under a flash implementation the modules get the 2-D padding mask itself."""
    model, batch = llama(attn_implementation="sdpa"), tokens(pad)
    with torch.no_grad():
        before = model(**batch).logits
        put(model, LLAMA)
        model.config._attn_implementation_internal = "flash_attention_2"
        after = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(before[real], after[real], atol=1e-6)


def test_implementation_set_later_state_dict_and_deepcopy():
    model, batch = llama(attn_implementation="sdpa"), tokens("left")
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
    model, batch = llama(attn_implementation="sdpa"), tokens("left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(**batch, **options)
    put(model, LLAMA)
    assert torch.equal(stock, model.generate(**batch, **options, cache_implementation=cache))
    assert torch.equal(stock, model.generate(**batch, **options, use_cache=False))


def test_gradients_flow_and_are_the_stock_ones():
    model, batch = llama(attn_implementation="sdpa"), tokens("right")
    grads = []
    for wrap in (False, True):
        if wrap:
            put(model, LLAMA)
        model.zero_grad()
        model(**batch).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_cores_chain():
    model, batch = llama(attn_implementation="sdpa"), tokens()
    with torch.no_grad():
        before = model(**batch).logits
        inner, outer = put(model, LLAMA[:1]) + put(model, LLAMA[:1])
        assert torch.equal(before, model(**batch).logits)
    assert outer.inner is inner and isinstance(inner.inner, Softmax)
    assert (inner.calls, outer.calls) == (1, 1)


def test_compiles_in_one_graph():
    model, batch = llama(attn_implementation="sdpa"), tokens("left")
    put(model, LLAMA, core=Softmax)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, compiled(**batch).logits, atol=1e-6)


def test_runs_on_meta():
    with torch.device("meta"):
        model = llama(attn_implementation="sdpa")
        put(model, LLAMA)
        assert model(torch.ones(1, 5, dtype=torch.long)).logits.shape == (1, 5, 97)


def test_relative_bias_arrives_as_mask():
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    model = T5Model(T5Config(**sizes, attn_implementation="sdpa")).eval()
    ids, mask = tokens("right").values()
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    paths = [f"{side}.block.{i}.layer.0.SelfAttention" for side in ("encoder", "decoder") for i in range(2)]
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        cores = put(model, [*paths, "decoder.block.1.layer.1.EncDecAttention"])
        assert torch.equal(before, model(**batch).last_hidden_state)
    assert all(core.calls == 1 for core in cores)


def dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
    }
    model = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, norm_num_groups=8).eval()
    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, batch, ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def sd3():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
    }
    model = SD3Transformer2DModel(
        **sizes, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4
    ).eval()
    text = {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16)}
    batch = dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([3, 5]), **text)
    return model, batch, ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    model = FluxTransformer2DModel(
        **sizes, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8)
    ).eval()
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    ids = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)
    text = {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16)}
    text |= {"img_ids": ids, "txt_ids": torch.zeros(5, 3)}
    batch = dict(hidden_states=torch.randn(2, 16, 16), timestep=torch.tensor([0.3, 0.5]), **text)
    return model, batch, ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


def pixart():
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
    }
    model = PixArtTransformer2DModel(
        **sizes, cross_attention_dim=16, caption_channels=12, norm_num_groups=8, use_additional_conditions=False
    ).eval()
    text = {"encoder_hidden_states": torch.randn(2, 5, 12), "encoder_attention_mask": torch.ones(2, 5)}
    batch = dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([3, 5]), **text)
    batch["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return model, batch, ["transformer_blocks.0.attn1", "transformer_blocks.1.attn2"]


def unet2d_condition():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    batch = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    return model, batch, [block + "attn1", block + "attn2"]


def unet2d():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    return (
        model,
        {"sample": torch.randn(1, 1, 8, 8), "timestep": 3},
        ["down_blocks.0.attentions.0", "mid_block.attentions.0"],
    )


DIFFUSERS = [dit, pixart, sd3, flux, unet2d_condition, unet2d]


@pytest.mark.parametrize("make", DIFFUSERS)
def test_diffusers_is_bitwise_the_stock_model(make):
    model, batch, paths = make()
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(**batch)[0]
        cores = put(model, paths, "diffusers")
        assert torch.equal(before, model(**batch)[0])
        assert [core.calls for core in cores] == [1, 1]
        twin = copy.deepcopy(model)
        assert torch.equal(before, twin(**batch)[0])
        assert [core.calls for core in cores] == [1, 1]
    assert list(model.state_dict()) == keys


def test_reroute_ends_with_the_forward_even_when_it_raises():
    model, batch, paths = dit()

    class Breaks(nn.Module):
        def forward(self, *args, **kwargs):
            raise KeyError("core")

    put(model, paths[:1], "diffusers", Breaks)
    with pytest.raises(KeyError, match="core"):
        model(**batch)
    q = torch.randn(1, 2, 3, 4)
    assert torch.equal(nn.functional.scaled_dot_product_attention(q, q, q), softmax(q, q, q))


def test_reroute_compiles_in_one_graph():
    model, batch, paths = dit()
    put(model, paths, "diffusers", Softmax)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], compiled(**batch)[0])


def test_another_processor_is_an_error_not_a_silent_no_op():
    from diffusers.models.attention_processor import AttnProcessor

    model, batch, paths = dit()
    put(model, paths, "diffusers")
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with pytest.raises(CompressError, match="would be ignored"):
        model(**batch)


def test_modules_outside_the_seam_are_refused_by_name():
    from transformers import Gemma2Config, Gemma2Model, XLNetConfig, XLNetModel

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
    xlnet = XLNetModel(XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=9))
    with pytest.raises(CompressError, match="layer.0.rel_attn: .*attention interface"):
        put(xlnet, ["layer.0.rel_attn"])


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
