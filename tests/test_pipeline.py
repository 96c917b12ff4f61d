"""From a recipe to a proven folder: what a run makes, what it tells, and what it leaves when it cannot."""

import copy
import json

import pytest
import torch
from torch import nn

import compress
import compress.steps
from compress import CompressError, LimitMissed
from compress.checkpoint import check_files
from compress.emit import weight_count
from compress.journal import Journal
from compress.outputs import run
from compress.source import open_source
from compress.view import View
from models import LATENT, MODELS, denoiser, seeded

TWO = [{"use": "heads.prune", "keep": 0.5}, {"use": "quantize.int8"}]
HEADS = {"use": "heads.prune", "score": "magnitude", "keep": 0.5, "layout": "uniform"}
MERGE = {"use": "tokens.merge", "ratio": 0.25}
KEYS = {"model", "recipe", "format", "why_format", "steps", "measures", "verified", "hardware", "versions", "seconds"}

pytestmark = pytest.mark.usefixtures("quick")


def batch_of(name):
    return MODELS[name]()[1]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A whole tiny DiT pipeline; its guidance needs the class 1000."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    size = LATENT | {"patch_size": 2, "out_channels": 8, "norm_num_groups": 1, "num_embeds_ada_norm": 1000}
    transformer, _ = denoiser("DiTTransformer2DModel", {}, **size)
    vae = seeded(lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4))
    folder = tmp_path_factory.mktemp("pipeline") / "dit"
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


