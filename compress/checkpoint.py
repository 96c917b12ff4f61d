"""What makes an emitted folder: its sidecar, the proof that no byte changed, and loading it with our kernels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from compress.errors import CompressError
from compress.replay import FORMAT

SIDECAR = "compress.json"


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
    return cls.from_pretrained(folder, **({"dtype": "auto"} | options))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sealed_files(folder: Path) -> list[Path]:
    free = {SIDECAR, "report.json", "report.html", "README.md", ".gitattributes"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in free)
