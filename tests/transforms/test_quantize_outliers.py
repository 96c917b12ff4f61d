"""Attention that may do nothing begins as the softmax; the distillation is kept only where it made layers quieter."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.formats import native_config
from compress.nn.probabilities import probabilities
from compress.nn.quiet_attention import ClippedSoftmax, GatedAttention, clip_softmax
from compress.outputs import run
from compress.teaching import kurtosis
from compress.transforms.quantize.outliers import Outliers
from compress.view import View
from models import MODELS, MORE


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def answer(model, batch):
    with torch.no_grad():
        return run(model, batch)


def put(model, **options):
    """The method's structure without its training."""
    view, method = View(model), Outliers(**options)
    method.apply(view, method.plan(view))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_with_gamma_0_and_zeta_1_the_clipped_softmax_is_the_softmax_to_the_bit(seed):
    share = noise(2, 3, 5, 5, seed=seed).softmax(-1)
    assert torch.equal(clip_softmax(share, 0.0, 1.0), share)
    query, key, value = (noise(2, 4, 7, 8, seed=seed + i) for i in range(3))
    out = ClippedSoftmax(0.0, 1.0, None, value)(None, query, key, value, None, None, False)
    assert torch.equal(out, probabilities(query, key) @ value)


@given(st.integers(0, 1000), st.floats(0, 12), st.floats(1, 1.1))
@settings(max_examples=40, deadline=None)
def test_clipped_rows_stay_within_their_bounds_and_small_shares_are_zero(seed, alpha, zeta):
    share = noise(4, 32, seed=seed).mul(3).softmax(-1)
    gamma = -alpha / 32
    clipped = clip_softmax(share, gamma, zeta)
    assert (clipped >= 0).all()
    assert (clipped <= 1).all()
    assert (clipped.sum(-1) <= zeta + 1e-9).all()
    assert (clipped[share <= -gamma / (zeta - gamma) - 1e-12] == 0).all()


def test_no_gradient_flows_where_shares_are_clipped():
    scores = noise(1, 16).mul(4).requires_grad_()
    share = scores.softmax(-1)
    share.retain_grad()
    clipped = clip_softmax(share, -0.05, 1.0)
    clipped.sum().backward()
    assert (clipped == 0).any()
    assert (share.grad[clipped == 0] == 0).all()
    assert (share.grad[clipped > 0] == 1.05).all()


def test_the_clipped_softmax_against_its_formula_in_float64():
    query, key, value = (noise(1, 2, 6, 8, seed=i) for i in range(3))
    share = (query @ key.mT / 8**0.5).exp()
    share = share / share.sum(-1, keepdim=True)
    expected = ((1.02 + 3 / 6) * share - 3 / 6).clamp(0, 1) @ value
    assert torch.allclose(
        ClippedSoftmax(3.0, 1.02, None, value)(None, query, key, value, None, None, False), expected, atol=1e-12
    )


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5", "sd3", "unet2d"])
def test_a_new_gate_changes_no_bit(name):
    model, batch = MODELS[name]()
    before = answer(model, batch)
    put(model)
    assert sum(isinstance(module, GatedAttention) for module in model.modules()) >= 2
    assert torch.equal(answer(model, batch), before)


def test_a_gate_turns_its_head_down():
    query, key, value = (noise(1, 2, 6, 8, seed=i) for i in range(3))
    core = GatedAttention(2, 8, value)
    core.inner = lambda module, query, key, value, *rest: F.scaled_dot_product_attention(query, key, value)
    core.gate_bias.data[1] = -1e3
    out = core(None, query, key, value, None, None, False)
    assert torch.equal(out[:, 0], F.scaled_dot_product_attention(query, key, value)[:, 0])
    assert (out[:, 1] == 0).all()


def test_kurtosis_of_known_distributions():
    assert abs(kurtosis(noise(200_000)).item() - 3) < 0.1
    assert abs(kurtosis(torch.rand(200_000, generator=torch.Generator().manual_seed(0))).item() - 1.8) < 0.05


def loud():
    """A model with one channel that every layer writes huge values into."""
    model, batch = MODELS["vit"]()
    for layer in model.vit.layers:
        layer.mlp.fc2.bias.data[3] += 30
    return model, [batch, {"pixel_values": batch["pixel_values"].flip(-1)}]


@pytest.mark.parametrize("by", ["gate", "clip"])
def test_distillation_lowers_kurtosis_and_stays_only_then(by):
    model, batches = loud()
    method = Outliers(by=by, steps=60, strength=1.0, error=5.0)
    plan = method.calibrate(View(model), method.plan(View(model)), batches)
    assert plan.notes["after"]["kurtosis"] < plan.notes["before"]["kurtosis"]
    assert plan.notes["kept"] == "the trained"
    assert len(plan.notes["before"]["largest by layer"]) == 2
    method.apply(View(model), plan)
    cores = [module for module in model.modules() if isinstance(module, (GatedAttention, ClippedSoftmax))]
    assert all(core.gate_bias.any() if by == "gate" else core.alpha_zeta.tolist() == [4.0, 1.0] for core in cores)


@pytest.mark.parametrize("by", ["gate", "clip"])
def test_where_the_answers_moved_too_far_the_start_is_kept(by):
    model, batches = loud()
    before, weights = answer(model, batches[0]), {k: v.clone() for k, v in model.state_dict().items()}
    method = Outliers(by=by, steps=5, error=1e-9)
    plan = method.calibrate(View(model), method.plan(View(model)), batches)
    assert plan.notes["kept"] == "the start"
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    method.apply(View(model), plan)
    assert torch.allclose(answer(model, batches[0]), before, atol=1e-5)


def test_options_of_the_other_kind_are_refused():
    with pytest.raises(CompressError, match="belong to by: clip"):
        Outliers(alpha=2.0).plan(View(MODELS["vit"]()[0]))


@pytest.mark.parametrize(("name", "reason"), [("swinv2", "computes attention by itself"), ("gemma2", "softcap")])
def test_an_attention_whose_softmax_cannot_be_reached_is_refused(name, reason):
    plan = Outliers().plan(View(MORE[name]()[0]))
    assert not plan.edits
    assert all(reason in why for why in plan.notes["refused"].values())
    assert plan.notes["refused"]


def test_a_clipped_softmax_is_no_ordinary_config():
    model, _ = MODELS["llama"]()
    put(model, by="clip")
    assert native_config(model) is None
