"""Checkpoints where compress is not installed: loaded by their own code or by the libraries alone, or refused."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import CompressError
from compress.compressed_tensors import quantized
from compress.emit import describe, write
from compress.outputs import run
from compress.recipe import Emit, Recipe
from compress.replay import record
from compress.report import Report
from compress.source import Source
from compress.transform import find, names
from compress.view import View
from models import IMAGE, MODELS, of

ASK = """
import json, sys, torch
from safetensors.torch import load_file, save_file
import diffusers, transformers
library, loader, folder, part, options, batch, answer = sys.argv[1:]
model = getattr(sys.modules[library], loader).from_pretrained(folder, **json.loads(options))
model = getattr(model, part) if part else model
with torch.no_grad():
    output = model.eval()(**load_file(batch))
if answer:
    values = {name: value.contiguous() for name, value in output.items() if isinstance(value, torch.Tensor)}
    save_file({"answer": values.get("logits", next(iter(values.values())))}, answer)
assert "compress" not in sys.modules
print("loaded")
"""


def emitted(folder, name, uses, options=None, *, model=None, batch=None, emit=None):
    """Carry methods out on a tiny model and write it; the model, or None where one of them refuses."""
    given, example = MODELS[name]()
    model, batch = model if model is not None else given, batch or example
    steps = []
    for use in uses:
        cls = find(use)
        method = cls(**(options or cls.example))
        try:
            plan = method.plan(View(model))
        except CompressError:
            return None
        if not plan.edits:
            return None
        torch.manual_seed(0)
        if method.needs_data or method.uses_data:
            plan = method.calibrate(View(model), plan, [batch])
        steps.append(record(model, use, plan))
        method.apply(View(model), plan)
    write(Source(name, model, View(model).library), folder, steps, batch, emit or Emit(format="compress-plan"), {})
    return model


def ask(process, folder, loader, batch, library="transformers", part="", **options):
    """What a process without compress says, and the answer of the model that it loaded (None if it could not)."""
    save_file({key: value.contiguous() for key, value in batch.items()}, folder / "batch")
    answer = folder / "answer"
    answer.unlink(missing_ok=True)
    words = [library, loader, folder, part, json.dumps(options), folder / "batch", answer]
    child = process.start(ASK, *words)
    loaded = process.wait(child) == 0
    assert loaded == answer.exists() == child.said.endswith("loaded\n"), child.said
    return child.said, load_file(answer)["answer"] if loaded else None


def tiny_pipeline(transformer):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    return DiTPipeline(transformer, vae, DDIMScheduler())


def auto(folder, model):
    """The library and the auto class of an emitted folder."""
    entries = json.loads((folder / "config.json").read_text())["auto_map"]
    loader = next((name for name in entries if name != "AutoModel"), "AutoModel")
    return View(model).library, loader


@pytest.mark.parametrize("use", names())
@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_every_method_loads_by_the_code_it_carries_and_not_at_all_without(use, library, bare, tmp_path):
    for name in MODELS:
        if View(MODELS[name]()[0]).library == library and (model := emitted(tmp_path, name, [use])):
            break
    else:
        pytest.skip(f"{use} takes no tiny model of {library}")
    batch = MODELS[name]()[1]
    _, loader = auto(tmp_path, model)
    with torch.no_grad():
        expected = run(model, batch)
    _, answer = ask(bare, tmp_path, loader, batch, library, trust_remote_code=True)
    assert torch.equal(answer, expected)
    for wrong in {loader, "AutoModel", type(model).__name__}:
        said, answer = ask(bare, tmp_path, wrong, batch, library)
        assert answer is None and "Error" in said.splitlines()[-1]


def test_together_and_in_two_checkpoints_of_one_process(bare, tmp_path):
    code = "import sys, transformers\n"
    code += "for folder in sys.argv[1:]:\n"
    code += "    m = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)\n"
    code += "    print(type(m).__module__, type(m).__name__, sum(p.numel() for p in m.parameters()))\n"
    sizes = []
    for number, uses in enumerate([["heads.prune", "tokens.merge", "quantize.int8"], ["heads.prune"]]):
        options = {"only": ("vit.*",)} if number else None
        model = emitted(tmp_path / "same" / str(number) / "name", "vit", uses, options)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    said = bare.run(code, *(tmp_path / "same" / str(number) / "name" for number in (0, 1)))
    name = "transformers.models.vit.modeling_vit ViTForImageClassification"
    assert said.splitlines() == [f"{name} {size}" for size in sizes]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_base_model_loads_from_a_checkpoint_with_a_head(name, bare, tmp_path):
    model, (_, batch) = emitted(tmp_path, name, ["heads.prune"]), MODELS[name]()
    _, answer = ask(bare, tmp_path, "AutoModel", batch, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(answer, model.base_model(**batch).last_hidden_state)


def test_a_whole_pipeline_is_refused_without_compress(bare, tmp_path):
    transformer, batch = MODELS["dit"]()
    plan = find("tokens.merge")(ratio=0.25).plan(View(transformer))
    steps = [record(transformer, "tokens.merge", plan)]
    find("tokens.merge")().apply(View(transformer), plan)
    source = Source("dit", transformer, "diffusers", component="transformer", pipeline=tiny_pipeline(transformer))
    write(source, tmp_path, steps, batch, Emit(), {})
    said, answer = ask(bare, tmp_path, "DiffusionPipeline", batch, "diffusers", "transformer")
    assert answer is None and "compress-plan" in said
    with torch.no_grad():
        expected = run(transformer, batch)
    _, answer = ask(bare, tmp_path / "transformer", "AutoModel", batch, "diffusers", trust_remote_code=True)
    assert torch.equal(answer, expected)


def test_a_native_checkpoint_needs_nothing(bare, tmp_path):
    batch = MODELS["qwen3"]()[1]
    model = emitted(tmp_path, "qwen3", ["heads.prune"], {"keep": 0.5, "layout": "uniform"}, emit=Emit(format="native"))
    _, answer = ask(bare, tmp_path, "AutoModelForCausalLM", batch)
    with torch.no_grad():
        assert torch.equal(answer, run(model, batch))
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("use", ["quantize.int8", "quantize.weight_only"])
def test_compressed_tensors_gives_exactly_our_weights_and_nearly_our_answers(use, bare, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, (_, batch) = emitted(tmp_path, "llama", [use], emit=Emit()), MODELS["llama"]()
    assert json.loads((tmp_path / "compress.json").read_text())["format"] == "compressed-tensors"
    code = "import sys, torch, transformers\n"
    code += "from safetensors.torch import save_file\n"
    code += "options = transformers.CompressedTensorsConfig(dequantize=True)\n"
    code += "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=options)\n"
    code += "linears = {n: m for n, m in m.named_modules() if isinstance(m, torch.nn.Linear)}\n"
    code += "save_file({n: m.weight.detach().contiguous() for n, m in linears.items()}, sys.argv[2])\n"
    bare.run(code, tmp_path, tmp_path / "weights")
    weights = load_file(tmp_path / "weights")
    paths = [path for group in quantized(model).values() for path in group]
    assert len(paths) == (14 if use == "quantize.int8" else 15)  # which leaves the output head
    for path in paths:
        layer = model.get_submodule(path)
        ours = layer.dequantized() if use == "quantize.int8" else layer.weight
        assert torch.equal(weights[path], ours), path
    _, answer = ask(bare, tmp_path, "AutoModelForCausalLM", batch)
    with torch.no_grad():
        torch.testing.assert_close(answer, run(model, batch), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["vit", "dit"])
def test_the_code_of_a_checkpoint_imports_nothing_of_ours(name, tmp_path):
    uses = [use for use in names() if emitted(tmp_path / use, name, [use])]
    assert len(uses) > 3
    for path in tmp_path.rglob("*.py"):
        for line in path.read_text().splitlines():
            match = re.match(r"(from|import) ([\w.]+)", line)
            top = match and match[2].split(".")[0]
            assert top not in ("compress", "compress_kernels", "pydantic", "click", "rich", "datasets"), (
                path.name,
                line,
            )


def test_the_class_with_another_config_is_not_taken_for_ours(bare, tmp_path):
    """The code of a checkpoint registers a quantizer; other models of the process are loaded as always."""
    model = emitted(tmp_path / "ours", "vit", ["heads.prune"])
    other = of("vit", "AutoModelForImageClassification", **IMAGE)
    other.save_pretrained(tmp_path / "plain")
    code = "import sys, transformers\n"
    code += "for folder in sys.argv[1:]:\n"
    code += "    m = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)\n"
    code += "    print(sum(p.numel() for p in m.parameters()))\n"
    said = bare.run(code, tmp_path / "ours", tmp_path / "plain", tmp_path / "ours")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, copy.deepcopy(other), model)]
    assert [int(line) for line in said.split()] == sizes


CARDS = {
    "llama": ("transformers", None),
    "bert": ("transformers", None),
    "dit": ("diffusers", None),
    "pipeline": ("diffusers", "transformer"),
}


@pytest.mark.parametrize("case", CARDS)
@pytest.mark.parametrize("snippet", [0, 1])
def test_the_card_tells_how_to_load_with_compress_and_without(case, snippet, bare, warm, tmp_path):
    library, component = CARDS[case]
    name = "dit" if case == "pipeline" else case
    model, batch = MODELS[name]()
    transform = find("heads.prune")(keep=0.5, score="magnitude")
    plan = transform.plan(View(model))
    steps = [record(model, "heads.prune", plan)]
    transform.apply(View(model), plan)
    pipeline = tiny_pipeline(model) if component else None
    source = Source(case, model, library, component=component, pipeline=pipeline)
    write(source, tmp_path, steps, batch, Emit(format="compress-plan"), {})
    report = Report(case, "recipe", "compress-plan", "you asked for it", [], [], {}, {}, {}, 0.0, "now")
    describe(report, tmp_path, Recipe.make({"steps": [{"use": "heads.prune"}]}), source)
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[snippet]
    code = code.replace("path/to/this/folder", str(tmp_path))
    code += f"\npart = getattr(model, '{component}', model)\nprint(sum(p.numel() for p in part.parameters()))"
    said = (bare if snippet else warm).run(code)
    assert int(said.split()[-1]) == sum(parameter.numel() for parameter in model.parameters())
