"""Writing a compressed model in the first format that fits, and loading it again.

native: the result is an ordinary config of its model. compressed-tensors: only weights (and activations) were
quantized. compress-plan: anything else; the library rebuilds the structure through our quantizer.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import nn

from compress.align import align_file
from compress.bundle import bundle
from compress.compressed_tensors import packable, write
from compress.errors import CompressError
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.replay import FORMAT, keeps_disk_names
from compress.view import View

SIDECAR = "compress.json"
WEIGHTS = "compressed.safetensors"  # a name that a machine without compress does not look for


def choose_format(model: nn.Module, library: str, steps: list[dict], wanted: str) -> tuple[str, str]:
    """The format and why it was taken; CompressError when the user's wish cannot hold this model."""
    fits = {"compress-plan": "the structure is not an ordinary config of this model"}
    families = {step["use"].split(".")[0] for step in steps}
    ordinary = library == "transformers" and families <= {"heads", "quantize"} and native_config(model) is not None
    if ordinary and families == {"heads"}:
        fits["native"] = "the result is an ordinary config of this model"
    if ordinary and "quantize" in families and packable(model):
        fits["compressed-tensors"] = "beyond an ordinary config only weights were quantized, which vLLM reads too"
        if not _is_decoder(model):
            fits["compress-plan"] = "only compress has fast kernels for this kind of model"
    if wanted != "auto":
        if wanted not in fits:
            raise CompressError(f"--format is {wanted}, this result fits only {', '.join(fits)}")
        return wanted, "you asked for it"
    prefer = ["native", "compressed-tensors", "compress-plan"] if _is_decoder(model) else ["native", "compress-plan"]
    chosen = next(name for name in prefer if name in fits)
    return chosen, fits[chosen]


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


def seal(folder: Path, facts: dict) -> None:
    """Write the sidecar: what the checkpoint is, and the sha256 of every file that must not change."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in _sealed_files(folder)}
    (folder / SIDECAR).write_text(json.dumps({"format_version": FORMAT, **facts, "files": files}, indent=1) + "\n")


def read_sidecar(folder: str | Path) -> dict:
    """The sidecar of an emitted folder, with its version checked."""
    path = Path(folder) / SIDECAR
    if not path.exists():
        raise CompressError(f"{folder}: has no {SIDECAR}, it is not a folder that compress emitted")
    try:
        facts = json.loads(path.read_text())
        version = int(facts["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{path}: is damaged ({type(error).__name__}: {error})") from error
    if version > FORMAT:
        raise CompressError(f"{path}: has format {version}, this compress reads up to {FORMAT}: upgrade it")
    if missing := {"format", "library", "class", "component", "steps", "files"} - facts.keys():
        raise CompressError(f"{path}: is damaged, it has no {min(missing)}")
    return facts


def check_files(folder: str | Path) -> dict:
    """Every file there and byte for byte as written, else a CompressError naming the first that is not."""
    facts = read_sidecar(folder)
    for name, digest in facts["files"].items():
        path = Path(folder) / name
        if not path.exists():
            raise CompressError(f"{folder}: {name} is missing")
        if sha256(path) != digest:
            raise CompressError(f"{path}: its bytes are not those that were written (sha256 differs)")
    return facts


def load(folder: str | Path, **options):
    """Load an emitted folder with our kernels, whichever format it has; a pipeline folder gives the pipeline."""
    folder, facts = Path(folder), read_sidecar(folder)
    if facts["library"] == "diffusers":
        import diffusers

        name = "DiffusionPipeline" if facts["component"] else facts["class"]
        return getattr(diffusers, name).from_pretrained(folder, **options)
    import transformers

    cls = getattr(transformers, facts["class"])
    if facts["format"] == "compressed-tensors":  # the library's own way would unpack it and lose our kernels
        from compress.hf_transformers import PlanConfig

        config = transformers.AutoConfig.from_pretrained(folder)
        config.quantization_config = PlanConfig(steps=quantize_steps(facts["steps"])).to_dict()
        options["config"] = config
    return cls.from_pretrained(folder, **({"dtype": "auto"} | options))


def native_config(model: nn.Module):
    """A config of this model's own class that gives exactly these shapes (before quantization), or None."""
    config = copy.deepcopy(model.config)
    attentions = View(model).attentions()
    shapes = {(attention.heads, attention.kv_heads, attention.head_dim) for attention in attentions}
    if len(shapes) == 1 and hasattr(config, "head_dim"):
        config.num_attention_heads, kv_heads, config.head_dim = shapes.pop()
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = kv_heads
    try:
        with torch.device("meta"):
            empty = type(model)._from_config(config)
    except (ValueError, TypeError):
        return None
    return config if _dense_shapes(empty) == _dense_shapes(model) else None


def _dense_shapes(model: nn.Module) -> dict[str, tuple]:
    """The shapes of all tensors as they would be without quantization."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, (Int8Linear, WeightOnlyLinear, Int8Embedding)):
            for name in module.state_dict():
                if name != "bias":
                    del shapes[f"{path}.{name}"]
            sizes = (module.out_features, module.in_features) if hasattr(module, "in_features") else module.weight.shape
            shapes[f"{path}.weight"] = tuple(sizes)
    return shapes


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sealed_files(folder: Path) -> list[Path]:
    free = {SIDECAR, "report.json", "report.html", "README.md", ".gitattributes"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in free)


def _is_decoder(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)()) and not model.config.is_encoder_decoder


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
            _save_compressed_tensors(model, folder, shard)
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


def quantize_steps(steps: list[dict]) -> list[dict]:
    """The steps that a compressed-tensors checkpoint replays: what the others did stands in its config."""
    return [step for step in steps if step["use"].startswith("quantize.")]


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
    """The most telling name through which users load this model."""
    if View(model).library != "transformers":
        return type(model).__name__
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


def _save_compressed_tensors(model: nn.Module, folder: Path, shard: str) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors, quantization = write(model)
    save_torch_state_dict(tensors, folder, max_shard_size=shard, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["quantization_config"] = quantization
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
