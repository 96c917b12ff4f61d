"""Rotations are exact, spread outliers, and are refused with a reason where a model does not allow them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.emit import write
from compress.errors import CompressError
from compress.outputs import relative_error, run
from compress.recipe import Emit, Recipe
from compress.rotations import hadamard, rotation
from compress.source import adopt
from compress.steps import run_steps
from compress.stream import find_streams, normalizes
from compress.transforms.quantize.rotate import Rotate
from compress.view import View
from models import MODELS, MORE

PRE_NORM = ["llama", "qwen3", "gpt2", "opt", "vit", "phi", "gpt_neox", "granite", "gemma", "starcoder2"]


def rotated(model, batch, **options):
    view, method = View(model), Rotate(**options)
    plan = method.calibrate(view, method.plan(view), [batch])
    method.apply(view, plan)
    return plan


def double(name):
    """A model in float64, also inside its norms, where the library's own round to float32."""
    model, batch = (MODELS.get(name) or MORE[name])()
    for path, module in list(model.named_modules()):
        norm = normalizes(module)
        if norm and norm.single:
            exact = nn.RMSNorm(len(module.weight), eps=1e-6)
            exact.weight = nn.Parameter(module.weight.detach() + (1 - norm.neutral))
            model.set_submodule(path, exact)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def answer(model, batch):
    with torch.no_grad():
        return run(model, batch)


@given(st.integers(1, 128), st.sampled_from(["hadamard", "random"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_rotation_is_orthogonal_and_keeps_the_mean_if_asked(size, kind, keep_mean):
    matrix, _ = rotation(size, kind, 3, keep_mean)
    assert (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-10
    if keep_mean:
        assert (matrix.sum(1) - 1).abs().max() < 1e-10


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 60, 64, 108, 140, 384, 576, 768])
def test_hadamard_matrices_of_these_orders_are_known(size):
    signs = hadamard(size)
    assert (signs.abs() == 1).all()
    assert torch.equal(signs @ signs.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 52, 172])
def test_where_no_hadamard_matrix_is_known_a_random_one_is_taken_and_named(size):
    assert hadamard(size) is None
    assert rotation(size, "hadamard", 0)[1] == "random"


@pytest.mark.parametrize("name", PRE_NORM)
def test_in_float64_the_rotated_model_answers_the_same(name):
    model, batch = double(name)
    before = answer(model, batch)
    plan = rotated(model, batch)
    assert not plan.notes["refused"]
    assert sum("stream" in edit for edit in plan.edits.values()) >= 3
    assert sum("values" in edit for edit in plan.edits.values()) == 2
    assert relative_error(answer(model, batch), before) < 1e-9


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_in_float32_the_rotated_model_answers_the_same_to_rounding(kind):
    model, batch = MODELS["llama"]()
    before = answer(model, batch)
    plan = rotated(model, batch, kind=kind)
    assert plan.notes["streams"] == {"model.layers.0.input_layernorm": f"{kind} 32"}
    assert plan.notes["values"]["model.layers.1.self_attn"] == f"{kind} 8"
    assert relative_error(answer(model, batch), before) < 1e-4


def test_an_outlier_channel_is_spread_over_all_of_them():
    model, batch = MODELS["llama"]()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[5] *= 100
    seen = []
    model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def peak():
        answer(model, batch)
        return (seen[-1].abs().amax(-1) / seen[-1].square().mean(-1).sqrt()).mean()

    before = peak()
    rotated(model, batch)
    assert peak() < 0.7 * before


def test_norms_are_left_without_gain_and_their_bias_without_effect():
    model, batch = MODELS["vit"]()
    rotated(model, batch)
    for layer in model.vit.layers:
        assert torch.equal(layer.layernorm_before.weight, torch.ones(32))
        assert torch.equal(layer.layernorm_before.bias, torch.zeros(32))


def test_layer_scales_move_into_the_layers_before_them():
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model("dinov2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  image_size=32, patch_size=8, layerscale_value=0.3)  # fmt: skip
    model = AutoModelForImageClassification.from_config(config).double().eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    before, mask = answer(model, batch), model.dinov2.embeddings.mask_token.clone()
    plan = rotated(model, batch)
    assert not plan.notes["refused"]
    assert relative_error(answer(model, batch), before) < 1e-9
    assert all(torch.equal(layer.layer_scale1.lambda1, torch.ones(32)) for layer in model.dinov2.encoder.layer)
    assert not torch.equal(model.dinov2.embeddings.mask_token, mask)  # not used here, but added to the same stream


def test_a_tied_head_is_untied_and_its_cost_told():
    model, batch = MODELS["gpt2"]()
    plan = rotated(model, batch)
    assert plan.edits["lm_head"] == {"untie": True}
    assert plan.notes["bytes of untied heads"] == {"lm_head": 99 * 32 * 4}
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "LayerNorm writes into it"),
        ("dinov2", "layernorm is read by more than linear layers"),
        ("dit", "a product of two activations writes into it"),
        ("gemma2", "post_attention_layernorm writes into it"),
        ("whisper", "the operation Gelu writes into it"),
        ("t5", "part embeddings that share one table"),
    ],
)
def test_a_stream_that_cannot_be_rotated_is_refused_with_the_reason_and_the_values_are_rotated_alone(name, reason):
    model, batch = (MODELS.get(name) or MORE[name])()
    plan = rotated(model, batch)
    assert any(reason in why for why in plan.notes["refused"].values())
    assert any("values" in edit for edit in plan.edits.values())


