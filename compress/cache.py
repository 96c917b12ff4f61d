"""Batches that were made once are kept as safetensors under the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1  # raised when the same options make other batches


def cached(make: Callable[[], list[dict]], spec: str, source: Any, options: dict, folder: Path | None) -> list[dict]:
    """The batches kept for this spec, source and options, or made and then kept; a damaged file is made anew."""
    key = _key(spec, source, options)
    if key is None:
        return make()
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = (folder or Path.home() / ".cache" / "compress") / f"{key}.safetensors"
    if path.is_file():
        try:
            return _unflatten(load_file(path))
        except SafetensorError:
            path.unlink()
    found = make()
    part = path.with_suffix(f".{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in _flatten(found).items()}
    save_file(own, part)  # which refuses tensors that share their memory
    os.replace(part, path)
    return found


def _key(spec: str, source: Any, options: dict) -> str | None:
    """A digest of all that the batches follow from; None where that is not known, as for a dataset of the hub."""
    path = Path(spec).expanduser()
    if path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        facts: Any = [path.resolve(), *(_stamp(file) for file in files)]
    elif spec == "trajectory" and source.folder is not None:
        facts = [_stamp(file) for file in sorted(source.folder.rglob("*")) if file.is_file()]
    else:
        return None
    model = [type(source.model).__name__, getattr(source.model, "config", None), _processor(source.processor)]
    text = json.dumps([FORMAT, spec, facts, options, model], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _stamp(file: Path) -> list:
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


def _processor(processor: Any) -> Any:
    """All that a tokenizer or image processor does, as text."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # these two remember the last call
        return [state, str(processor.special_tokens_map), processor.padding_side, processor.model_max_length]
    return processor.to_json_string() if hasattr(processor, "to_json_string") else repr(processor)


def _flatten(batches: list[dict]) -> dict[str, Tensor]:
    """One flat dict: `number.argument` or `number.argument.entry`."""
    flat = {}
    for number, batch in enumerate(batches):
        for name, value in batch.items():
            entries = (
                {f".{inner}": tensor for inner, tensor in value.items()} if isinstance(value, dict) else {"": value}
            )
            flat |= {f"{number}.{name}{inner}": tensor for inner, tensor in entries.items()}
    return flat


def _unflatten(flat: dict[str, Tensor]) -> list[dict]:
    found: dict[int, dict] = {}
    for name, tensor in flat.items():
        number, argument, *inner = name.split(".", 2)
        batch = found.setdefault(int(number), {})
        if inner:
            batch.setdefault(argument, {})[inner[0]] = tensor
        else:
            batch[argument] = tensor
    return [found[number] for number in sorted(found)]
