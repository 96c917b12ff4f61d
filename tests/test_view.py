"""The view: what is found, what is refused and why, and that removing equals masking on every tiny model."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from compress.errors import CompressError
from compress.outputs import relative_error, run
from compress.surgery import ConfigView
from compress.view import View

ALL = models.MODELS | models.MORE
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}
REFUSED = {  # models none of whose attentions can lose heads, and why
    "bloom": "alibi",
    "mpt": "position bias comes from outside",
    "mpnet": "encoder.relative_attention_bias gives one position bias to all layers",
    "wavlm": "position bias comes from outside",
    "olmo2": "normalizes all heads together",
    "deberta-v2": "pos_key_proj",
    "codegen": "does not show how",
}
SINGLE = {"qwen3_moe", "mixtral", "xglm"}  # torch's grouped product of experts and XGLM's mask have no float64
ONE_GROUP = {"gemma"}  # multi-query: there is one group of heads, of which queries can go


def halves(view):
    """Every second head of what can lose heads, every third channel of what can lose channels."""
    heads = {a.path: list(range(0, a.kv_heads, 2)) for a in view.attentions() if not a.refusal and a.kv_heads > 1}
    return heads, {m.path: list(range(0, m.width, 3)) for m in view.mlps() if not m.refusal}


CASES = [(name, dtype) for name in ALL for dtype in EXACT if dtype == torch.float32 or name not in SINGLE]


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_removing_equals_masking(name, dtype):
    model, batch = ALL[name]()
    model.to(dtype)
    batch = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    view = View(model)
    heads, widths = halves(view)
    assert bool(heads) == (name not in REFUSED and name not in ONE_GROUP)
    before = [(path, tuple(tensor.shape)) for path, tensor in model.named_parameters()]
    errors = view.check_exact(batch, heads, widths)
    assert set(errors) == set(heads) | set(widths)
    assert max(errors.values()) <= EXACT[dtype], errors
    assert [(path, tuple(tensor.shape)) for path, tensor in model.named_parameters()] == before


def removed(view):
    """Different heads in every layer: half of them in one, all but the last in the next."""
    for i, attention in enumerate(view.attentions()):
        if not attention.refusal and attention.kv_heads > 1:
            count = attention.kv_heads
            view.keep_heads(attention, list(range(0, count, 2)) if i % 2 else list(range(count - 1)))
    for mlp in view.mlps():
        if not mlp.refusal:
            view.keep_width(mlp, list(range(0, mlp.width, 3)))


@pytest.mark.parametrize("name", ALL)
def test_all_parts_at_once_and_the_same_shapes_on_meta(name):
    model, batch = ALL[name]()
    empty = copy.deepcopy(model).to("meta")
    masked = View(copy.deepcopy(model))
    for i, attention in enumerate(masked.attentions()):
        if not attention.refusal and attention.kv_heads > 1:
            count = attention.kv_heads
            masked.mask_heads(attention, list(range(0, count, 2)) if i % 2 else list(range(count - 1)))
    for mlp in masked.mlps():
        if not mlp.refusal:
            masked.mask_width(mlp, list(range(0, mlp.width, 3)))
    with torch.no_grad():
        original, expected = run(model, batch), run(masked.model, batch)
        removed(View(model))
        assert relative_error(run(model, batch), expected) < 1e-5
    assert relative_error(original, expected) > 1e-3  # the masked parts did matter
    removed(View(empty))
    shapes = {path: tuple(tensor.shape) for path, tensor in model.state_dict().items()}
    assert {path: tuple(tensor.shape) for path, tensor in empty.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ALL)
def test_detection_after_surgery_gives_the_new_counts(name):
    view = View(ALL[name]()[0])
    for attention in view.attentions():
        if attention.refusal or attention.kv_heads == 1:
            continue
        keep = list(range(0, attention.kv_heads, 2))
        view.keep_heads(attention, keep)
        now = view.attention(attention.path)
        size = attention.heads // attention.kv_heads
        assert (now.heads, now.kv_heads) == (len(keep) * size, len(keep))
        assert (now.head_dim, now.value_dim, now.o) == (attention.head_dim, attention.value_dim, attention.o)
        assert now.layout == attention.layout or now.kv_heads == 1  # with one group both orders are the same
        assert now.refusal == ""
    for mlp in view.mlps():
        if not mlp.refusal:
            view.keep_width(mlp, [0, 2, 3])
            assert {m.path: m.width for m in view.mlps()}[mlp.path] == 3


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_module_and_the_reason(name):
    view = View(ALL[name]()[0])
    for attention in view.attentions():
        with pytest.raises(CompressError) as error:
            view.keep_heads(attention, [0])
        assert str(error.value).startswith(f"{attention.path}: heads cannot be removed, ")
        assert REFUSED[name] in str(error.value)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    name=st.sampled_from(["llama", "gpt2", "falcon", "gpt_neox", "sd3", "t5", "swinv2", "phi3", "gemma"]),
)
def test_any_subset_of_groups_and_queries_is_exact(data, name):
    model, batch = ALL[name]()
    view = View(model)
    attention = data.draw(st.sampled_from(view.attentions()))
    size = attention.heads // attention.kv_heads
    groups = sorted(data.draw(st.sets(st.integers(0, attention.kv_heads - 1), min_size=1)))
    queries = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    reference = View(copy.deepcopy(model))
    reference.mask_heads(attention, groups, queries)
    view.keep_heads(attention, groups, queries)
    with torch.no_grad():
        assert relative_error(run(model, batch), run(reference.model, batch)) < 1e-5
    assert view.attention(attention.path).heads == len(groups) * len(queries)


class Plain(nn.Module):
    """An attention of plain torch with a switchable extra projection."""

    def __init__(self, extra=(), fused=False):
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        if fused:
            self.qkv = nn.Linear(32, 96)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.o_proj = nn.Linear(32, 32)
        for name in extra:
            self.add_module(name, nn.Linear(32, 32))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shuffled(Plain):
    """A fused projection that is cut in an order of its own."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (32, 3)).unbind(-1)
        return self.o_proj(q + k + v)