CASES = {
    "llama": [TWO, "compress-plan"],
    "gpt2": [[{"use": "quantize.weight_only", "bits": 8}], "compress-plan"],
    "qwen3": [[HEADS], "native"],
    "bert": [[HEADS, MERGE], "compress-plan"],
    "vit": [[{"use": "heads.prune", "keep": 0.5}, MERGE], "compress-plan"],
    "dit": [[{"use": "heads.prune", "keep": 0.5}, {"use": "quantize.int8"}], "compress-plan"],
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_in_a_proven_folder_out(name, saved, tmp_path):
    steps, format = CASES[name]
    batch, out = batch_of(name), tmp_path / "new" / "out"
    recipe = {"steps": steps, "validate": {"relative_error" if name == "dit" else "kl": None, "latency": None}}
    result = compress.compress(saved(name), recipe, output=out, calibration=[batch], validation=[batch], format=format)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert result.folder == out and result.report.verified["bit_equal"]
    loaded = compress.load(out)
    with torch.no_grad():
        assert torch.equal(run(loaded, batch), run(result.model, batch))

    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= KEYS and report["format"] == format and report["verified"]["passed"] is True
    measures = {measure["name"]: measure for measure in report["measures"]}
    for measure in measures.values():
        assert {"name", "before", "after", "limit", "unit", "passed"} <= measure.keys()
    assert list(measures) == [*recipe["validate"].keys() - {"latency"}, "size", "parameters", "latency"]
    assert measures["parameters"]["after"] == report["steps"][-1]["parameters"] == weight_count(loaded)
    assert measures["size"]["after"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert [step["use"] for step in report["steps"]] == [step["use"] for step in steps]
    assert all(step["modules"] and step["seconds"] >= 0 and step["error"] > 0 for step in report["steps"])
    assert sum(after for _, after in report["layers"].values()) == report["steps"][-1]["bytes"]
    assert sum(before for before, _ in report["layers"].values()) > report["steps"][-1]["bytes"] or steps[-1] == MERGE
    assert {step["use"] for step in report["steps"]} <= set((out / "README.md").read_text().replace("`", " ").split())
    facts = check_files(out)
    assert facts["recipe"] in (out / "README.md").read_text()


def test_a_whole_pipeline_in_a_whole_pipeline_out(pipeline_folder, tmp_path):
    import diffusers

    recipe = {
        "calibrate": {"samples": 4, "length": 2, "batch": 1},
        "steps": [{"use": "heads.prune", "keep": 0.5}, {"use": "quantize.int8"}],
        "validate": {"samples": 2, "length": 2, "batch": 1, "relative_error": None, "psnr": None},
    }
    out = tmp_path / "out"
    result = compress.compress(pipeline_folder, recipe, output=out)
    assert {path.name for path in pipeline_folder.iterdir()} <= {path.name for path in out.iterdir()}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipeline).__name__ == "DiTPipeline"
    with torch.no_grad():
        batch = batch_of("dit")
        assert torch.equal(run(pipeline.transformer, batch), run(result.model, batch))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert made.shape == (1, 8, 8, 3)
    assert result.report.measure("psnr").after < result.report.measure("psnr").before
    again = compress.compress(pipeline_folder, recipe, output=out)
    assert isinstance(again.model, nn.Module) and again.report.created == result.report.created


def test_a_model_object_in_memory_only_and_saved_later(tmp_path):
    model, batch = MODELS["llama"]()
    before = copy.deepcopy(model)
    recipe = {"steps": TWO, "emit": {"format": "compress-plan"}}
    result = compress.compress(model, recipe, calibration=[batch], validation=[batch])
    assert result.folder is None and result.model is model and list(tmp_path.iterdir()) == []
    with pytest.raises(CompressError, match="save"):
        result.push("me/it")
    with torch.no_grad():
        assert torch.equal(run(result.source.original(), batch), run(before, batch))
    size = result.report.measure("size")
    assert size.before == sum(tensor.nbytes for tensor in before.parameters()) and size.after < size.before
    assert result.save(tmp_path / "deep" / "one") == result.folder == tmp_path / "deep" / "one"
    assert result.report.verified["bit_equal"] and result.report.format == "compress-plan"
    with torch.no_grad():
        assert torch.equal(run(compress.load(result.folder), batch), run(model, batch))
    with pytest.raises(CompressError, match="exists already"):
        result.save(tmp_path / "deep" / "one")
    result.save(tmp_path / "two")
    assert check_files(tmp_path / "two") == check_files(tmp_path / "deep" / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "two"}


def test_the_library_object_gives_the_same_bytes_as_its_folder(saved, tmp_path):
    model, batch = MODELS["llama"]()
    compress.compress(model, {"steps": TWO}, output=tmp_path / "one", calibration=[batch])
    compress.compress(saved("llama"), {"steps": TWO}, output=tmp_path / "two", calibration=(item for item in [batch]))
    assert check_files(tmp_path / "one")["files"] == check_files(tmp_path / "two")["files"]


def test_two_runs_and_two_processes_give_the_same_bytes(saved, tmp_path, warm):
    recipe = {"seed": 5, "steps": TWO}
    for out in ("one", "two"):
        compress.compress(saved("llama"), recipe, output=tmp_path / out, calibration=[batch_of("llama")])
    code = "import sys, json, compress, models\n"
    code += "data = [models.MODELS['llama']()[1]]\n"
    code += "compress.compress(sys.argv[1], json.loads(sys.argv[2]), output=sys.argv[3], calibration=data)"
    warm.run(code, saved("llama"), json.dumps(recipe), tmp_path / "three")
    files = [check_files(tmp_path / out)["files"] for out in ("one", "two", "three")]
    assert files[0] == files[1] == files[2] and files[0]


def test_a_steps_random_numbers_do_not_depend_on_the_steps_before(monkeypatch):
    """Else a run that goes on after a kill would draw others."""
    drawn, extra, run_step = [], [], compress.steps.run_step

    def noted(*arguments):
        drawn.append(torch.rand(1).item())
        torch.rand(len(extra))
        return run_step(*arguments)

    monkeypatch.setattr("compress.steps.run_step", noted)
    for seed in (1, 1, 7):
        compress.compress(MODELS["llama"]()[0], {"seed": seed, "steps": [HEADS, TWO[1]]})
        extra.append(1)
    first, second, other = drawn[:2], drawn[2:4], drawn[4:]
    assert first == second and first[0] != first[1] and other != first


def test_the_same_command_again_gives_the_same_result_at_once(saved, tmp_path):
    batch, out = batch_of("llama"), tmp_path / "out"
    first = compress.compress(saved("llama"), {"steps": TWO}, output=out, calibration=[batch])
    (tmp_path / "out.partial").mkdir()  # as a kill right after the last rename leaves it
    again = compress.compress(saved("llama"), {"steps": TWO}, output=out, calibration=[batch])
    assert again.report == first.report and again.folder == out and not (tmp_path / "out.partial").exists()
    with torch.no_grad():
        assert torch.equal(run(again.model, batch), run(first.model, batch))


def test_another_run_never_takes_a_finished_folder_without_force(saved, tmp_path):
    batch, out = batch_of("llama"), tmp_path / "out"
    compress.compress(saved("llama"), {"steps": [HEADS]}, output=out, calibration=[batch])
    files = {path: path.read_bytes() for path in out.iterdir()}
    other = {name: value.clone() for name, value in batch.items()}
    other["input_ids"][0, 0] = 50
    model, _ = MODELS["llama"]()
    model.lm_head.weight.data[0, 0] += 1
    model.config._name_or_path = str(saved("llama"))
    for source, recipe, data in [
        (saved("llama"), {"steps": TWO}, batch),
        (saved("llama"), {"steps": [HEADS]}, other),
        (saved("llama"), {"seed": 1, "steps": [HEADS]}, batch),
        (model, {"steps": [HEADS]}, batch),
    ]:
        with pytest.raises(CompressError, match="exists already and is not this run's result"):
            compress.compress(source, recipe, output=out, calibration=[data])
        assert {path: path.read_bytes() for path in out.iterdir()} == files
    result = compress.compress(saved("llama"), {"steps": TWO}, output=out, calibration=[batch], force=True)
    assert [step["use"] for step in check_files(out)["steps"]] == ["heads.prune", "quantize.int8"]
    assert result.folder == out and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_compress_did_not_make_is_not_replaced_even_with_force(saved, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    for force in (False, True):
        with pytest.raises(CompressError, match="compress did not make it"):
            compress.compress(saved("llama"), {"steps": [HEADS]}, output=tmp_path / "thesis", force=force)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


def test_a_missed_limit_emits_nothing_and_force_says_missed(saved, tmp_path, capsys, monkeypatch):
    from rich.console import Console

    batch, out = batch_of("llama"), tmp_path / "out"
    recipe = {"steps": TWO, "validate": {"kl": 0.0, "size": "1x"}}
    given = {"output": out, "calibration": [batch], "validation": [batch]}
    with pytest.raises(LimitMissed, match="kl is .*, the limit is 0.0") as missed:
        compress.compress(saved("llama"), recipe, **given)
    assert "size" not in str(missed.value) and [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(LimitMissed):
        compress.compress(saved("llama"), recipe, calibration=[batch], validation=[batch])
    with pytest.raises(LimitMissed, match="the limit is 0.0001"):  # another limit goes on from the steps that are done
        with monkeypatch.context() as patch:
            patch.setattr("compress.steps.run_step", None)
            compress.compress(saved("llama"), recipe | {"validate": {"kl": 0.0001}}, **given)
    result = compress.compress(saved("llama"), recipe, **given, force=True)
    assert [measure.name for measure in result.report.missed] == ["kl"]
    assert "Missed limit: kl" in (out / "README.md").read_text()
    result.report.table(Console(width=160))
    assert "MISSED" in capsys.readouterr().out
    with pytest.raises(LimitMissed, match="emitted by --force in spite of missed limits .kl"):
        compress.compress(saved("llama"), recipe, **given)
    assert out.exists()


MENDABLE = {
    "nothing matches": ({"steps": [HEADS | {"only": ["nowhere.*"]}]}, r"steps\.0.*heads\.prune matched nothing"),
    "the second matches nothing": (
        {"steps": [HEADS, {"use": "quantize.int8", "only": ["nowhere"]}]},
        r"steps\.1.*quantize\.int8 matched nothing",
    ),
    "what cannot be done is refused by name": ({"steps": [HEADS, MERGE]}, "model.layers"),
    "the same modules twice": (
        {"steps": [{"use": "tokens.merge"}, MERGE]},
        r"steps\.1.*tokens\.merge matched nothing .* refused: vit.layers.0 \(it merges tokens already",
    ),
    "data is missing": ({"steps": [{"use": "heads.prune", "keep": 0.5}]}, "looks at data"),
    "a format that does not fit": ({"steps": [HEADS], "emit": {"format": "compressed-tensors"}}, "fits only"),
    "a metric that does not fit": ({"steps": [HEADS], "validate": {"psnr": 3}}, "psnr"),
}


@pytest.mark.parametrize("case", MENDABLE)
def test_what_the_user_must_mend_leaves_nothing_that_looks_finished(case, saved, tmp_path):
    recipe, message = MENDABLE[case]
    name = "vit" if "twice" in case else "llama"
    given = {} if case == "data is missing" else {"calibration": [batch_of(name)], "validation": [batch_of(name)]}
    with pytest.raises(CompressError, match=message) as error:
        compress.compress(saved(name), recipe, output=tmp_path / "out", **given)
    assert len(str(error.value).splitlines()) == 1
    kept = ["out.partial"] if case == "a format that does not fit" else []  # its steps: another format goes on there
    assert [path.name for path in tmp_path.iterdir()] == kept


def test_arguments_that_make_no_sense_are_refused_in_one_line(saved, tmp_path):
    plain = nn.Sequential(nn.Linear(4, 4))
    compressed = compress.compress(MODELS["llama"]()[0], {"steps": [HEADS, TWO[1]]}, output=tmp_path / "done").model
    for model, options, message in [
        (saved("llama"), {"dtype": "float99"}, "--dtype is float99"),
        (saved("llama"), {"dtype": "nn"}, "--dtype is nn"),
        (saved("llama"), {"calibration": [3]}, "data: "),
        (saved("llama"), {"calibration": []}, "no sample"),
        (saved("llama"), {"calibration": [{"pixels": torch.ones(1, 2)}]}, "takes no pixels|gives? pixels"),
        (saved("llama"), {"device": "abacus"}, "--device is abacus"),
        (MODELS["llama"]()[0], {"device": "cpu"}, "device and dtype are for models by name"),
        (MODELS["llama"]()[0], {"dtype": "bfloat16"}, "device and dtype are for models by name"),
        (object(), {}, "object: is no model"),
        (plain, {}, "Sequential"),
        (compressed, {}, "already compressed"),
        (compress.load(tmp_path / "done"), {}, "already compressed"),
        (tmp_path / "done", {}, "already compressed"),
        (tmp_path / "nowhere", {}, "neither a folder nor a hub id"),
    ]:
        with pytest.raises(CompressError, match=message) as error:
            compress.compress(model, {"steps": [HEADS]}, output=tmp_path / "out", **options)
        assert len(str(error.value).splitlines()) == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_plain_torch_model_is_compressed_in_memory(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    batch = {"input": torch.randn(4, 64, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(CompressError, match="inputs are not known"):
        compress.compress(copy.deepcopy(model), {"steps": TWO[1:]})
    result = compress.compress(model, {"steps": TWO[1:]}, validation=[batch])
    assert 0 < result.report.steps[0]["error"] < 0.1
    with pytest.raises(CompressError, match="only transformers and diffusers models can be saved"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_records_no_more_than_the_recipe_needs(pipeline_folder, monkeypatch):
    rows = []

    def record(source, samples, length, batch, seed):
        rows.append(samples * length * batch)
        return [batch_of("dit")]

    monkeypatch.setattr("compress.data.record", record)
    plain = {"use": "quantize.int8", "smooth": "off", "solver": "rtn", "fuse": "off"}
    compress.compress(pipeline_folder, {"steps": [plain]})
    assert rows == [1, 1]
    compress.compress(pipeline_folder, {"steps": TWO[1:]})
    assert rows[2] > 1


def test_looking_at_a_model_leaves_it_as_it_is():
    model = MODELS["llama"]()[0].train()
    assert compress.inspect(model)["flops"] and compress.plan(model, {"steps": TWO[1:]})
    assert model.training and next(model.parameters()).device.type == "cpu"


def test_a_whole_pipeline_goes_to_the_device(pipeline_folder):
    source = open_source(str(pipeline_folder), device="meta")
    assert {source.pipeline.vae.device.type, source.model.device.type} == {"meta"}
    assert source.original().device.type == "meta"


def test_conditions_in_a_dict_are_cut_kept_and_asked_again(tmp_path):
    """An SDXL UNet takes pooled text and sizes in `added_cond_kwargs`."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    size = {"sample_size": 8, "block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8}
    size |= {"cross_attention_dim": 16, "attention_head_dim": 4, "addition_embed_type": "text_time"}
    size |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    batch = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 5])}
    batch |= {"encoder_hidden_states": torch.randn(2, 4, 16)}
    batch |= {"added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}}
    unet, _ = denoiser("UNet2DConditionModel", {}, **size, **blocks)
    for number, given in enumerate((None, [batch])):  # made-up inputs and real ones
        result = compress.compress(
            copy.deepcopy(unet), {"steps": TWO[1:]}, output=tmp_path / str(number), validation=given
        )
        assert result.report.verified["bit_equal"]


def test_a_card_that_cannot_be_read_stops_no_run(tmp_path):
    MODELS["llama"]()[0].save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text("---\nlicense: [\n---\n")
    compress.compress(tmp_path / "in", {"steps": TWO[1:]}, output=tmp_path / "out")
    assert "license:" not in (tmp_path / "out" / "README.md").read_text()


def test_globs_that_name_nothing_are_told(saved, tmp_path):
    step = TWO[1] | {"except": ["model.layer.0", "lm_head", "model.layers.1.*"]}
    told = "quantize.int8: names no module: except model.layer.0; did you mean model.layers.0?"
    report = compress.compress(saved("llama"), {"steps": [step]}, output=tmp_path / "out").report
    assert told in report.remarks()
    (row,) = compress.plan(saved("llama"), {"steps": [step]})[1:]
    assert row["ledger"]["notes"]["idle"] == report.steps[0]["notes"]["idle"] == [told.partition("module: ")[2]]


def test_a_masked_model_is_unmasked_also_when_it_fails(monkeypatch):
    model, batch = MODELS["llama"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = View.mask_heads

    def fail(view, *given):
        mask(view, *given)
        raise RuntimeError("the forward does not take this")

    monkeypatch.setattr(View, "mask_heads", fail)
    with pytest.raises(RuntimeError, match="does not take this"):
        compress.compress(model, {"steps": [HEADS]}, validation=[batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_plan_foretells_the_run_and_touches_nothing(saved):
    model, batch = MODELS["llama"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = compress.plan(model, {"steps": [HEADS, TWO[1]]})
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()) and before.keys() == after.keys()
    foretold = [row["ledger"] for row in rows]
    assert json.dumps(foretold) == json.dumps(
        [row["ledger"] for row in compress.plan(saved("llama"), {"steps": [HEADS, TWO[1]]})]
    )
    steps = compress.compress(model, {"steps": [HEADS, TWO[1]]}, validation=[batch]).report.steps
    for told, done in zip(foretold[1:], steps, strict=True):
        assert told["modules"] == done["modules"]
        assert {key: told[key] for key in ("use", "parameters", "bytes")} == {
            key: done[key] for key in ("use", "parameters", "bytes")
        }


def test_only_one_process_works_on_an_output_folder(tmp_path):
    with Journal(tmp_path / "out", "key"):
        with pytest.raises(CompressError, match="another process"):
            Journal(tmp_path / "out", "key").__enter__()
    with Journal(tmp_path / "out", "key") as journal:
        assert journal.steps == []


def test_the_public_names_stay_what_they_are_after_a_run(saved, tmp_path):
    compress.compress(saved("llama"), {"steps": [HEADS]}, output=tmp_path / "out")
    for name in compress.__all__:
        assert callable(getattr(compress, name)) or name == "__version__"
    assert compress.verify(tmp_path / "out")["bit_equal"]


def test_surgery_that_is_not_exact_is_refused(monkeypatch):
    """The pipeline holds removing against masking, whatever the detector believed."""
    model, batch = MODELS["vit"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = View.keep_heads

    def keep_others(view, attention, groups, queries=None):
        wrong(view, attention, [group for group in range(attention.kv_heads) if group not in groups], queries)

    recipe = {"steps": [{"use": "heads.prune", "score": "magnitude", "keep": 0.5, "layout": "uniform"}]}
    assert compress.compress(copy.deepcopy(model), recipe, validation=[batch]).steps
    monkeypatch.setattr(View, "keep_heads", keep_others)
    with pytest.raises(CompressError, match="not exact .* with except"):
        compress.compress(copy.deepcopy(model), recipe, validation=[batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_measured_is_refused_before_any_step(monkeypatch):
    model, batch = MODELS["vit"]()
    monkeypatch.setattr("compress.pipeline.run_steps", None)
    recipe = {"steps": [HEADS], "validate": {"perplexity": "1.1x"}}
    with pytest.raises(CompressError, match="perplexity .* cannot be measured here"):
        compress.compress(model, recipe, validation=[batch])
