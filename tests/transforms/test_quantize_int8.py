"""quantize.int8: the error it may make, what it leaves alone and why, ties, and models around it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import CompressError
from compress.nn.fused_attention import FusedAttention
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear, quantize_rows
from compress.outputs import relative_error, run
from compress.transforms.quantize.int8 import Int8
from compress.view import View
from models import MODELS


def applied(model, **options):
    method, view = Int8(**options), View(model)
    plan = method.plan(view)
    method.apply(view, plan)
    return plan


class Net(nn.Module):
    """Layers that share weights in every way: one module twice, two modules with one weight, a head with a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.first = self.again = nn.Linear(32, 32)
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)
        self.right.weight = self.left.weight
        self.mixer = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.again(self.first(self.table(tokens)))
        x = self.left(x) + self.right(x)
        return self.head(x + self.mixer(x, x, x)[0])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(-20, 20), st.integers(0, 99))
def test_weights_are_off_by_at_most_half_a_step(count, depth, power, seed):
    weight = torch.randn(count, depth, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    codes, scale = quantize_rows(weight)
    assert codes.min() >= -127
    assert ((weight - codes * scale).abs() <= scale * 0.5001).all()
    again, _ = quantize_rows(codes * scale)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_8_bits_and_dtypes_are_kept(dtype):
    linear = nn.Linear(64, 48).to(dtype)
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        assert 1e-3 < relative_error(layer(x), linear(x)) < 1.5e-2
    assert layer(x).dtype == dtype and layer.weight_scale.dtype == dtype and layer.weight.dtype == torch.int8
    assert layer.bias is linear.bias
    # a loader that casts every parameter to the model's dtype, or a user who asks for float32, changes no weight
    assert torch.equal(copy.deepcopy(layer).float().dequantized().to(dtype), layer.dequantized())


def test_conv1d_is_turned_round():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(48, 32)
    layer = Int8Linear.from_linear(conv)
    assert layer.weight.shape == (48, 32) and layer.transposed
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(layer(x), conv(x)) < 1.5e-2


def test_shared_weights_stay_shared_and_tied_heads_stay():
    torch.manual_seed(0)
    net, tokens = Net().eval(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = net(tokens)
        plan = applied(net, embeddings=True)
        assert relative_error(net(tokens), expected) < 5e-2
    assert set(plan.edits) == {"first", "left", "right"}
    assert net.first is net.again and isinstance(net.first, Int8Linear)
    assert net.left.weight is net.right.weight and net.left.weight_scale is net.right.weight_scale
    assert net.left.bias is not net.right.bias
    assert net.head.weight is net.table.weight and isinstance(net.table, nn.Embedding)
    assert set(plan.notes["refused"]) == {"mixer.out_proj", "table", "head"}


def test_a_weight_shared_with_a_layer_that_stays_stays():
    net = Net()
    plan = applied(net, skip=("right",))
    assert "left" not in plan.edits and "right" in plan.notes["refused"]["left"]
    with pytest.raises(CompressError, match=r"quantize.int8 cannot quantize left: .*right"):
        Int8(only=("left",)).plan(View(net))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("path", ["left", "table"])
def test_broken_weights_are_refused_in_one_line(value, path):
    net = Net()
    net.head.weight = nn.Parameter(torch.randn(20, 32))
    with torch.no_grad():
        net.get_submodule(path).weight[0, 0] = value
    with pytest.raises(CompressError, match=rf"^quantize.int8: {path}.weight holds NaN or infinite values, .*$"):
        Int8(embeddings=True).plan(View(net))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "dit", "swin"])
def test_models_answer_almost_the_same_and_shrink(name):
    model, batch = MODELS[name]()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        expected = run(model, batch)
        plan = applied(model)
        assert 1e-4 < relative_error(run(model, batch), expected) < 4e-2
    layers = [path for path, edit in plan.edits.items() if "attention" not in edit]
    assert all(isinstance(model.get_submodule(path), Int8Linear) for path in layers)
    assert not [path for path, module in View(model).linears().items() if path not in plan.notes["refused"]]
    assert sum(parameter.nbytes for parameter in model.parameters()) < 0.6 * size


@pytest.mark.parametrize(("name", "taken"), [("bert", 2), ("vit", 2), ("llama", 0), ("dit", 0)])
def test_the_softmax_of_encoders_is_ours_and_changes_only_rounding(name, taken):
    answers = []
    for attention in (True, False):
        model, batch = MODELS[name]()
        applied(model, attention=attention)
        found = [module for module in model.modules() if isinstance(module, FusedAttention)]
        assert len(found) == taken * attention
        with torch.no_grad():
            answers.append(run(model, batch))
    assert relative_error(*answers) < 2e-2  # a rounding can tip a code
    model, _ = MODELS[name]()
    spared = Int8(skip=("*attention*",)).plan(View(model)).edits.values()
    assert spared and not any("attention" in edit for edit in spared)


def test_embeddings_are_rows_of_int8():
    table = nn.Embedding(50, 40, padding_idx=3)
    got = Int8Embedding.from_embedding(table)
    indices = torch.arange(50).view(5, 10)
    expected = table.weight.detach()[indices]
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((got(indices) - expected).abs() <= 0.5001 * step).all()
    assert torch.equal(got(torch.tensor([3])), torch.zeros(1, 40))
    codes, scale = quantize_rows(table.weight)
    assert torch.equal(got(indices), (codes * scale)[indices])


def test_embeddings_only_where_asked_for_and_possible():
    model, batch = MODELS["bert"]()
    assert not [path for path in Int8().plan(View(model)).edits if "embedding" in path]
    plan = applied(model, embeddings=True)
    taken = [path for path in plan.edits if isinstance(model.get_submodule(path), Int8Embedding)]
    assert taken and "bert.embeddings.word_embeddings" in plan.notes["refused"]
    run(model, batch)
    plan = Int8(embeddings=True).plan(View(MODELS["opt"]()[0]))
    assert "more than a table" in plan.notes["refused"]["model.decoder.embed_positions"]
    narrow = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    assert "narrower" in Int8(embeddings=True).plan(View(narrow)).notes["refused"]["0"]


def test_a_model_of_both_modules_compiles_to_one_graph():
    from compress.transforms.quantize.weight_only import WeightOnly

    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    applied(net, only=("0",))
    view, method = View(net), WeightOnly(only=("2",), bits=4, group=32)
    method.apply(view, method.plan(view))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))
