"""Where a model comes from: a hub id, a folder or the user's object; transformers, diffusers or a whole pipeline."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from compress.checkpoint import stored_dtypes
from compress.errors import CompressError, one_of

DENOISERS = ("transformer", "unet", "prior")  # components of a diffusers pipeline that a recipe compresses


@dataclass
class Source:
    """A model with what belongs to it; `original()` gives the untouched model again for comparison."""

    name: str
    model: nn.Module
    library: str  # "transformers" | "diffusers" | "torch"
    folder: Path | None = None
    component: str | None = None  # the part of `pipeline` that is `model`
    pipeline: Any = None
    own_processor: Any = None
    untouched: nn.Module | None = None
    device: str | None = None
    dtype: str | None = None
    adopted: bool = False  # `model` is the user's own object, whatever lies in `folder`

    @cached_property
    def processor(self):
        """The tokenizer or image processor saved beside the model, or None."""
        sees = getattr(self.model, "main_input_name", None) == "pixel_values"
        return self.own_processor or (self.folder and _processor(self.folder, sees))

    def files(self) -> list[Path]:
        """The configs and weights of the model in its folder, or of all parts of its pipeline."""
        parts = [path for path in self.folder.iterdir() if path.is_dir() and hasattr(self.pipeline, path.name)]
        found = [path for folder in (self.folder, *parts) for path in folder.iterdir()]
        return sorted(path for path in found if path.suffix in (".json", ".safetensors"))

    def original(self) -> nn.Module:
        """The model as it was: read again from its folder (memory-mapped), or the copy made of a user's object."""
        if self.untouched is None:
            assert self.folder is not None
            folder = self.folder / self.component if self.component else self.folder
            self.untouched = open_source(str(folder), device=self.device, dtype=self.dtype).model
        return self.untouched


