"""quantize.kv_cache: codes within half a step, exact at both ends, and a cache that holds what it tells."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from compress.errors import CompressError
from compress.nn.kv_cache import (
    QuantizedCacheLayer,
    dequantize_keys,
    dequantize_values,
    encode,
    pack,
    quantize_keys,
    quantize_values,
    unpack,
)
from compress.outputs import relative_error
from compress.transforms.quantize.kv_cache import TOKENS, KvCache, cache_bytes
from compress.view import View
from models import MODELS, handed

SMALL = {"bits": 4, "group": 4, "window": 8, "sink": 2}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**size, vocab_size=99, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def applied(model, **options):
    model = copy.deepcopy(model)
    method, view = KvCache(**options), View(model)
    method.apply(view, method.plan(view))
    return model


def states(tokens, batch=2, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, 3, tokens, width, generator=generator).to(dtype) for _ in range(2)]


def ids(length, rows=2):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(length))


def generate(model, prompt, **options):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)


@given(st.sampled_from([2, 4, 8]), st.integers(1, 19), st.integers(0, 2**31))
def test_packing_round_trips(bits, width, seed):
    codes = torch.randint(0, 1 << bits, (2, 3, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape[-1] == -(-width * bits // 8)
    assert torch.equal(unpack(words, bits, width), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [0, 30])
def test_the_error_is_at_most_half_a_step_and_quantizing_again_changes_nothing(bits, dtype, offset):
    keys, values = (x.add(offset).to(dtype) for x in states(32))
    held = quantize_keys(keys, bits, 8) | quantize_values(values, bits, 8)
    again = dequantize_keys(held, bits), dequantize_values(held, bits, 16)
    rounding = torch.finfo(dtype).eps / 2 * again[0].abs().max()  # of the result to the dtype
    steps = held["key_scale"].repeat_interleave(8, -2), held["value_scale"].repeat_interleave(8, -1)
    for x, y, step in zip((keys, values), again, steps):
        assert ((x.float() - y.float()).abs() <= step.float() / 2 * 1.001 + rounding).all()
    if dtype == torch.float32 and not offset:
        twice = quantize_keys(again[0], bits, 8)
        assert torch.equal(twice["key"], held["key"])


def test_a_constant_group_is_exact_and_nan_stays_nan():
    x = torch.full((1, 4), 3.7)
    codes, scale, low = encode(x, 2, -1)
    assert torch.equal(low + codes * scale, x)
    x[0, 1] = torch.nan
    codes, scale, low = encode(x, 2, -1)
    assert (low + codes * scale).isnan().any()


@pytest.mark.parametrize("sizes", [[40], [5, 1, 1, 20, 3], [1] * 30], ids=str)
def test_the_ends_are_exact_and_the_middle_is_coded_once(sizes):
    layer, keys, values = QuantizedCacheLayer(**SMALL), *states(sum(sizes))
    at = 0
    for size in sizes:
        seen = layer.update(keys[..., at : at + size, :], values[..., at : at + size, :])
        at += size
        assert layer.get_seq_length() == seen[0].shape[-2] == at
        for ours, plain in zip(seen, (keys, values)):
            window = max(SMALL["window"], size)
            assert torch.equal(ours[..., :2, :], plain[..., :at, :][..., :2, :])
            assert torch.equal(ours[..., -window:, :], plain[..., :at, :][..., -window:, :])
    middle = slice(2, at - layer.keys.shape[-2])
    assert (middle.stop - middle.start) % 4 == 0 and SMALL["window"] <= layer.keys.shape[-2] < SMALL["window"] + 4
    dense = layer.dense()
    expected = quantize_keys(keys[..., middle, :], 4, 4)
    assert torch.equal(layer.held["key"], expected["key"])
    assert 0 < relative_error(dense[0], keys) < 0.1 and 0 < relative_error(dense[1], values) < 0.1


def test_memory_is_that_of_the_codes():
    layer, plain = QuantizedCacheLayer(bits=2, group=32, window=0, sink=0), states(640, width=64, dtype=torch.bfloat16)
    layer.update(*plain)
    codes, scales = 2 * 2 * 3 * 640 * 64 // 4, 2 * 2 * (2 * 3 * 20 * 64 + 2 * 3 * 640 * 2)
    assert layer.nbytes() == codes + scales < sum(x.nbytes for x in plain) / 5
    assert sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values, *layer.held.values())) == layer.nbytes()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bytes_told_are_the_bytes_held(name):
    model, settings = MODELS[name]()[0], {"bits": 4, "group": 16, "window": 100, "sink": 3}
    view, layers = View(model), []
    for path in KvCache(**settings).plan(view).edits:
        attention = view.attention(path)
        layers.append(QuantizedCacheLayer(**settings))
        layers[-1].update(*torch.zeros(2, 1, attention.kv_heads, TOKENS, attention.head_dim))
        assert cache_bytes(view, [path], None) == 2 * 4 * TOKENS * attention.kv_heads * attention.head_dim
    assert cache_bytes(view, list(KvCache(**settings).plan(view).edits), settings) == sum(x.nbytes() for x in layers)


def test_rows_are_reordered_repeated_selected_reset_and_taken_back():
    layer, (keys, values) = QuantizedCacheLayer(**SMALL), states(30)
    layer.update(keys, values)
    before = layer.dense()[0]
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.dense()[0], before.flip(0))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.dense()[0], before.flip(0).repeat_interleave(2, 0))
    layer.batch_select_indices(torch.tensor([2]))
    assert torch.equal(layer.dense()[0], before[:1])
    layer.offload(), layer.prefetch()
    layer.crop(-8)
    assert torch.equal(layer.dense()[0], before[:1, :, :-8])
    with pytest.raises(CompressError, match="larger window"):
        layer.crop(-10)
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes() == 0
    assert torch.equal(layer.update(keys, values)[0], keys)


def test_a_prompt_is_answered_as_before_and_generation_is_nearly_the_same(llama):
    prompt = ids(40)
    plain = generate(llama, prompt, max_new_tokens=30, return_dict_in_generate=True, output_scores=True)
    ours = applied(llama, **(SMALL | {"bits": 8}))
    answer = generate(ours, prompt, max_new_tokens=30, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(plain.scores[0], answer.scores[0])
    assert 0 < relative_error(answer.scores[1], plain.scores[1]) < 2e-3
    assert (plain.sequences == answer.sequences).float().mean() > 0.9
    assert all(isinstance(layer, QuantizedCacheLayer) and layer.held for layer in answer.past_key_values.layers)


def test_inside_the_window_all_is_bit_equal(llama):
    ours = applied(llama, bits=2, window=64)
    prompt = ids(20)
    assert torch.equal(generate(ours, prompt, max_new_tokens=30), generate(llama, prompt, max_new_tokens=30))
    with torch.no_grad():
        assert torch.equal(ours(prompt).logits, llama(prompt).logits)


def test_fewer_bits_err_more(llama):
    prompt, errors = ids(60), []
    with torch.no_grad():
        expected = llama(prompt).logits[:, -1]
        for bits in (8, 4, 2):
            model, cache = applied(llama, **(SMALL | {"bits": bits})), DynamicCache(config=llama.config)
            model(prompt[:, :-1], **handed(model, cache))
            errors.append(relative_error(model(prompt[:, -1:], **handed(model, cache)).logits[:, -1], expected))
    assert 0 < errors[0] < errors[1] / 4 < errors[2] / 8


@pytest.mark.parametrize("cache", [DynamicCache, lambda: None, lambda: DynamicCache(config=GPT2Config(n_layer=2))])
def test_any_dynamic_cache_serves_also_one_begun_by_the_original(cache):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)).eval()
    ours, prompt = applied(model, **SMALL), ids(40)
    with torch.no_grad():
        begun = model(prompt, **handed(model, cache()), use_cache=True)
        cache = begun.past_key_values
        answer = ours(prompt[:, :1], **handed(model, cache)).logits
    assert cache.get_seq_length() == 41 and all(isinstance(layer, QuantizedCacheLayer) for layer in cache.layers)
    with torch.no_grad():
        plain = model(torch.cat([prompt, prompt[:, :1]], 1)).logits[:, -1:]
    assert relative_error(answer, plain) < 0.05


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_beams_and_assisted_generation(llama, options):
    prompt = ids(30, rows=1).repeat(1, 2)
    plain = generate(llama, prompt, max_new_tokens=12, **options)
    assert torch.equal(generate(applied(llama, **(SMALL | {"bits": 8})), prompt, max_new_tokens=12, **options), plain)


def test_other_caches_are_refused_by_name(llama):
    model, prompt = applied(llama, **SMALL), ids(5)
    with pytest.raises(CompressError, match="StaticLayer"):
        generate(model, prompt, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(CompressError, match="StaticLayer"), torch.no_grad():
        model(prompt, **handed(model, StaticCache(config=llama.config, max_cache_len=9)))
    attention, x = model.model.layers[0].self_attn, torch.zeros(1, 1, 64)
    with pytest.raises(CompressError, match="is a object, .* continuous batching"):
        attention(x, cache=object())
    with pytest.raises(CompressError, match="is a list"):
        attention(x, **handed(attention, []))


def test_layers_that_keep_a_window_are_left_alone():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    model = MistralForCausalLM(MistralConfig(**size, num_key_value_heads=2, sliding_window=8, intermediate_size=32))
    plan = KvCache().plan(View(model))
    assert not plan.edits and "SlidingWindow" in plan.notes["refused"]["model.layers.0.self_attn"]
    with pytest.raises(CompressError, match=r"layers\.1\.self_attn: its part"):
        KvCache(only=("*.1.self_attn",)).plan(View(model))


def test_only_named_layers_are_quantized(llama):
    model, prompt = applied(llama, **SMALL, only=("*.1.self_attn",)), ids(30)
    cache = generate(model, prompt, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert [isinstance(layer, QuantizedCacheLayer) for layer in cache.layers] == [False, True]


def test_what_it_costs_is_remarked(llama):
    method, view = KvCache(**SMALL), View(llama)
    plan = method.calibrate(view, method.plan(view), [{"input_ids": ids(40)}, {"input_ids": ids(9)}])
    assert not any(module._forward_pre_hooks for module in llama.modules())
    size, cost = plan.notes["remarks"]
    assert "2048 tokens takes" in size and "instead of 1,048,576" in size
    assert cost.startswith("reading 4-bit codes: kl ") and cost.endswith("on 52 calibration tokens")
    plan = method.calibrate(view, method.plan(view), [{"input_ids": ids(14)}])
    assert "not measured" in plan.notes["remarks"][1]
