"""The measures against float64 sums by hand, what fits which model, FLOPs against formulas, all timings."""

from __future__ import annotations

import copy
import math
from functools import partial
from time import sleep
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress.compare import divergence, psnr
from compress.errors import CompressError
from compress.flops import count, memory
from compress.judge import speed
from compress.metrics import METRICS
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.transform import find
from compress.validate import PHYSICAL, default_metrics, fits, latency, measure, weight_bytes
from compress.view import View
from compress_kernels.packing import packed
from models import MODELS


def pair(name: str, dtype=torch.float64):
    """A tiny model, a changed copy of it, and its batch."""
    original, batch = MODELS[name]()
    original.to(dtype)
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return (
        model,
        original,
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()},
    )


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits.double()


def test_language_measures_by_hand():
    model, original, batch = pair("llama")
    assert not batch["attention_mask"].all()
    ours, theirs = logits(model, batch).log_softmax(-1), logits(original, batch).log_softmax(-1)
    losses, divergences, hits = [], [], []
    for row, known in enumerate(batch["attention_mask"].sum(1).tolist()):
        for at in range(known):
            p, q = theirs[row, at], ours[row, at]
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            hits.append(p.argmax() == q.argmax())
            if at + 1 < known:
                losses.append(-q[batch["input_ids"][row, at + 1]].item())
    found = measure(["perplexity", "kl", "top1"], model, original, [batch])
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-12)
    assert found["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-9)
    assert found["top1"] == pytest.approx(sum(hits).item() / len(hits))
    assert found["kl"] > 1e-3


def test_left_padding_is_ignored_too():
    ids = torch.tensor([[5, 6, 7, 8]])
    model, original, _ = pair("llama")
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3).long(), ids], 1),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
    }
    padded["position_ids"] = torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    plain = {"input_ids": ids, "attention_mask": torch.ones(1, 4).long()}
    names = ["perplexity", "kl", "top1"]
    assert measure(names, model, original, [padded]) == pytest.approx(
        measure(names, model, original, [plain]), rel=1e-9
    )


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "dit", "t5"])
def test_batching_changes_nothing(name):
    model, original, batch = pair(name)
    single = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    names = [metric for metric in fits(original, [batch])[1] if METRICS[metric].unit != "dB"]
    assert names
    assert measure(names, model, original, single) == pytest.approx(measure(names, model, original, [batch]), rel=1e-6)


def test_an_untouched_model_measures_as_the_original():
    for name in ("llama", "bert", "vit"):
        model, batch = MODELS[name]()
        perfect = {"kl": 0, "top1": 1, "cosine": 1, "relative_error": 0}
        names = [metric for metric in fits(model, [batch])[1] if metric in perfect]
        assert measure(names, copy.deepcopy(model), model, [batch]) == pytest.approx(
            {name: perfect[name] for name in names}, abs=1e-6
        )


def test_features_by_hand():
    model, original, batch = pair("bert")
    batch = {key: value for key, value in batch.items() if key != "labels"}
    model, original = (getattr(each, "bert", each) for each in (model, original))
    with torch.no_grad():
        ours, theirs = (each(**batch).last_hidden_state for each in (model, original))
    cosines, errors = [], []
    for row, known in enumerate(batch["attention_mask"].sum(1).tolist()):
        a, b = ours[row, :known], theirs[row, :known]
        cosines.append((a.mean(0) @ b.mean(0) / a.mean(0).norm() / b.mean(0).norm()).item())
        errors.append(((a - b).norm() / b.norm()).item())
    found = measure(["cosine", "relative_error"], model, original, [batch])
    assert found == pytest.approx({"cosine": sum(cosines) / 2, "relative_error": sum(errors) / 2}, rel=1e-9)