def test_what_turns_out_not_to_be_exact_is_taken_back():
    model, batch = MODELS["gpt2"]()
    batch = {"input_ids": batch["input_ids"]}

    def meddle(module, args, output):
        return output * torch.linspace(1, 2, 32, device=output.device)  # of which the structure knows nothing

    model.transformer.h[0].mlp.register_forward_hook(meddle)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = rotated(model, batch, values=False)
    assert not plan.edits
    assert "answers otherwise" in next(iter(plan.notes["refused"].values()))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_structure_that_cannot_be_followed_is_told():
    model, batch = MODELS["llama"]()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + torch.ones(32))
    plan = rotated(model, batch)
    assert "cannot be followed" in plan.notes["refused"]["residual stream"]
    assert list(plan.edits) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_what_was_rotated_a_later_step_may_quantize():
    model, batch = MODELS["gpt2"]()
    recipe = Recipe.make({"steps": [{"use": "quantize.rotate"}, {"use": "quantize.int8", "head": True}]})
    rows = run_steps(adopt(model), recipe, [batch], batch, None)
    assert rows[0]["ledger"]["error"] < 1e-4 < rows[1]["ledger"]["error"] < 0.1
    assert set(rows[0]["ledger"]["modules"]) & set(rows[1]["ledger"]["modules"]) == {"lm_head"}


def test_part_of_a_stream_is_refused():
    model, _ = MODELS["llama"]()
    plan = Rotate(only=("model.layers.0",)).plan(View(model))
    assert "as a whole" in plan.notes["refused"]["model.layers.0.input_layernorm"]
    assert list(plan.edits) == ["model.layers.0.self_attn"]


def test_it_needs_something_to_rotate():
    with pytest.raises(CompressError, match="stream and values are false"):
        Rotate(stream=False, values=False).plan(View(MODELS["llama"]()[0]))


def test_streams_that_share_a_table_are_one():
    assert len([s for s in find_streams(MODELS["t5"]()[0]) if not s.refusal]) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_rotated_alone_it_stays_an_ordinary_model_of_its_library(name, tmp_path):
    model, batch = MODELS[name]()
    plan = rotated(model, batch)
    format, _ = write(adopt(model), tmp_path, [{"use": "quantize.rotate", "edits": plan.edits}], batch, Emit(), {})
    assert format == "native"
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, batch), answer(model, batch))
    assert getattr(loaded.config, "tie_word_embeddings", False) is False
