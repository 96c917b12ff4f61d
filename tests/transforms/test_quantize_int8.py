"""quantize.int8: the error it may make, what it leaves alone and why, ties, and models around it."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from compress import compress, layer_inputs
from compress.activations import find_activations
from compress.errors import CompressError
from compress.gptq import gptq
from compress.nn.fused_attention import FusedAttention
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear, quantize_rows
from compress.nn.int8_mlp import Int8Mlp
from compress.outputs import relative_error, run
from compress.replay import record
from compress.rounding import rtn
from compress.saving import save
from compress.smoothing import row_grid
from compress.transforms.quantize.int8 import Int8
from compress.view import View
from models import MODELS, text

TIED = {"llama": {"tie_word_embeddings": True}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}


def applied(model, batches=None, **options):
    method, view = Int8(**options), View(model)
    plan = method.plan(view)
    if batches is not None:
        plan = method.calibrate(view, plan, batches)
    method.apply(view, plan)
    return plan


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Loud(nn.Module):
    """A norm before two layers, and one that reads the input itself; three channels are louder than all others."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm, self.one, self.two = nn.LayerNorm(48), nn.Linear(48, 40), nn.Linear(48, 40)
            self.bare = nn.Linear(48, 40)
            self.norm.weight.data[:3] = 60

    def forward(self, x):
        y = self.norm(x)
        return self.one(y) + self.two(y) + self.bare(x * torch.tensor([1.0] * 45 + [80.0] * 3))


LOUD = [{"x": noise(8, 30, 48, seed=seed)} for seed in (1, 2)]


def loud_error(**options):
    net, x = Loud().eval(), noise(4, 30, 48, seed=3)
    with torch.no_grad():
        expected = net(x)
        plan = applied(net, LOUD, **options)
        return relative_error(net(x), expected), plan, net


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


@pytest.mark.parametrize(
    ("name", "taken", "where"),
    [("bert", 2, "encoders"), ("vit", 2, "all"), ("llama", 0, "encoders"), ("llama", 2, "all"), ("dit", 0, "all")],
)
def test_the_softmax_is_ours_and_changes_only_rounding(name, taken, where):
    answers = []
    for fuse in (where, "off"):
        model, batch = MODELS[name]()
        applied(model, fuse=fuse)
        found = [module for module in model.modules() if isinstance(module, FusedAttention)]
        assert len(found) == taken * (fuse != "off")
        with torch.no_grad():
            answers.append(run(model, batch))
    assert relative_error(*answers) < 2e-2  # a rounding can tip a code
    model, _ = MODELS[name]()
    spared = Int8(skip=("*attention*",)).plan(View(model)).edits.values()
    assert spared and not any("attention" in edit for edit in spared)


@pytest.mark.parametrize(("name", "taken"), [("bert", 2), ("vit", 2), ("llama", 0), ("opt", 0)])
def test_the_activations_of_encoders_are_computed_by_the_layers_before_them(name, taken):
    answers = []
    for fuse in ("encoders", "off"):
        model, batch = MODELS[name]()
        method, view = Int8(fuse=fuse, smooth="off", solver="rtn"), View(model)
        plan = method.calibrate(view, method.plan(view), [batch])
        method.apply(view, plan)
        fused = [edit for edit in plan.edits.values() if edit.get("activation") == "gelu"]
        assert len(fused) == taken * (fuse != "off")
        assert sum(isinstance(module, Int8Mlp) for module in model.modules()) == len(fused)
        assert sum(isinstance(module, nn.Identity) for module in model.modules()) >= 2 * len(fused)
        with torch.no_grad():
            answers.append(run(model, batch))
    assert relative_error(*answers) < 2e-2  # a rounding can tip a code


