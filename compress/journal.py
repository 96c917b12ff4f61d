"""The folder of an unfinished run: every finished step is in it, so that a killed run goes on there.

`<out>.partial/run.json` names the steps that are done and the file with the weights after the last of them. Both
are written under a temporary name and renamed, so a kill at any moment leaves the state before or after, never half.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from compress.errors import CompressError
from compress.source import Source


class Journal:
    """What is done of one run, on disk."""

    def __init__(self, out: Path, fingerprint: str, restart: bool = False):
        self.folder = out.with_name(out.name + ".partial")
        self.fingerprint = fingerprint
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.steps: list[dict] = self._read()

    def _read(self) -> list[dict]:
        path = self.folder / "run.json"
        if not path.exists():
            return []
        content = json.loads(path.read_text())
        if content["fingerprint"] != self.fingerprint:
            raise CompressError(
                f"{self.folder}: holds an unfinished run of another model, recipe or version; "
                "remove it, choose another -o, or start over with --force"
            )
        return content["steps"]

    def add(self, model: nn.Module, step: dict) -> None:
        """Keep a finished step: first the weights after it, then the list that names them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = self.folder / f"step-{len(self.steps)}.safetensors"
        part = weights.with_suffix(".part")
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        save_model(model, str(part))
        os.replace(part, weights)
        self.steps = [*self.steps, step]
        listed = self.folder / "run.part"
        listed.write_text(json.dumps({"fingerprint": self.fingerprint, "steps": self.steps}))
        os.replace(listed, self.folder / "run.json")
        for old in self.folder.glob("step-*.safetensors"):
            if old != weights:
                old.unlink()

    def restore(self, model: nn.Module) -> None:
        """Load the weights after the last finished step into the model with those steps' structure."""
        load_model(model, str(self.folder / f"step-{len(self.steps) - 1}.safetensors"), strict=True)

    def stage(self) -> Path:
        """An empty folder to write the checkpoint into before it is moved to its place."""
        folder = self.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def finish(self, out: Path) -> None:
        """Move the staged checkpoint to its place in one rename, then forget the run."""
        if out.exists():  # only with --force
            shutil.rmtree(self.folder / "replaced", ignore_errors=True)
            out.rename(self.folder / "replaced")
        (self.folder / "out").rename(out)
        shutil.rmtree(self.folder)


def fingerprint(source: Source, *facts: str) -> str:
    """What must be the same for a run to go on: model, recipe, options and versions."""
    import diffusers
    import transformers

    digest = hashlib.sha256()
    for fact in (*facts, torch.__version__, transformers.__version__, diffusers.__version__):
        digest.update(fact.encode() + b"\0")
    if source.folder is not None:
        for path in sorted(source.folder.rglob("*")):
            if path.suffix in (".json", ".safetensors"):
                stat = path.stat()
                digest.update(f"{path.relative_to(source.folder)} {stat.st_size} {stat.st_mtime_ns}\0".encode())
    else:
        for name, tensor in source.model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
