"""What makes an emitted folder: its sidecar, the proof that no byte changed, and loading it with our kernels."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from compress.errors import CompressError
from compress.replay import FORMAT

SIDECAR = "compress.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by their names in files
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model|compressed)(-\d+-of-\d+)?\.safetensors")


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
        if not {"dtype", "torch_dtype"} & options.keys():  # diffusers does not look at what is stored
            dtypes = stored_dtypes(folder)
            options["dtype"] = dtypes if facts["component"] else dtypes["default"]
        return getattr(diffusers, name).from_pretrained(folder, **options)
    import transformers

    cls = getattr(transformers, facts["class"])
    return cls.from_pretrained(folder, **({"dtype": "auto"} | options))


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of most floating numbers in the weight files, of a pipeline for each part; float32 without any.

    As diffusers wants it: by the name of the part, and under `default` for what has no name.
    """
    found = {"default": torch.float32}
    for path in model_folders(folder):
        sizes = Counter()
        for file in weight_files(path):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    if part.get_dtype() in FLOATS:
                        sizes[part.get_dtype()] += prod(part.get_shape())
        if sizes:
            dtype = getattr(torch, FLOATS[sizes.most_common(1)[0][0]])
            found["default" if path == folder else path.name] = dtype
    return found


def model_folders(folder: Path) -> list[Path]:
    """The folder of a model, or of a pipeline with those of its parts."""
    parts = folder.iterdir() if (folder / "model_index.json").exists() else ()
    return [folder, *sorted(path for path in parts if path.is_dir())]


def weight_files(folder: Path) -> list[Path]:
    """The files in a folder that the libraries take for the weights of a model; others may lie beside them."""
    return sorted(path for path in folder.glob("*.safetensors") if WEIGHTS.fullmatch(path.name))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sealed_files(folder: Path) -> list[Path]:
    free = {SIDECAR, "report.json", "report.html", "README.md", ".gitattributes"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in free)