def test_an_activation_that_is_not_all_that_reads_a_layer_stays():
    model, batch = MODELS["bert"]()
    layer = model.bert.encoder.layer[0].intermediate
    layer.register_forward_hook(lambda module, args, output: output + module.dense(args[0]))
    paths = set(View(model).linears())
    assert find_activations(View(model), paths, paths, batch) == {}
    model, batch = MODELS["bert"]()
    paths -= {"bert.encoder.layer.1.intermediate.dense"}
    edit = {"activation": "gelu", "instead of": "intermediate_act_fn"}
    down = "bert.encoder.layer.0.output.dense"
    for joinable, more in ((paths, {"then": down}), (paths - {down}, {})):
        found = find_activations(View(model), paths, joinable, batch)
        assert found == {"bert.encoder.layer.0.intermediate.dense": edit | more}


def test_a_layer_whose_input_is_changed_on_the_way_is_not_joined():
    model, batch = MODELS["bert"]()
    paths = set(View(model).linears())
    first, second = model.bert.encoder.layer
    first.output.dense.register_forward_pre_hook(lambda module, args: (args[0] + 0,))
    second.output.dense.register_forward_hook(lambda module, args, output: output * (1 + args[0][..., :1]))
    found = find_activations(View(model), paths, paths, batch)
    assert len(found) == 2 and not any("then" in edit for edit in found.values())


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


def test_smoothing_helps_where_channels_are_loud():
    plain, _, _ = loud_error(smooth="off", solver="rtn")
    half, _, _ = loud_error(smooth=0.5, solver="rtn")
    folded, fold_plan, fold_net = loud_error(smooth="fold", solver="rtn")
    best, plan, net = loud_error(solver="rtn")
    both, _, _ = loud_error()
    assert both < best < folded < plain and best < 0.6 * plain and best < half
    assert plan.notes["folded into"] == fold_plan.notes["folded into"] == {"one": "norm", "two": "norm"}
    assert net.bare.input_factor is not None and net.one.input_factor is None
    assert fold_net.bare.input_factor is None and plan.edits["bare"] == {"bits": 8, "factor": True}


def test_ranges_from_the_data_hold_for_all_tokens():
    dynamic, _, _ = loud_error()
    static, plan, net = loud_error(activations="static")
    assert dynamic < static < 2e-2 and plan.edits["one"]["static"]
    low, high = net.one.input_scale * -128, net.one.input_scale * 127
    assert low < 0 < high and net.one.input_zero_point.dtype == torch.int8


def test_gptq_with_inputs_that_say_nothing_rounds_to_nearest():
    weight = noise(24, 40)
    grid = row_grid(weight, torch.float32)
    assert torch.equal(gptq(weight, torch.eye(40), grid), rtn(weight, grid))
    codes, scale = quantize_rows(weight)
    assert torch.equal(rtn(weight, grid), codes) and torch.equal(grid.scale, scale)


def test_what_is_worked_on_in_many_passes_comes_out_the_same(monkeypatch):
    _, whole, _ = loud_error()
    monkeypatch.setattr(layer_inputs, "MEMORY", 1)
    _, parts, _ = loud_error()
    assert whole.edits == parts.edits and whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(whole.tensors[name], parts.tensors[name]) for name in whole.tensors)


def test_padding_does_not_count():
    x, mask = noise(2, 6, 8), torch.ones(2, 6)
    mask[1, 2:] = 0
    assert torch.equal(layer_inputs.real(x, mask), torch.cat([x[0], x[1, :2]]))
    assert len(layer_inputs.real(x.flatten(0, 1), mask)) == 12


def test_rows_far_longer_than_most_do_not_rule_the_moments():
    rows = noise(20, 6)
    rows[4] *= 1000
    rows[7] = 0
    quiet = layer_inputs.quieted(rows)
    assert quiet[4].norm() < 4 * rows.norm(dim=1).median() and torch.equal(quiet[8:], rows[8:])
    assert torch.equal(layer_inputs.quieted(rows[7:8]), rows[7:8]) and len(layer_inputs.quieted(rows[:0])) == 0


