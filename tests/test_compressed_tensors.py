"""A folder in the compressed-tensors format loads where compress cannot be imported, with exactly our weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.compressed_tensors import caveat, obstacle, scheme, write
from compress.errors import CompressError
from compress.linears import swap
from compress.nn.fp8_linear import Fp8Linear
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.outputs import relative_error, run
from compress.transforms.quantize.fp8 import Fp8
from compress.transforms.quantize.int8 import Int8
from compress.transforms.quantize.kv_cache import KvCache
from compress.transforms.quantize.weight_only import WeightOnly
from compress.view import View
from compress_kernels.fp8_linear.reference import dequantize_rows
from compress_kernels.fp8_linear.reference import quantize_rows as fp8_rows
from compress_kernels.int8_linear.reference import quantize_rows as int8_rows
from models import MODELS

STATIC = "W8A8 static"
SCHEMES = {
    "W8A8": [Int8()],
    STATIC: [],
    "W8A16": [WeightOnly(bits=8)],
    "W8A16 groups": [WeightOnly(bits=8, group=16)],
    "W4A16": [WeightOnly(bits=4, group=16)],
    "W4A16 a row": [WeightOnly(bits=4, group=0)],
    "W4A16 zeros": [WeightOnly(bits=4, group=16, symmetric=False)],
    "W6A16": [WeightOnly(bits=6, group=16, symmetric=False)],
    "W3A16": [WeightOnly(bits=3, group=16)],
    "W3A16 zeros a row": [WeightOnly(bits=3, group=0, symmetric=False)],
    "W2A16": [WeightOnly(bits=2, group=16, symmetric=False)],
    "FP8": [Fp8()],
    "FP8 a tensor": [Fp8(scales="tensor")],
    "FP8 blocks": [],
    "FP8 weights": [Fp8(activations="none")],
    "mixed": [
        WeightOnly(bits=4, group=32, only=("*mlp*",)),
        Int8(only=("*.q_proj", "*.k_proj", "*.v_proj")),
        Fp8(only=("*.o_proj",)),
    ],
}
CASES = [("llama", scheme) for scheme in SCHEMES]
CASES += [("vit", "W8A8"), ("vit", "W4A16"), ("llama bf16", "W4A16"), ("llama bf16", "W3A16"), ("llama bf16", "FP8")]
LOADER = """
import json, sys, warnings
sys.modules["compress"] = None
warnings.simplefilter("ignore")
import torch, transformers
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    options = json.load(open(folder + "/options"))
    if options.pop("dequantize"):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    cls = getattr(transformers, options.pop("class"))
    model, info = cls.from_pretrained(folder, output_loading_info=True, dtype="auto", **options)
    with torch.no_grad():
        output = model.eval()(**load_file(folder + "/batch")).logits
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = {name + ".weight": module.weight.detach().contiguous() for name, module in linears.items()}
    save_file({"output": output, **weights}, folder + "/answer")
    json.dump({name: sorted(map(str, value)) for name, value in info.items()}, open(folder + "/info", "w"))
"""


def fresh(name):
    """A tiny model in the dtype that the case names."""
    name, _, dtype = name.partition(" ")
    model, batch = MODELS[name]()
    return (model.bfloat16() if dtype else model), batch


def quantized(name, scheme):
    model, batch = fresh(name)
    for method in SCHEMES[scheme]:
        view = View(model)
        method.apply(view, method.plan(view))
    if not SCHEMES[scheme]:  # what the options of a tiny model do not reach
        taken = {path: {} for path in View(model).linears()}
        swap(View(model), taken, static if scheme == STATIC else block)
    return model, batch


def static(path, linear, edit):
    return Int8Linear.from_linear(linear, None, torch.tensor(0.03), torch.tensor(100))


def block(path, linear, edit):
    fits = all(size % 32 == 0 for size in linear.weight.shape)
    return Fp8Linear.from_linear(linear, "block" if fits else "channel", 32 if fits else 0, True)


def save(model, batch, folder, dequantize):
    tensors, config = write(model)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    saved = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": str(model.dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(saved | {"quantization_config": config}, default=str))
    save_file(batch, folder / "batch")
    cls = "AutoModelForCausalLM" if "input_ids" in batch else "AutoModelForImageClassification"
    if dequantize is None:
        dequantize = len(config["config_groups"]) == 1  # transformers dequantizes layers of several kinds by the first
    (folder / "options").write_text(json.dumps({"class": cls, "dequantize": dequantize}))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What a process without compress makes of each case: its tensors and its loading report."""
    return load_alone({case: tmp_path_factory.mktemp("case") for case in CASES})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The answers of a process without compress that leaves weights compressed and rounds activations."""
    folders = {("llama", scheme): tmp_path_factory.mktemp("case") for scheme in ACTIVATIONS}
    return {case[1]: answer["output"] for case, (answer, _) in load_alone(folders, dequantize=False).items()}


def load_alone(folders, dequantize=None):
    pytest.importorskip("compressed_tensors")
    for case, folder in folders.items():
        save(*quantized(*case), folder, dequantize)
    command = [sys.executable, "-c", LOADER, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=next(iter(folders.values())))
    assert done.returncode == 0, done.stderr[-2000:]
    return {case: (load_file(at / "answer"), json.loads((at / "info").read_text())) for case, at in folders.items()}


def dequantized(model):
    """Path of the weight -> what our layer stands for."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (Int8Linear, Fp8Linear)):
            found[path + ".weight"] = module.dequantized()
        elif isinstance(module, WeightOnlyLinear):
            found[path + ".weight"] = module.weight
    return found


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_loads_without_compress_with_exactly_our_weights(case, loaded):
    name, scheme = case
    answer, info = loaded[case]
    left = info.pop("unexpected_keys")  # a dequantized model has no use for the ranges of its activations
    assert not any(info.values()) and all("input_" in key for key in left), (info, left)
    expected = dequantized(quantized(name, scheme)[0])
    assert len(expected) > 3
    for path, weight in expected.items():
        assert answer[path].dtype == weight.dtype and torch.equal(answer[path], weight), path


