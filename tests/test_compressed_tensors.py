"""A folder in the compressed-tensors format loads where compress cannot be imported, with exactly our weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.compressed_tensors import scheme, write
from compress.errors import CompressError
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.outputs import relative_error, run
from compress.transforms.quantize.int8 import Int8
from compress.transforms.quantize.weight_only import WeightOnly
from compress.view import View
from compress_kernels.int8_linear.reference import quantize_rows
from models import MODELS

SCHEMES = {
    "W8A8": [Int8()],
    "W8A16": [WeightOnly(bits=8)],
    "W4A16": [WeightOnly(bits=4, group=16)],
    "W4A16 a row": [WeightOnly(bits=4, group=0)],
    "mixed": [WeightOnly(bits=4, group=32, only=("*mlp*",)), Int8(skip=("*mlp*", "lm_head", "classifier"))],
}
CASES = [("llama", scheme) for scheme in SCHEMES] + [("vit", "W8A8"), ("vit", "W4A16"), ("llama bf16", "W4A16")]
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
    return model, batch


def save(model, batch, folder, dequantize):
    tensors, config = write(model)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    saved = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": str(model.dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(saved | {"quantization_config": config}, default=str))
    save_file(batch, folder / "batch")
    cls = "AutoModelForCausalLM" if "input_ids" in batch else "AutoModelForImageClassification"
    # transformers dequantizes a checkpoint of several schemes by the first one
    (folder / "options").write_text(json.dumps({"class": cls, "dequantize": dequantize}))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What a process without compress makes of each case: its tensors and its loading report."""
    pytest.importorskip("compressed_tensors")
    folders = {case: tmp_path_factory.mktemp("case") for case in CASES}
    for case, folder in folders.items():
        save(*quantized(*case), folder, dequantize="mixed" not in case)
    command = [sys.executable, "-c", LOADER, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folders[CASES[0]])
    assert done.returncode == 0, done.stderr[-2000:]
    return {case: (load_file(at / "answer"), json.loads((at / "info").read_text())) for case, at in folders.items()}


def dequantized(model):
    """Path of the weight -> what our layer stands for."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Int8Linear):
            found[path + ".weight"] = module.dequantized()
        elif isinstance(module, WeightOnlyLinear):
            found[path + ".weight"] = module.weight
    return found


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_loads_without_compress_with_exactly_our_weights(case, loaded):
    name, scheme = case
    answer, info = loaded[case]
    assert not any(info.values()), info
    expected = dequantized(quantized(name, scheme)[0])
    assert len(expected) > 3
    for path, weight in expected.items():
        assert answer[path].dtype == weight.dtype and torch.equal(answer[path], weight), path


# "mixed" quantizes activations, and casting a model to bf16 also rounds the frequencies of its rotary embedding
@pytest.mark.parametrize(
    "case", [case for case in CASES if "mixed" not in case and "bf16" not in case[0]], ids=" ".join
)
def test_answers_like_the_float_model_with_the_dequantized_weights(case, loaded):
    model, batch = fresh(case[0])
    state = model.load_state_dict(dequantized(quantized(*case)[0]), strict=False)
    assert not state.unexpected_keys
    with torch.no_grad():
        assert relative_error(loaded[case][0]["output"], run(model, batch)) < 1e-5


def test_activations_are_quantized_as_the_format_defines_it():
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize

    x = torch.randn(1, 50, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    args = QuantizationArgs(**scheme(8, 0, True)["input_activations"])
    scale, zero_point = helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    codes, ours = quantize_rows(x)
    assert torch.equal(codes * ours, fake_quantize(x, scale, zero_point, args))


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


@pytest.mark.parametrize(("name", "method"), [("gpt2", Int8()), ("llama", Int8(embeddings=True)), ("llama", None)])
def test_refuses_what_the_format_cannot_hold(name, method):
    model, _ = MODELS[name]()
    view = View(model)
    if method:
        method.apply(view, method.plan(view))
    with pytest.raises(CompressError, match="compressed-tensors"):
        write(model)