class Odd(nn.Module):
    """Layers of one column, of one row, with dead inputs, dead outputs, one that never runs and two of one weight."""

    def __init__(self):
        super().__init__()
        self.wide, self.dead, self.thin = nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)
        self.left, self.right, self.idle = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40)
        self.right.weight = self.left.weight
        with torch.no_grad():
            self.dead.weight[:7] = 0
            self.dead.weight[:, 30:] = 0

    def forward(self, x):
        y = self.wide(x) * torch.tensor([0.0] * 20 + [1.0] * 20)
        return self.thin(self.left(self.dead(y)) + self.right(y))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_odd_layers_come_through(activations):
    torch.manual_seed(0)
    net, batches = Odd().eval(), [{"x": noise(9, 5, 1)}]
    with torch.no_grad():
        expected = net(**batches[0])
        plan = applied(net, batches, activations=activations)
        assert relative_error(net(**batches[0]), expected) < 3e-2
    assert net.left.weight is net.right.weight and net.left.input_factor is None
    assert "idle" in plan.notes["remarks"][0] and net.idle.input_scale is None
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_calibration_data_must_be_there_and_finite():
    with pytest.raises(CompressError, match="calibration data is empty"):
        applied(Loud(), [])
    with pytest.raises(CompressError, match="not finite"):
        applied(Loud(), [{"x": noise(2, 3, 48) * torch.nan}])
    with pytest.raises(CompressError, match="give the recipe a calibrate section"):
        compress(Loud(), {"steps": [{"use": "quantize.int8", "smooth": "fold"}]}, validation=LOUD)
    assert compress(Loud(), {"steps": [{"use": "quantize.int8"}]}, validation=LOUD).model.bare.input_factor is None


@pytest.mark.parametrize("name", ["llama", "opt", "t5", "bert"])
def test_a_tied_head_shares_its_codes_with_the_table_and_is_saved_once(name, tmp_path):
    build = MODELS[name] if name in ("t5", "bert") else lambda: text(name, **TIED[name])
    model, batch = build()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder).eval()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is table.weight
    with torch.no_grad():
        expected = run(model, batch)
        plan = applied(model, head=True)
        answer = run(model, batch)
        assert relative_error(answer, expected) < 5e-2
    assert any("hold the same int8 rows" in remark for remark in plan.notes["remarks"])
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    steps = [record(type(model)(model.config), "quantize.int8", plan)]
    save(model, tmp_path / "out", "compress-plan", steps)
    stored = load_file(tmp_path / "out" / "compressed.safetensors")
    assert sum(tensor.shape == (99, 32) for tensor in stored.values()) == 1
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight_scale is loaded.get_input_embeddings().weight_scale
    with torch.no_grad():
        assert torch.equal(run(loaded, batch), answer)
    loaded.tie_weights()
    assert loaded.get_output_embeddings().weight_scale is loaded.get_input_embeddings().weight_scale


def test_a_head_stays_unless_it_is_asked_for():
    model, _ = MODELS["llama"]()
    plan = Int8().plan(View(model))
    assert "lm_head" not in plan.edits and plan.notes["refused"]["lm_head"] == "an output head"
    assert "lm_head" in Int8(head=True).plan(View(model)).edits
    with pytest.raises(CompressError, match="cannot quantize lm_head: an output head"):
        Int8(only=("lm_head",)).plan(View(model))
    tied, _ = text("llama", tie_word_embeddings=True)
    with pytest.raises(CompressError, match="shares its weight with model.embed_tokens"):
        Int8(only=("lm_head",)).plan(View(tied))
    plan = Int8(head=True, only=("lm_head", "model.embed_tokens")).plan(View(tied))
    assert set(plan.edits) == {"lm_head", "model.embed_tokens"}
    plan = Int8(head=True, skip=("model.embed_tokens",)).plan(View(tied))
    assert plan.notes["refused"]["lm_head"] == "model.embed_tokens stays as it is"