# Layers of several kinds are not dequantized, and casting a model to bf16 also rounds its rotary frequencies.
@pytest.mark.parametrize(
    "case", [c for c in CASES if not {"mixed", "FP8 blocks"} & {*c} and "bf16" not in c[0]], ids=" ".join
)
def test_answers_like_the_float_model_with_the_dequantized_weights(case, loaded):
    model, batch = fresh(case[0])
    state = model.load_state_dict(dequantized(quantized(*case)[0]), strict=False)
    assert not state.unexpected_keys
    with torch.no_grad():
        assert relative_error(loaded[case][0]["output"], run(model, batch)) < 1e-5


# Without dequantizing, the library rounds activations too: what it answers is what our layers answer.
ACTIVATIONS = ["W8A8", STATIC, "FP8", "FP8 a tensor", "FP8 blocks", "FP8 weights", "W8A16"]


@pytest.mark.parametrize("scheme", ACTIVATIONS)
def test_answers_as_the_library_does_with_activations_quantized(scheme, plain):
    model, batch = quantized("llama", scheme)
    with torch.no_grad():
        error = relative_error(run(model, batch), plain[scheme])
    assert error < (1e-2 if scheme == "W8A16" else 1e-6)  # whose products run in bf16


@pytest.mark.parametrize("found", [Int8(), Fp8(), Fp8(scales="tensor")], ids=repr)
def test_dynamic_activations_are_quantized_as_the_format_defines_it(found):
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize

    net = torch.nn.Sequential(torch.nn.Linear(96, 8))
    found.apply(View(net), found.plan(View(net)))
    x = torch.randn(1, 50, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    args = QuantizationArgs(**scheme(net[0])["input_activations"])
    expected = fake_quantize(x, *helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Identity()), args)
    if isinstance(net[0], Int8Linear):
        codes, scale, zero = int8_rows(x.flatten(0, 1))
        ours = ((codes.float() - zero.float()) * scale).view(x.shape)
    else:
        ours = dequantize_rows(*fp8_rows(x, net[0].block))
    off = (ours - expected).abs().amax(-1) / (expected.abs().amax(-1))
    assert off.max() < (1e-6 if isinstance(net[0], Fp8Linear) else 1 / 127) and (off > 1e-6).float().mean() < 0.05


def test_on_disk_names_and_ignored_layers():
    model, _ = MODELS["vit"]()
    view = View(model)
    method = Int8(skip=("classifier",))
    method.apply(view, method.plan(view))
    tensors, config = write(model)
    original, _ = MODELS["vit"]()
    assert config["ignore"] == ["classifier"]
    assert {name for name in tensors if not name.endswith("_scale")} == disk_names(original)


def disk_names(model):
    from transformers.core_model_loading import revert_weight_conversion

    return set(revert_weight_conversion(model, dict(model.state_dict())))


@pytest.mark.parametrize(
    ("name", "methods", "reason"),
    [
        ("gpt2", [Int8()], "no torch linear"),
        ("llama", [Int8(embeddings=True)], "embedding"),
        ("llama", [Int8(), KvCache()], "code of ours"),
        ("llama", [], "no quantized layer"),
    ],
)
def test_refuses_what_the_format_cannot_hold(name, methods, reason):
    model, _ = MODELS[name]()
    for method in methods:
        view = View(model)
        method.apply(view, method.plan(view))
    assert "compressed-tensors" in obstacle(model) and reason in obstacle(model)
    with pytest.raises(CompressError, match=reason):
        write(model)


def test_factors_on_the_inputs_are_no_part_of_the_format():
    model, _ = MODELS["llama"]()
    assert not obstacle(quantized("llama", "W8A8")[0])
    swap(View(model), {"lm_head": {}}, lambda path, module, edit: Int8Linear.from_linear(module, torch.ones(32)))
    assert "lm_head: its inputs are multiplied by a factor" in obstacle(model)


def test_zero_points_are_told_of():
    assert not caveat(quantized("llama", "W4A16")[0])
    assert "dequantize=True" in caveat(quantized("llama", "W4A16 zeros")[0])
    model, _ = MODELS["llama"]()
    for method in (WeightOnly(bits=4, group=16, symmetric=False, only=("*mlp*",)), Int8(only=("*attn*",))):
        method.apply(View(model), method.plan(View(model)))
    assert "several kinds" in caveat(model)
