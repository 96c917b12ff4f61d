"""Emitted folders: damage is told in one line, shards and dtypes load, and a loaded model is saved again."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import CompressError
from compress.checkpoint import check_files, read_sidecar
from compress.cli import main
from compress.emit import write
from compress.outputs import relative_error, run
from compress.recipe import Emit
from compress.source import Source
from models import MODELS, TEXT, of

TWO = [{"use": "heads.prune", "score": "magnitude", "keep": 0.5}, {"use": "quantize.int8"}]


def made(folder, name="llama", steps=TWO, **emit):
    """Compress a tiny model and write it, unverified; the model with its batch."""
    model, batch = MODELS[name]() if isinstance(name, str) else name
    result = compress.compress(model, {"steps": steps}, validation=[batch])
    emit = Emit(**{"format": "compress-plan"} | emit)
    write(result.source, folder, result.steps, batch, emit, {"recipe": "steps: []\n"})
    return model, batch


def said(capsys, *words):
    """The exit code and the lines on stderr."""
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    return exit.value.code, capsys.readouterr().err.splitlines()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGES = {
    "a bit of the weights": (
        lambda f: flip(f / "compressed.safetensors"),
        r"compressed\.safetensors: its bytes are not",
    ),
    "the weights cut": (
        lambda f: (f / "compressed.safetensors").write_bytes(b"1"),
        r"compressed\.safetensors: its bytes",
    ),
    "no weights": (lambda f: (f / "compressed.safetensors").unlink(), r"compressed\.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "no code": (lambda f: (f / "modeling_compress.py").unlink(), r"modeling_compress\.py is missing"),
    "no probe": (lambda f: (f / "verify.probe").unlink(), r"verify\.probe is missing"),
    "another config": (lambda f: change(f / "config.json", hidden_size=64), r"config\.json: its bytes are not"),
    "no sidecar": (lambda f: (f / "compress.json").unlink(), r"has no compress\.json"),
    "a newer sidecar": (
        lambda f: change(f / "compress.json", format_version=2),
        r"has format 2, .* reads up to 1: upgrade",
    ),
    "the sidecar cut": (lambda f: (f / "compress.json").write_text('{"format_v'), r"compress\.json: is damaged"),
    "the sidecar a list": (lambda f: (f / "compress.json").write_text("[]"), r"compress\.json: is damaged"),
    "the sidecar empty": (lambda f: (f / "compress.json").write_text("{}"), r"compress\.json: is damaged"),
    "files missing in it": (
        lambda f: (f / "compress.json").write_text('{"format_version": 1}'),
        r"compress\.json: is damaged, it has no class",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_and_exit_2(damage, tmp_path, capsys):
    made(tmp_path / "out")
    harm, message = DAMAGES[damage]
    harm(tmp_path / "out")
    code, lines = said(capsys, "verify", tmp_path / "out")
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert lines[0].startswith(str(tmp_path / "out"))


def test_what_is_no_emitted_folder_is_told_so(tmp_path, capsys, saved):
    for folder in (tmp_path, tmp_path / "nowhere", saved("vit")):
        for command in ("verify", "report"):
            code, lines = said(capsys, command, folder)
            assert code == 2 and len(lines) == 1 and str(folder) in lines[0]
        with pytest.raises(CompressError, match="is not a folder that compress emitted"):
            compress.load(folder)


def test_a_truncated_report_is_one_line_and_exit_2(tmp_path, capsys, quick, saved):
    batch = MODELS["llama"]()[1]
    compress.compress(saved("llama"), {"steps": TWO}, output=tmp_path / "out", validation=[batch])
    path = tmp_path / "out" / "report.json"
    whole = path.read_bytes()
    for content in (whole[:100], b"", b"[]", b'{"model": 3}', whole.replace(b'"steps"', b'"stops"')):
        path.write_bytes(content)
        code, lines = said(capsys, "report", tmp_path / "out")
        assert code == 2 and len(lines) == 1 and "report.json" in lines[0], lines
    assert compress.verify(tmp_path / "out")["bit_equal"]  # the report is not what is verified


@pytest.mark.parametrize("name", ["llama", "dit"])
def test_a_newer_record_is_refused_by_plain_from_pretrained(name, tmp_path):
    model, _ = made(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match="record format 2, this compress reads up to 1: upgrade"):
        type(model).from_pretrained(tmp_path)


def test_wrong_weights_that_pass_the_checksums_fail_the_comparison(tmp_path, quick, capsys):
    """The sum of a file tells that it is the one written, the probe that it gives the answers of the model."""
    made(tmp_path)
    facts = read_sidecar(tmp_path)
    weights = tmp_path / "compressed.safetensors"
    content = bytearray(weights.read_bytes())
    content[-400:] = bytes(400)
    weights.write_bytes(content)
    facts["files"][weights.name] = __import__("hashlib").sha256(content).hexdigest()
    (tmp_path / "compress.json").write_text(json.dumps(facts))
    assert compress.verify(tmp_path)["passed"] is False
    code, lines = said(capsys, "verify", tmp_path)
    assert code == 2 and len(lines) == 1 and "not bit-equal" in lines[0]


def wide():
    """A tiny model of some megabytes."""
    size = TEXT | {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2, "vocab_size": 999}
    return of("llama", "AutoModelForCausalLM", **size), MODELS["llama"]()[1]


@pytest.mark.parametrize("format", ["compress-plan", "compressed-tensors", "native"])
def test_shards_load_equal(format, tmp_path, bare):
    steps = {
        "compress-plan": TWO,
        "compressed-tensors": TWO[1:],
        "native": [TWO[0] | {"layout": "uniform"}],
    }[format]
    model, batch = made(tmp_path, wide(), steps, shard="1MB", format=format)
    weights = sorted(tmp_path.glob("*.safetensors"))
    assert len(weights) > 1
    assert max(path.stat().st_size for path in weights) < 1.2e6
    (index,) = tmp_path.glob("*.safetensors.index.json")
    named = json.loads(index.read_text())["weight_map"]
    assert set(named.values()) == {path.name for path in weights}
    assert {name for path in weights for name in load_file(path)} == set(named)
    loaded = compress.load(tmp_path) if format == "compressed-tensors" else type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(run(loaded.eval(), batch), run(model, batch))
    if format == "compress-plan":
        code = "import sys\nfrom transformers import AutoModelForCausalLM as Auto\n"
        code += "Auto.from_pretrained(sys.argv[1], trust_remote_code=True)"
        bare.run(code, tmp_path)
        (tmp_path / weights[0].name).unlink()
        with pytest.raises(CompressError, match=f"{weights[0].name} is missing"):
            check_files(tmp_path)


def test_shards_of_a_denoiser_load_equal(tmp_path):
    model, batch = made(tmp_path, "dit", TWO, shard="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(run(type(model).from_pretrained(tmp_path), batch), run(model, batch))


RESAVED = {"llama": TWO, "bert": [*TWO[:1], {"use": "tokens.merge"}], "dit": TWO, "qwen3": TWO[1:]}


@pytest.mark.parametrize("name", RESAVED)
def test_a_loaded_model_is_saved_again_by_compress_alone_with_the_same_bytes(name, tmp_path, quick):
    format = "compressed-tensors" if name == "qwen3" else "compress-plan"
    model, batch = made(tmp_path / "one", name, RESAVED[name], format=format)
    loaded = compress.load(tmp_path / "one")
    if name != "dit":  # what diffusers writes holds the record, so it cannot be loaded wrongly
        with pytest.raises(CompressError, match=r"compress\.save\(model, folder\)"):
            loaded.save_pretrained(tmp_path / "wrong")
        assert not list((tmp_path / "wrong").glob("*.safetensors"))
    assert compress.save(loaded, tmp_path / "two") == tmp_path / "two"
    one, two = (check_files(tmp_path / folder)["files"] for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"verify.probe"}  # made-up inputs
    with torch.no_grad():
        assert torch.equal(run(compress.load(tmp_path / "two"), batch), run(model, batch))
    with pytest.raises(CompressError, match="exists already"):
        compress.save(loaded, tmp_path / "two")


def test_a_trained_model_is_saved_with_its_new_weights(tmp_path, quick):
    model, batch = made(tmp_path / "one", "vit", TWO[:1])
    loaded = compress.load(tmp_path / "one")
    with torch.no_grad():
        loaded.classifier.weight.mul_(2)
    compress.save(loaded, tmp_path / "two")
    with torch.no_grad():
        again = run(compress.load(tmp_path / "two"), batch)
        assert torch.equal(again, run(loaded, batch)) and not torch.equal(again, run(model, batch))


def test_what_was_never_compressed_is_not_saved_as_if(tmp_path):
    with pytest.raises(CompressError, match="was not compressed by a recipe; save it with save_pretrained"):
        compress.save(MODELS["llama"]()[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_pipelines_own_save_keeps_the_record(tmp_path):
    model, batch = made(tmp_path / "one", "dit")
    type(model).from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    with torch.no_grad():
        assert torch.equal(run(type(model).from_pretrained(tmp_path / "two"), batch), run(model, batch))


@pytest.mark.parametrize("name", ["llama", "dit"])
@pytest.mark.parametrize("use", ["quantize.int8", "quantize.weight_only"])
def test_another_dtype_at_load_casts_the_scales_and_leaves_the_codes(name, use, tmp_path):
    model, batch = made(tmp_path, name, [{"use": use}])
    key = "torch_dtype" if name == "dit" else "dtype"
    loaded = type(model).from_pretrained(tmp_path, **{key: torch.bfloat16}).eval()
    mine, theirs = model.state_dict(), loaded.state_dict()
    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in mine.items()}
    assert any(value.dtype in (torch.int8, torch.int32) for value in cast.values())
    for key, value in cast.items():
        assert theirs[key].dtype == value.dtype and torch.equal(theirs[key], value), key
    halves = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        assert relative_error(run(loaded, halves), run(model, batch)) < 0.05


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_base_model_of_a_checkpoint_with_a_head_loads(name, tmp_path):
    import transformers

    model, batch = made(tmp_path, name)
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(**batch).last_hidden_state, model.base_model(**batch).last_hidden_state)


@pytest.mark.parametrize("order", ["compress, transformers", "transformers, compress"])
def test_the_order_of_imports_does_not_matter(order, tmp_path):
    import subprocess
    import sys

    model, batch = made(tmp_path)
    code = f"import {order}, sys\n"
    code += "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    code += "print(type(m.model.layers[0].mlp.up_proj).__name__)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["Int8Linear"], done.stderr


def test_importing_compress_imports_nothing_heavy():
    import subprocess
    import sys

    heavy = {"torch", "transformers", "diffusers", "pydantic", "numpy"}
    code = f"import sys, compress; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_component_named_in_no_pipeline_is_not_written(tmp_path):
    with pytest.raises(CompressError, match="only transformers and diffusers"):
        write(
            Source("x", torch.nn.Linear(2, 2), "torch"), tmp_path / "out", [], {"input": torch.ones(1, 2)}, Emit(), {}
        )
