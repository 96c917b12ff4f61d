"""The command line: what it prints, how it ends, and that a mistake is one line and leaves nothing."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import compress
from compress.cli import cli, main
from compress.transform import names
from models import MODELS

RECIPE = """\
steps:
  - {use: heads.prune, score: magnitude, keep: 0.5}
  - {use: quantize.int8, except: [lm_head]}
emit: {format: compress-plan}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, quick):
    """Every command runs in an empty folder with a recipe in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def tell(capsys):
    """Run a command: its exit code, stdout and stderr."""

    def tell(*words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return tell


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "small.yaml")


def test_help_imports_nothing_heavy():
    code = "import sys\nfrom compress.cli import main\n"
    code += "try:\n    main(['--help'])\nexcept SystemExit as exit:\n    assert not exit.code\n"
    code += (
        "print(sorted({'torch', 'transformers', 'diffusers', 'pydantic', 'rich', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).communicate()[0]
    assert done.splitlines()[-1] == "[]" and "MODEL RECIPE" in done


def test_every_command_and_every_option_says_what_it_is(tell):
    for name, command in cli.commands.items():
        assert command.help and len(command.help.splitlines()[0]) > 20
        for option in command.params:
            assert option.param_type_name == "argument" or option.help, (name, option.name)
        code, out, _ = tell(name, "--help")
        assert code == 0 and command.help.split()[0] in out
    code, out, _ = tell("--help")
    assert code == 0 and all(f"\n  {name}" in out for name in cli.commands)
    assert tell("-h")[1] == out
    assert tell("--version")[1] == f"compress, version {compress.__version__}\n"
    assert set(cli.commands) == {"run", "inspect", "methods", "verify", "report", "push", "schema"}


def test_a_run_from_recipe_to_report(tell, here, saved):
    code, out, err = tell(saved("llama"), "small.yaml", "-o", "done")
    assert (code, err) == (0, "")
    assert "heads.prune" in out and "bit-equal" in out and "done/report.json" in out
    assert left(here) == ["done"]
    again = tell(saved("llama"), "small.yaml", "-o", "done")
    assert again == (0, out, "")
    code, out, _ = tell("verify", "done")
    assert code == 0 and out == "done: LlamaForCausalLM.from_pretrained in a fresh process, bit-equal\n"
    code, out, _ = tell("report", "done")
    assert code == 0 and "parameters" in out and "quantize.int8" in out
    code, out, _ = tell("report", "done", "--html")
    page = (here / "done" / "report.html").read_text()
    assert code == 0 and out == "done/report.html\n" and page.startswith("<!doctype html>") and "quantize.int8" in page
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)  # one page that needs nothing else
    assert tell("verify", "done")[0] == 0  # the page is not part of what is sealed


def test_the_command_in_a_process_of_its_own(here, saved):
    """Nothing warm, nothing replaced: as a user runs it."""
    command = [sys.executable, "-m", "compress", str(saved("vit")), "small.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert left(here) == ["vit-small"] and "bit-equal" in out and err == ""


@pytest.mark.parametrize("name", ["llama", "vit", "dit"])
def test_plan_prints_what_would_happen_and_writes_nothing(name, tell, here, saved):
    before = {path: path.stat().st_mtime_ns for path in saved(name).iterdir()}
    code, out, err = tell(saved(name), "small.yaml", "--plan")
    assert (code, err, left(here)) == (0, "", [])
    assert "heads.prune takes" in out and "quantize.int8 takes" in out and "peak memory" in out
    assert before == {path: path.stat().st_mtime_ns for path in saved(name).iterdir()}
    assert {path.name for path in saved(name).iterdir()} == {path.name for path in before}


def test_plan_and_inspect_need_no_weights(tell, here, saved):
    (here / "bare").mkdir()
    (here / "bare" / "config.json").write_text((saved("llama") / "config.json").read_text())
    assert (
        tell("bare", "small.yaml", "--plan")[1].splitlines()
        == tell(saved("llama"), "small.yaml", "--plan")[1].splitlines()
    )
    assert tell("inspect", "bare")[0] == 0
    code, _, err = tell("bare", "small.yaml")
    assert code == 2 and "has no safetensors weights" in err and left(here) == ["bare"]


@pytest.mark.parametrize("name", ["llama", "vit", "dit", "unet2d"])
def test_inspect_tells_parts_and_what_each_method_does(name, tell, here, saved):
    code, out, err = tell("inspect", saved(name))
    assert (code, err, left(here)) == (0, "", [])
    assert all(method in out for method in names()) and "attentions" in out and "FLOPs" in out
    assert type(MODELS[name]()[0]).__name__ in out


def test_methods_and_their_cards(tell):
    code, out, _ = tell("methods")
    assert code == 0 and all(name in out for name in names())
    for name in names():
        code, out, err = tell("methods", name)
        assert (code, err) == (0, "")
        assert "Paper" in out and "hurts" in out and "only" in out and "except" in out
    code, out, err = tell("methods", "heads.prunes")
    assert (code, out) == (2, "") and "did you mean heads.prune?" in err and len(err.splitlines()) == 1


def test_schema_is_a_json_schema_that_takes_our_recipes(tell):
    import yaml

    jsonschema = pytest.importorskip("jsonschema")
    code, out, _ = tell("schema")
    schema = json.loads(out)
    assert code == 0
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(RECIPE), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"steps": [{"use": "heads.prunes"}]}, schema)


WRONG = {
    "no recipe named": (["{llama}"], "Missing argument 'RECIPE'"),
    "no recipe there": (["{llama}", "none.yaml"], "none.yaml: no such file or directory, it must be a recipe file"),
    "a folder as recipe": (["{llama}", "{llama}"], "it must be a recipe file"),
    "weights as recipe": (["{llama}", "{llama}/model.safetensors"], "model.safetensors:"),
    "no model there": (["nowhere", "small.yaml"], "nowhere: is neither a folder nor a hub id such as 'owner/name'"),
    "a file as model": (["small.yaml", "small.yaml"], "small.yaml: is neither a folder"),
    "not on the hub": (["nobody/nothing", "small.yaml"], "nobody/nothing: cannot be had from the hub"),
    "an empty folder": (["empty", "small.yaml"], "empty: has no config.json of a transformers or diffusers model"),
    "only .bin weights": (["bin", "small.yaml"], "bin: has no safetensors weights, other formats are not read"),
    "weights cut": (["cut", "small.yaml"], "cut: cannot be loaded"),
    "a config that is no JSON": (["nojson", "small.yaml"], "nojson/config.json: cannot be read as JSON"),
    "a config that is a list": (["list", "small.yaml"], "list/config.json: is no mapping"),
    "an unheard model": (["unheard", "small.yaml", "--plan"], "unheard"),
    "an unheard class": (["noclass", "small.yaml"], "has no class HoloForm"),
    "an unheard denoiser": (["nodenoiser", "small.yaml"], "has no class Denoise"),
    "a pipeline with two denoisers": (["two", "small.yaml"], "two: the pipeline has two denoisers, transformer and"),
    "a pipeline without denoiser": (["nopart", "small.yaml"], "nopart: the pipeline has none of the parts"),
    "an unknown option": (["{llama}", "small.yaml", "--fast"], "No such option"),
    "an unknown format": (["{llama}", "small.yaml", "--format", "onnx"], "'onnx' is not one of"),
    "an unknown dtype": (["{llama}", "small.yaml", "--dtype", "int3"], "--dtype is int3, it must be"),
    "an unknown device": (["{llama}", "small.yaml", "--device", "abacus"], "--device is abacus"),
    "a format that does not fit": (
        ["{llama}", "small.yaml", "--format", "native"],
        "--format is native, this result fits",
    ),
    "an output that is in the way": (["{llama}", "small.yaml", "-o", "empty"], "empty: exists already"),
    "verify of nothing": (["verify", "nowhere"], "nowhere: has no compress.json"),
    "report of nothing": (["report", "nowhere"], "nowhere/report.json"),
    "push of nothing": (["push", "nowhere", "me/it"], "nowhere"),
    "inspect of nothing": (["inspect", "nowhere"], "nowhere: is neither a folder"),
    "a run with too much": (["{llama}", "small.yaml", "third"], "unexpected extra argument"),
}


def terrible_folders(here, saved):
    """Folders that only look like models."""
    config = json.loads((saved("llama") / "config.json").read_text())
    contents = {
        "empty": None,
        "bin": config,
        "cut": config,
        "list": [],
        "unheard": {"model_type": "holo", "architectures": ["LlamaForCausalLM"]},
        "noclass": config | {"architectures": ["HoloForm"]},
        "nodenoiser": {"_class_name": "Denoise"},
        "nojson": None,
        "nopart": None,
        "two": None,
    }
    for name, content in contents.items():
        (here / name).mkdir()
        if content is not None:
            (here / name / "config.json").write_text(json.dumps(content))
    (here / "nojson" / "config.json").write_text("{")
    (here / "nopart" / "model_index.json").write_text(
        '{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}'
    )
    wan = ["diffusers", "WanTransformer3DModel"]
    (here / "two" / "model_index.json").write_text(json.dumps({"transformer": wan, "transformer_2": wan}))
    torch.save({}, here / "bin" / "pytorch_model.bin")
    weights = (saved("llama") / "model.safetensors").read_bytes()
    (here / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told_in_one_line_with_exit_2(case, tell, here, saved):
    terrible_folders(here, saved)
    before = left(here)
    words, message = WRONG[case]
    code, _, err = tell(*(word.format(llama=saved("llama")) for word in words))
    lines = [line for line in err.splitlines() if line and not line.startswith(("Usage: ", "Try "))]
    assert code == 2 and message in lines[-1], err
    assert len(lines) == 1 and "Traceback" not in err
    # The steps of a run that only needs another format are kept.
    done = ["llama-small.partial"] if case == "a format that does not fit" else []
    assert sorted(left(here)) == sorted([*before, *done])


def test_a_compressed_model_is_not_compressed_again(tell, here, saved):
    assert tell(saved("llama"), "small.yaml", "-o", "done")[0] == 0
    for words in (["done", "small.yaml"], ["done", "small.yaml", "--plan"], ["inspect", "done"]):
        code, _, err = tell(*words)
        assert code == 2 and "done: is already compressed (compress" in err and "; give the original model" in err
    assert left(here) == ["done"]


def test_a_model_may_be_called_like_a_command(tell, here, saved):
    MODELS["vit"]()[0].save_pretrained(here / "report")
    assert tell("run", "report", "small.yaml", "--plan")[0] == 0
    assert tell("./report", "small.yaml", "--plan")[0] == 0
    code, _, err = tell("report", "small.yaml")
    assert code == 2 and "small.yaml" in err
    assert tell("-o", "verify", saved("vit"), "small.yaml")[0] == 0  # an option's value is no command either
    assert left(here) == ["report", "verify"]


def test_a_missed_limit_is_exit_3_and_force_emits(tell, here, saved):
    rows = {"input_ids": torch.randint(3, 99, (4, 8), generator=torch.Generator().manual_seed(0))}
    save_file(rows, here / "rows.safetensors")
    (here / "strict.yaml").write_text(RECIPE + "validate: {data: rows.safetensors, kl: 0.0}\n")
    code, _, err = tell(saved("llama"), "strict.yaml", "-o", "done")
    assert code == 3 and err.startswith("strict: a limit was missed: kl is ") and len(err.splitlines()) == 1
    assert left(here) == ["done.partial", "rows.safetensors", "strict.yaml"]
    code, out, _ = tell(saved("llama"), "strict.yaml", "-o", "done", "--force")
    assert code == 0 and "MISSED" in out and (here / "done").exists()


def test_what_we_did_not_foresee_is_exit_4_and_debug_shows_the_trace(tell, here, saved, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("compress.pipeline.run_steps", broken)
    code, out, err = tell(saved("llama"), "small.yaml", "-o", "done")
    assert (code, out) == (4, "") and err == "internal error: ZeroDivisionError: by zero (--debug shows where)\n"
    code, _, err = tell(saved("llama"), "small.yaml", "-o", "done", "--debug")
    assert code == 4 and "Traceback" in err and "in broken" in err
    assert not (here / "done").exists()
    monkeypatch.undo()
    code, _, err = tell("inspect", "nowhere", "--debug")
    assert code == 2 and "Traceback" in err and err.endswith("such as 'owner/name'\n")
