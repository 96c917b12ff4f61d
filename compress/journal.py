"""The folder of an unfinished run: every finished step is in it, so that a killed run goes on there.

`<out>.partial/run.json` names the steps that are done and the digest of the weights after the last of them; beside both
may lie the state of a training of the step after them. All are written under a temporary name and renamed, so a kill at
any moment leaves the state before or after, never half.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from compress.checkpoint import sha256
from compress.errors import CompressError
from compress.source import Source

RUN = "run.json"
LOCK = "lock"


class Journal:
    """What is done of one run, on disk; one process at a time, as a context."""

    def __init__(self, out: Path, fingerprint: str, restart: bool = False):
        self.folder = partial(out)
        self.fingerprint = fingerprint
        self.restart = restart
        self.steps: list[dict] = []

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / LOCK, "w")
        try:
            self._claim()
            self.steps = self._found()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompressError(
                f"{self.folder}: another process works there; wait for it or choose another -o"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _found(self) -> list[dict]:
        """The steps that are done; with `restart` what is damaged or of another run is cleared away."""
        try:
            return self._read()
        except CompressError:
            if not self.restart:
                raise
            self._clear()
            return []

    def _clear(self) -> None:
        (self.folder / RUN).unlink(missing_ok=True)  # first: without it a half-cleared folder holds nothing to go on
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _read(self) -> list[dict]:
        path = self.folder / RUN
        if not path.exists():
            return []
        try:
            content = json.loads(path.read_text())
            theirs, steps, digest = content["fingerprint"], content["steps"], content["weights"]
        except (ValueError, KeyError, TypeError):
            raise self._damaged(path) from None
        if theirs != self.fingerprint:
            raise CompressError(
                f"{self.folder}: holds an unfinished run of another model, recipe, data or version; "
                "remove it, choose another -o, or start over with --force"
            )
        weights = self._weights(len(steps))
        if not weights.exists() or sha256(weights) != digest:
            raise self._damaged(weights)
        return steps

    def _damaged(self, path: Path) -> CompressError:
        return CompressError(f"{self.folder}: {path.name} is damaged; remove the folder or start over with --force")

    def _weights(self, steps: int) -> Path:
        """The file of the weights after so many steps."""
        return self.folder / f"step-{steps}.safetensors"

    def training(self, steps: int) -> tuple[Path, str]:
        """Where a training after so many steps keeps its state until its own step is done, and what run it is of."""
        return self.folder / f"step-{steps}-training.safetensors", self.fingerprint

    def add(self, model: nn.Module, step: dict) -> None:
        """Keep a finished step: first the weights after it, then the list that names them."""
        self.steps = [*self.steps, step]
        weights = self._weights(len(self.steps))
        part = weights.with_suffix(".part")
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        save_model(model, str(part))
        os.replace(part, weights)
        listed = self.folder / "run.part"
        content = {"fingerprint": self.fingerprint, "steps": self.steps, "weights": sha256(weights)}
        listed.write_text(json.dumps(content))
        os.replace(listed, self.folder / RUN)
        for old in self.folder.glob("step-*"):
            if old != weights:
                old.unlink()

    def restore(self, model: nn.Module) -> None:
        """Load the weights after the last finished step into the model with those steps' structure."""
        load_model(model, str(self._weights(len(self.steps))), strict=True)

    def stage(self) -> Path:
        """An empty folder to write the checkpoint into before it is moved to its place."""
        folder = self.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def finish(self, out: Path) -> None:
        """Move the staged checkpoint to its place in one rename, then forget the run."""
        if out.exists():  # only with --force
            shutil.rmtree(self.folder / "replaced", ignore_errors=True)
            out.rename(self.folder / "replaced")
        (self.folder / "out").rename(out)
        self.discard()

    def discard(self) -> None:
        """Forget the run: it is done, or the recipe must be changed before it can go on."""
        self._clear()
        shutil.rmtree(self.folder)


def partial(out: Path) -> Path:
    """Where the unfinished run of an output folder lies."""
    return out.with_name(out.name + ".partial")


def fingerprint(source: Source, data: Sequence[list[dict]], *facts: str) -> str:
    """What must be the same for a run to go on: model, data, recipe, options and versions."""
    import diffusers
    import transformers

    from compress import __version__

    digest = hashlib.sha256()
    for fact in (*facts, __version__, torch.__version__, transformers.__version__, diffusers.__version__):
        digest.update(fact.encode() + b"\0")
    leaves = {keystr(path): value for path, value in tree_flatten_with_path([*map(list, data)])[0]}
    for name, value in sorted(leaves.items()):
        digest.update(name.encode())
        _add(digest, value)
    if not source.adopted:
        for path in source.files():
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\0".encode())
    else:  # the user's own object, whatever name it bears
        for name, tensor in source.model.state_dict().items():
            digest.update(name.encode())
            _add(digest, tensor)
    return digest.hexdigest()


def _add(digest, value) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode() + b"\0")