def test_unknown_projections_are_refused_by_name():
    model = nn.ModuleDict({"attn": Plain(extra=("r_proj", "pos"))})
    (attention,) = View(model).attentions()
    assert attention.refusal == "it also has attn.r_proj, attn.pos"
    with pytest.raises(CompressError, match=r"attn: heads cannot be removed, it also has attn\.r_proj, attn\.pos"):
        View(model).keep_heads(attention, [0, 1])
    assert View(nn.ModuleDict({"attn": Plain()})).attention("attn").refusal == ""


def test_an_unknown_order_of_a_fused_projection_is_refused():
    (attention,) = View(nn.ModuleDict({"attn": Shuffled(fused=True)})).attentions()
    assert attention.refusal == "the forward does not show how attn.qkv is split into heads"


def test_a_replaced_linear_is_refused_by_name():
    class Packed(nn.Module):
        in_features, out_features = 32, 32

    view = View(models.MODELS["llama"]()[0])
    path = view.attentions()[0].k
    view.replace(path, Packed())
    assert view.attentions()[0].refusal.startswith(f"{path} is a Packed, not a Linear")
    view.replace(view.mlps()[0].down, type("Packed", (Packed,), {"in_features": 64})())
    assert "down_proj is a Packed, not a Linear" in view.mlps()[0].refusal
    with pytest.raises(CompressError, match="channels cannot be removed"):
        view.keep_width(view.mlps()[0], [0])


def test_joint_attention_keeps_both_streams_together():
    view = View(models.MODELS["sd3"]()[0])
    first, last = view.attentions()
    assert set(first.added) == {"q", "k", "v", "o"} and set(last.added) == {"q", "k", "v"}
    view.keep_heads(first, [0, 3])
    widths = {role: view.module(path).out_features for role, path in first.added.items()}
    assert widths == {"q": 16, "k": 16, "v": 16, "o": 32}
    assert view.module(first.added["o"]).in_features == 16


@pytest.mark.parametrize("kept", [[], [4], [1, 0], [0, 0], [-1]], ids=str)
def test_indices_that_are_not_there_are_refused(kept):
    view = View(models.MODELS["bert"]()[0])
    attention = view.attentions()[0]
    with pytest.raises(CompressError, match=f"{attention.path}: kv_groups are .*must be"):
        view.keep_heads(attention, kept)


def test_slices_keep_dtype_and_requires_grad():
    model = models.MODELS["gpt2"]()[0].to(torch.bfloat16)
    view = View(model)
    attention = view.attentions()[0]
    view.module(attention.qkv).weight.requires_grad_(False)
    view.keep_heads(attention, [1, 2])
    weight, bias = view.module(attention.qkv).weight, view.module(attention.qkv).bias
    assert weight.dtype == torch.bfloat16 and weight.shape == (32, 48)
    assert not weight.requires_grad and bias.requires_grad


