"""Models come in as they are stored, whole, or not at all."""

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import CompressError
from compress.source import _folder, open_source
from models import MODELS, MORE

pytestmark = pytest.mark.usefixtures("quick")
INT8 = {"steps": [{"use": "quantize.int8"}]}


@pytest.mark.parametrize("name", ["llama", "dit"])
def test_a_model_keeps_the_dtype_of_its_files(name, tmp_path):
    MODELS[name]()[0].half().save_pretrained(tmp_path / "half")
    source = open_source(str(tmp_path / "half"))
    assert source.model.dtype == source.original().dtype == torch.float16
    assert open_source(str(tmp_path / "half"), meta=True).model.dtype == torch.float16


@pytest.mark.parametrize("name", ["llama", "dit"])
def test_another_dtype_is_planned_proven_and_loaded(name, saved, tmp_path):
    rows = {dtype: compress.plan(saved(name), INT8, dtype=dtype) for dtype in (None, "bfloat16")}
    assert rows["bfloat16"][0]["ledger"]["bytes"] == rows[None][0]["ledger"]["bytes"] / 2
    result = compress.compress(saved(name), INT8, output=tmp_path / "out", dtype="bfloat16")
    assert result.report.verified["bit_equal"]
    assert "as it was loaded" in result.report.measure("size").note
    assert compress.load(tmp_path / "out").dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("dtype=torch.bfloat16") == card.count("import torch\n") == (2 if name == "dit" else 0)
    wanted = {"dtype": torch.float32}
    assert compress.load(tmp_path / "out", **wanted).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "dit"])
def test_weights_that_are_not_all_there_are_not_made_up(name, tmp_path):
    MODELS[name]()[0].save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    lost = max(tensors)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CompressError, match=f"hold no .*{lost}"):
        open_source(str(tmp_path))


def test_an_encoder_without_its_pooler_is_whole(tmp_path):
    model = MODELS["bert"]()[0]
    (getattr(model, model.base_model_prefix, model)).pooler = None
    model.save_pretrained(tmp_path / "in")
    assert not any("pooler" in name for name in load_file(tmp_path / "in" / "model.safetensors"))
    assert compress.compress(tmp_path / "in", INT8, output=tmp_path / "out").report.verified["bit_equal"]


def test_a_download_takes_all_that_a_result_needs(monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return "here"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "LICENSE.txt",
        "1_Pooling/config.json",
    ]
    weights = ["model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    for configs_only in (True, False):
        assert _folder("owner/name", configs_only) == Path("here")
        taken = [file for file in [*files, *weights, "model.bin"] if any(fnmatch(file, glob) for glob in asked[-1])]
        assert taken == files + ([] if configs_only else weights)


def test_packed_experts_are_planned_and_written(tmp_path):
    """On meta their grouped product knows bfloat16 only, and on disk each expert is a tensor of its own."""
    MORE["mixtral"]()[0].save_pretrained(tmp_path / "in")
    assert compress.inspect(str(tmp_path / "in"))["flops"] > 0
    recipe = INT8 | {"emit": {"format": "compressed-tensors"}}
    result = compress.compress(tmp_path / "in", recipe, output=tmp_path / "out")
    assert result.report.verified["bit_equal"] and result.report.format == "compressed-tensors"


def test_of_two_processors_the_model_decides(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for name, attribute in (("vit", "image_mean"), ("bert", "convert_tokens_to_ids")):
        for part in (MODELS[name]()[0], CLIPImageProcessor(), tokenizer):
            part.save_pretrained(tmp_path / name)
        assert hasattr(open_source(str(tmp_path / name)).processor, attribute)