def open_source(name: str, *, device: str | None = None, dtype: str | None = None, meta: bool = False) -> Source:
    """Load a model by hub id or folder; with `meta` only its structure, from the config alone."""
    folder = _folder(name, configs_only=meta)
    source = Source(name, nn.Identity(), "torch", folder, device=device, dtype=dtype)
    if (folder / "model_index.json").exists():
        source.library = "diffusers"
        index = _json(folder / "model_index.json")
        source.component = next((part for part in DENOISERS if part in index), None)
        if source.component is None:
            raise CompressError(f"{name}: the pipeline has none of the parts {', '.join(DENOISERS)}")
        if second := index.get(f"{source.component}_2", [None])[0]:
            raise CompressError(
                f"{name}: the pipeline has two denoisers, {source.component} and {source.component}_2 ({second}); "
                "compress each by its own folder"
            )
        source.model = _diffusers(folder / source.component, dtype, meta)
        source.pipeline = None if meta else _pipeline(folder, source.component, source.model, dtype)
    else:
        config = _json(folder / "config.json") if (folder / "config.json").exists() else {}
        if not isinstance(config, dict):
            raise CompressError(f"{folder / 'config.json'}: is no mapping, it must be a model's config")
        if quantized := config.get("quantization_config"):
            method = quantized.get("quant_method")
            raise CompressError(f"{name}: is already compressed ({method}); give the original model")
        if "_class_name" in config:
            source.library, source.model = "diffusers", _diffusers(folder, dtype, meta)
        elif "model_type" in config:
            source.library, source.model = "transformers", _transformers(folder, config, dtype, meta)
        else:
            raise CompressError(
                f"{name}: has no config.json of a transformers or diffusers model and no model_index.json"
            )
    source.model.eval()
    if device and not meta:
        try:
            (source.pipeline or source.model).to(device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
            raise CompressError(f"--device is {device}: {str(error).splitlines()[0]}") from error
    return source


def adopt(model: nn.Module, processor=None) -> Source:
    """Take a model object that the user made, as it is, with a copy for comparison."""
    config = getattr(model, "config", None)
    if hasattr(model, "compressed_by") or getattr(config, "quantization_config", None) is not None:
        raise CompressError(f"{type(model).__name__}: is already compressed; give the original model")
    library = "torch"
    if hasattr(model, "config_name") and hasattr(model, "register_to_config"):
        library = "diffusers"
    elif hasattr(config, "model_type"):
        library = "transformers"
    name = getattr(config, "_name_or_path", None) or type(model).__name__
    folder = Path(name) if name and Path(str(name)).is_dir() else None
    untouched = copy.deepcopy(model).eval()
    return Source(str(name), model, library, folder, own_processor=processor, untouched=untouched, adopted=True)


def _folder(name: str, configs_only: bool) -> Path:
    """The local folder of a hub id or path; `configs_only` spares the download of the weights."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CompressError(f"{name}: is neither a folder nor a hub id such as 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]  # a star also takes folders
    patterns += [] if configs_only else ["*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CompressError(f"{name}: cannot be had from the hub: {str(error).splitlines()[0]}") from error


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CompressError(f"{path}: cannot be read as JSON: {error}") from error


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """A library's complaint about a folder, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CompressError(f"{folder}: cannot be loaded: {first}") from error


def _dtype(dtype: str | None):
    if dtype in (None, "auto"):
        return "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CompressError(f"--dtype is {dtype}, it must be float32, bfloat16, float16 or auto")
    return found


def _transformers(folder: Path, config: dict, dtype: str | None, meta: bool) -> nn.Module:
    import transformers

    names = config.get("architectures") or ["AutoModel"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise CompressError(f"{folder}: transformers {transformers.__version__} has no class {names[0]}")
    if meta:
        wanted = _dtype(dtype if dtype not in (None, "auto") else config.get("dtype") or config.get("torch_dtype"))
        with _loading(folder), torch.device("meta"):
            loaded = transformers.AutoConfig.from_pretrained(folder)
            # Experts: on meta the usual grouped product knows bfloat16 only.
            make = cls.from_config if names[0] == "AutoModel" else cls._from_config
            model = make(loaded, **({} if wanted == torch.bfloat16 else {"experts_implementation": "batched_mm"}))
        return model if wanted == "auto" else model.to(wanted)
    if not any(folder.glob("*.safetensors")):
        raise CompressError(f"{folder}: has no safetensors weights, other formats are not read")
    wanted = _dtype(dtype)
    with _loading(folder):
        model, facts = cls.from_pretrained(folder, dtype=wanted, use_safetensors=True, output_loading_info=True)
    _complete(folder, facts)
    return model


def _diffusers(folder: Path, dtype: str | None, meta: bool) -> nn.Module:
    import diffusers

    config = _json(folder / "config.json")
    if config.get("quantization_config"):
        raise CompressError(f"{folder}: is already compressed; give the original model")
    cls = getattr(diffusers, config.get("_class_name", ""), None)
    if cls is None:
        raise CompressError(f"{folder}: diffusers {diffusers.__version__} has no class {config.get('_class_name')}")
    if meta:
        with _loading(folder), torch.device("meta"):
            return cls.from_config(config).to(_stored(folder, dtype))
    if not any(folder.glob("*.safetensors")):
        raise CompressError(f"{folder}: has no safetensors weights, other formats are not read")
    with _loading(folder):
        model, facts = cls.from_pretrained(
            folder, use_safetensors=True, dtype=_stored(folder, dtype), output_loading_info=True
        )
    _complete(folder, facts)
    return model


def _stored(folder: Path, dtype: str | None) -> torch.dtype:
    """The dtype that was asked for, or that of the files, which diffusers does not look at."""
    wanted = _dtype(dtype)
    return stored_dtypes(folder)["default"] if wanted == "auto" else wanted


def _complete(folder: Path, facts: dict) -> None:
    """Refuse weights that are not all there: the libraries make up the others, each time anew.

    Sentence encoders often come without a pooler; their answers are read before it.
    """
    if missing := sorted(name for name in facts["missing_keys"] if "pooler" not in name.split(".")):
        raise CompressError(f"{folder}: the files hold no {one_of(missing, 3)}, they must hold all weights")


def _pipeline(folder: Path, component: str, model: nn.Module, dtype: str | None):
    import diffusers

    wanted = _dtype(dtype)
    wanted = stored_dtypes(folder) if wanted == "auto" else wanted
    with _loading(folder):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **{component: model}, dtype=wanted)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _processor(folder: Path, sees: bool):
    """The tokenizer or image processor of a folder: of both, the one for what the model reads."""
    import transformers

    if sees and (folder / "preprocessor_config.json").exists():
        return transformers.AutoImageProcessor.from_pretrained(folder)
    if any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return transformers.AutoTokenizer.from_pretrained(folder)
    if (folder / "preprocessor_config.json").exists():
        return transformers.AutoImageProcessor.from_pretrained(folder)
    return None