def test_layouts_are_read_from_the_forward():
    layout = {name: {a.layout for a in View(ALL[name]()[0]).attentions()} for name in ALL}
    assert {n for n, found in layout.items() if "interleaved" in found} == {
        "gpt_neox", "gpt_bigcode", "bloom", "falcon", "falcon_mha", "persimmon",
    }  # fmt: skip
    fused = {n for n, found in layout.items() if "fused" in found}
    assert {"gpt2", "phi3", "modernbert", "sam_vision", "mpt"} <= fused


def test_blocks_of_nested_stages_and_encoder_decoders():
    blocks = {name: View(ALL[name]()[0]).blocks() for name in ("swin", "t5", "unet2d", "flux", "qwen3_moe")}
    assert len(blocks["swin"]) == 4 and all(len(b.attentions) == len(b.mlps) == 1 for b in blocks["swin"])
    assert [(len(b.attentions), len(b.mlps)) for b in blocks["t5"]] == [(1, 1), (1, 1), (2, 1), (2, 1)]
    assert [b.path for b in blocks["t5"]][:2] == ["encoder.block.0", "encoder.block.1"]
    assert all(b.attentions == (b.path,) for b in blocks["unet2d"])
    assert len(blocks["flux"]) == 4 and all(len(b.mlps) == 1 for b in blocks["qwen3_moe"])


def test_cross_and_causal():
    kinds = {name: [(a.cross, a.causal) for a in View(ALL[name]()[0]).attentions()] for name in ALL}
    assert kinds["llama"] == kinds["gpt2"] == kinds["gptj"] == kinds["xglm"] == [(False, True)] * 2
    assert kinds["bert"] == kinds["vit"] == kinds["dit"] == kinds["modernbert"] == [(False, False)] * 2
    encoder_decoder = [(False, False)] * 2 + [(False, True), (True, False)] * 2
    assert kinds["t5"] == kinds["whisper"] == kinds["bart"] == kinds["mt5"] == encoder_decoder
    assert kinds["clip"] == [(False, True)] * 2 + [(False, False)] * 2
    assert kinds["pixart"] == [(False, False), (True, False)] * 2


def test_linears_leave_out_tied_output_heads():
    model, _ = models.MODELS["gpt2"]()
    linears = View(model).linears()
    assert "lm_head" not in linears and "transformer.h.0.attn.c_attn" in linears
    assert "lm_head" in View(models.text("llama", tie_word_embeddings=False)[0]).linears()


def test_libraries_and_paths():
    assert View(models.MODELS["vit"]()[0]).library == "transformers"
    assert View(models.MODELS["dit"]()[0]).library == "diffusers"
    view = View(nn.Sequential(nn.Linear(2, 2)))
    assert view.library == "torch" and view.attentions() == view.mlps() == view.blocks() == []
    with pytest.raises(CompressError, match="no module of this model"):
        view.replace("1", nn.Linear(2, 2))
    with pytest.raises(CompressError, match="0: no attention"):
        view.attention("0")


def test_convolutional_models_have_no_attention():
    model = models.of("convnext", "AutoModel", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    assert View(model).attentions() == [] and View(model).blocks() == []


def test_a_config_view_shows_later_changes_of_the_shared_config():
    model = models.MORE["phi3"]()[0]
    view = View(model)
    view.keep_heads(view.attentions()[0], [1])
    own = view.module(view.attentions()[0].path).config
    assert isinstance(own, ConfigView) and own.num_attention_heads == 2
    assert model.config.num_attention_heads == 4
    model.config._attn_implementation = "eager"
    assert own._attn_implementation == "eager" and copy.deepcopy(own).num_key_value_heads == 1


def test_a_projection_wider_than_its_heads_is_refused():
    model = nn.ModuleDict({"attn": Plain()})
    model["attn"].q_proj = nn.Linear(32, 64)  # queries and a gate
    (attention,) = View(model).attentions()
    assert attention.heads == 4 and attention.refusal == "attn.q_proj has 64 outputs where 4 heads explain 32"


def test_a_position_bias_from_the_stack_is_refused():
    size = {"num_layers": 1, "num_decoder_layers": 1, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    encoder = [a for a in View(models.of("udop", "AutoModel", **size)).attentions() if a.path.startswith("encoder")]
    assert encoder and all("position bias" in attention.refusal for attention in encoder)