class Table(nn.Module):
    """A classifier that answers what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, scores):
        return {"logits": scores * self.weight}


def test_accuracy_and_dense_classes():
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    batch = {"scores": scores, "labels": torch.tensor([0, 1, 1])}
    assert measure(["accuracy"], Table(), Table(), [batch]) == {"accuracy": pytest.approx(2 / 3)}
    dense, other = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 3, 4).double()
    p, q = other.log_softmax(1), dense.log_softmax(1)
    assert divergence(dense, other, {}).mean == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-12)


def test_psnr_by_hand():
    reference = torch.tensor([[[0.0, 2.0]], [[0.0, 4.0]]])
    noisy = reference + torch.tensor([[[0.2, -0.2]], [[0.0, 0.0]]])
    assert psnr(noisy, reference) == pytest.approx((10 * math.log10(4 / 0.04) + 100) / 2, rel=1e-6)


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 99))
def test_kl_is_never_negative(tokens, choices, seed):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, tokens, choices, generator=generator).double()
    assert divergence(ours, theirs, {}).mean >= -1e-12
    assert divergence(theirs, theirs, {}).mean == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "metric", "words"),
    [
        ("llama", "cosine", "the model answers with next tokens; what fits: perplexity, kl, top1, size"),
        ("vit", "perplexity", "what fits: "),
        ("dit", "psnr", "denoised samples and no whole sampling can be run; what fits: relative_error, size"),
    ],
)
def test_a_measure_that_does_not_fit_is_refused(name, metric, words):
    model, batch = MODELS[name]()
    with pytest.raises(CompressError, match=rf"validate: {metric} \(.*{words}"):
        measure([metric], model, model, [batch])


def test_accuracy_needs_labels_and_answers_need_samples():
    with pytest.raises(CompressError, match="accuracy .* the samples have no labels; what fits: kl, top1"):
        measure(["accuracy"], Table(), Table(), [{"scores": torch.zeros(1, 2)}])
    with pytest.raises(CompressError, match="kl .* no samples are given"):
        measure(["kl"], Table(), Table(), [])


def test_other_shapes_cannot_be_compared():
    model, original, batch = pair("dit")
    with pytest.raises(CompressError, match="they must be the same to be compared"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4), {})
    assert set(default_metrics(original, [batch], lambda model: torch.zeros(1))) == {
        "relative_error",
        "psnr",
        *PHYSICAL,
        "latency",
    }


def test_every_measure_is_named_and_default_ones_can_be_taken():
    model, batch = MODELS["llama"]()
    names = default_metrics(model, [batch])
    assert set(names) <= set(METRICS)
    found = measure([name for name in names if name != "latency"], model, model, [batch])
    assert all(math.isfinite(value) for value in found.values())
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["size"] == 4 * found["parameters"]


def test_size_counts_weight_files_once(tmp_path):
    (tmp_path / "unet").mkdir()
    here = ("model-00001-of-00002.safetensors", "model.fp16.safetensors", "recorded.safetensors", "config.json")
    for file in (*here, "unet/diffusion_pytorch_model.safetensors"):
        (tmp_path / file).write_bytes(b"12345")
    assert weight_bytes(tmp_path) == 5
    (tmp_path / "model_index.json").write_text("{}")
    assert weight_bytes(tmp_path) == 10
    assert measure(["size"], Table(), Table(), [], folder=tmp_path) == {"size": 10}


def test_flops_of_a_linear_layer_and_a_llama():
    assert count(nn.Linear(8, 6), {"input": torch.zeros(3, 5, 8)}) == 2 * 3 * 5 * 8 * 6
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 99}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    batch, length = 2, 12
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 32 * 99
    expected = 2 * batch * length * weights + 2 * (4 * batch * 4 * length * length * 8)
    ids = {"input_ids": torch.zeros(batch, length).long()}
    assert abs(count(LlamaForCausalLM(config), ids) / expected - 1) < 1e-3  # beside it only the rotary angles
    with torch.device("meta"):
        assert count(LlamaForCausalLM(config), ids) == count(LlamaForCausalLM(config).to_empty(device="cpu"), ids)


@pytest.mark.parametrize("quantize", [Int8Linear.from_linear, partial(WeightOnlyLinear.from_linear, bits=4, group=32)])
def test_a_quantized_layer_counts_as_the_product_it_stands_for(quantize):
    plain = nn.Linear(64, 32)
    call, layer = {"x": torch.randn(3, 5, 64)}, quantize(plain)
    assert count(layer, call) == count(plain, {"input": call["x"]}) == 2 * 3 * 5 * 64 * 32
    assert count(layer.to("meta"), call) == 2 * 3 * 5 * 64 * 32


@pytest.mark.parametrize("name", MODELS)
def test_flops_on_meta_are_those_with_weights(name):
    model, batch = MODELS[name]()
    expected = count(model, batch)
    assert count(model.to("meta"), batch) == expected > 0
    assert memory(model, batch) > sum(parameter.nbytes for parameter in model.parameters())


def test_memory_counts_what_a_quantized_layer_keeps_packed():
    layer = Int8Linear.from_linear(nn.Linear(64, 64, bias=False))
    batch = {"x": torch.randn(4, 64)}
    once = memory(layer, batch)
    form = packed(layer.weight, lambda: torch.zeros(1000))
    assert memory(layer, batch) == once + form.nbytes


def test_memory_by_hand():
    layer = nn.Linear(100, 100)
    activations = 2 * 64 * 100 * 4  # the first layer's output lives while the second one works
    assert memory(nn.Sequential(layer, layer), {"input": torch.zeros(64, 100)}) == 4 * 100 * 101 + activations


@pytest.mark.parametrize("name", ["llama", "unet2d"])
def test_latency_times_all_candidates(name, monkeypatch):
    monkeypatch.setattr("compress.validate.HOPELESS", math.inf)
    model, batch = MODELS[name]()
    times, stock = latency(copy.deepcopy(model), model, [batch], rounds=7)
    assert set(times) == {"compressed", "original", "original, bfloat16"}
    assert stock in times and stock != "compressed"
    assert times[stock][0] == min(times["original"][0], times["original, bfloat16"][0])
    assert all(median > 0 and spread >= 0 for median, spread in times.values())


def test_latency_leaves_out_what_cannot_run():
    class Picky(nn.Linear):
        def forward(self, input):
            if input.dtype == torch.bfloat16:
                raise RuntimeError("no bfloat16 here")
            return super().forward(input)

    times, stock = latency(Picky(3, 3), Picky(3, 3), [{"input": torch.zeros(2, 3)}], rounds=7)
    assert set(times) == {"compressed", "original"}
    assert stock == "original"


def test_latency_does_not_wait_for_a_type_that_the_processor_emulates():
    turns = []

    class Emulated(nn.Linear):
        def forward(self, input):
            if input.dtype == torch.bfloat16:
                turns.append(len(turns))
                sleep(0.05)
            return super().forward(input)

    model, batches = Emulated(3, 3), [{"input": torch.zeros(2, 3)}]
    times, stock = latency(model, model, batches, rounds=7)
    assert set(times) == {"compressed", "original"} and stock == "original" and len(turns) == 3
    told = speed(SimpleNamespace(model=model, original=lambda: model), batches)
    assert told.baseline["name"] == "original" and "cast to bfloat16 was left out" in told.note


def test_a_denoiser_is_timed_and_counted_over_a_whole_sampling():
    """A model that works on every second call only costs half as much."""

    class Lazy(nn.Linear):
        calls = 0

        def forward(self, sample, timestep):
            self.calls += 1
            return super().forward(sample) if self.calls % 2 else sample

    batches = [{"sample": torch.zeros(1, 3), "timestep": torch.tensor([t])} for t in (9, 6, 3, 1, 9, 6, 3, 1)]
    full, lazy = nn.Linear(3, 3), Lazy(3, 3)
    full.forward = lambda sample, timestep: nn.Linear.forward(full, sample)
    found = [measure(["flops"], model, model, batches)["flops"] for model in (full, lazy)]
    assert found == [18.0, 9.0]
    assert lazy.calls == 4
    latency(lazy, lazy, batches, rounds=7)
    assert lazy.calls == 4 + 4 * 2 * (3 + 7)


@pytest.mark.parametrize(("use", "options"), [("int8", {}), ("weight_only", {"bits": 4}), ("weight_only", {})])
def test_quantizing_does_not_change_how_many_weights_there_are(use, options):
    model = MODELS["llama"]()[0]
    before = {"parameters": sum(tensor.numel() for tensor in model.parameters())}
    assert measure(["parameters"], model, model, []) == before
    method = find(f"quantize.{use}")(**options)
    method.apply(View(model), method.plan(View(model)))
    assert measure(["parameters"], model, model, []) == before
