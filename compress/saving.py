"""Writing a compressed model into a folder, in each of the formats and for both libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import nn

from compress.align import align_file
from compress.bundle import bundle
from compress.compressed_tensors import write
from compress.errors import CompressError
from compress.formats import native_config, quantize_steps
from compress.replay import FORMAT, keeps_disk_names
from compress.view import View

WEIGHTS = "compressed.safetensors"  # a name that a machine without compress does not look for


def save(model: nn.Module, folder: Path, format: str, steps: list[dict], *, shard: str = "5GB", pipeline=None) -> None:
    """Write weights, config and code of the model into an empty folder."""
    library = View(model).library
    folder.mkdir(parents=True, exist_ok=True)
    if library == "transformers":
        _save_transformers(model, folder, format, steps, shard)
    elif library == "diffusers":
        _save_diffusers(model, folder, steps, shard, pipeline)
    else:
        raise CompressError(f"{type(model).__name__}: only transformers and diffusers models can be saved")
    for path in folder.rglob("*.safetensors"):
        align_file(path)


def _save_transformers(model: nn.Module, folder: Path, format: str, steps: list[dict], shard: str) -> None:
    config, quantizer = model.config, getattr(model, "hf_quantizer", None)
    model.hf_quantizer = None  # transformers asks it for leave to save, and ours sends users here
    record = vars(config).pop("quantization_config", None)
    for name in getattr(config, "sub_configs", {}):  # loading sets it in all parts, saving only in the whole
        if (part := getattr(config, name, None)) is not None:
            part.dtype = model.dtype
    ordinary = config if format == "compress-plan" else native_config(model)
    written = False
    try:
        model.config = ordinary
        if format == "native":
            model.save_pretrained(folder, max_shard_size=shard)
        elif format == "compressed-tensors":
            _save_compressed_tensors(model, folder, steps, shard)
        else:
            model.save_pretrained(folder, max_shard_size=shard, save_original_format=keeps_disk_names(model))
            _rename_weights(folder)
        written = True
    finally:
        if not written:  # whatever stopped it, the user's model stays as it was
            model.config, model.hf_quantizer = config, quantizer
            if record is not None:
                config.quantization_config = record
    if format != "native":
        _mark(model, folder, format, steps)


def _mark(model: nn.Module, folder: Path, format: str, steps: list[dict]) -> None:
    """Put the record into the model in memory, and for a plan, with the loading code, beside the weights."""
    from compress.hf_transformers import PlanConfig, PlanQuantizer

    if format == "compressed-tensors":
        plan = PlanConfig(steps=quantize_steps(steps))
    else:
        index = WEIGHTS + ".index.json"
        plan = PlanConfig(steps=steps, weights=index if (folder / index).exists() else WEIGHTS)
        classes = _auto_classes(model)
        for name, text in bundle("transformers", classes, [step["use"] for step in steps]).items():
            (folder / name).write_text(text)
        saved = json.loads((folder / "config.json").read_text())
        saved["quantization_config"] = plan.to_dict()
        saved["auto_map"] = {name: f"modeling_compress.{name}" for name in classes}
        (folder / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    model.config.quantization_config = plan
    model.hf_quantizer = PlanQuantizer(plan, pre_quantized=True)
    model.is_quantized = True


def _auto_classes(model: nn.Module) -> list[str]:
    """The auto classes through which users load this model."""
    import transformers

    names = [name for name in dir(transformers) if name == "AutoModel" or name.startswith("AutoModelFor")]
    found = []
    for name in names:
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        cls = mapping.get(type(model.config), None) if mapping is not None else None
        if cls is not None and (name == "AutoModel" or cls is type(model)):
            found.append(name)
    return found


def auto_class(model: nn.Module) -> str:
    """The name through which users load this model: AutoModel for a bare one, else that of its task."""
    if View(model).library != "transformers":
        return type(model).__name__
    import transformers

    if transformers.AutoModel._model_mapping.get(type(model.config), None) is type(model):
        return "AutoModel"
    return next((name for name in _auto_classes(model) if name != "AutoModel"), "AutoModel")


def _rename_weights(folder: Path) -> None:
    """Give the weights the name that only our quantizer points the loader at."""
    for path in sorted(folder.glob("model*.safetensors")):
        path.rename(folder / path.name.replace("model", "compressed", 1))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {
            key: file.replace("model", "compressed", 1) for key, file in content["weight_map"].items()
        }
        (folder / (WEIGHTS + ".index.json")).write_text(json.dumps(content, indent=2) + "\n")
        index.unlink()


def _save_compressed_tensors(model: nn.Module, folder: Path, steps: list[dict], shard: str) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors, quantization = write(model)
    save_torch_state_dict(tensors, folder, max_shard_size=shard, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    # Beside what every reader of the format wants, our record: with compress imported its kernels take over.
    saved["quantization_config"] = quantization | {"compress": {"format": FORMAT, "steps": quantize_steps(steps)}}
    (folder / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def _save_diffusers(model: nn.Module, folder: Path, steps: list[dict], shard: str, pipeline) -> None:
    from compress.hf_diffusers import PlanConfig, PlanQuantizer

    plan = PlanConfig(steps=steps)
    model.register_to_config(quantization_config=plan)
    model.hf_quantizer = PlanQuantizer(plan, pre_quantized=True)
    model.is_quantized = True
    target = folder
    if pipeline is not None:
        pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)
        target = next(path for path in folder.iterdir() if getattr(pipeline, path.name, None) is model)
    else:
        model.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)
    name = type(model).__name__
    for file, text in bundle("diffusers", [name], [step["use"] for step in steps]).items():
        (target / file).write_text(text)
    saved = json.loads((target / "config.json").read_text())
    saved["auto_map"] = {"AutoModel": f"modeling_compress.{name}"}
    saved.pop("_name_or_path", None)  # where this copy came from is nobody's business and changes the bytes
    (target / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def copy_companions(source: Path | None, folder: Path) -> None:
    """Take along what belongs to the model and is not the model: tokenizer, processor, licence."""
    wanted = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
              "sentencepiece*", "preprocessor_config.json", "processor_config.json", "chat_template*", "LICENSE*",
              "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")  # fmt: skip
    if source is None:
        return
    for pattern in wanted:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    for path in sorted(source.glob("*_Pooling")):  # how a sentence encoder makes one vector of its tokens
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
