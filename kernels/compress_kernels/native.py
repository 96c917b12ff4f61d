"""C kernels, compiled once a machine by the system's compiler: they know instructions that torch was not built for.

The source is a Python string, so that the code beside a checkpoint carries it. A library shares torch's own threads:
it may declare `torch_parallel_for` and the other C functions of torch's stable interface, or use OpenMP.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from shutil import which

import torch

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-std=gnu11", "-w", "-Wfatal-errors")
TIMEOUT = 120  # seconds; a build takes a few

_reasons: list[str] = []


def reason() -> str | None:
    """Why the first library that could not be built was not; None while there is no such."""
    return _reasons[0] if _reasons else None


@cache
def build(*sources: str) -> ctypes.CDLL | None:
    """The library made of the first of these C sources that can be built here, or None: `reason()` says why.

    A source for instructions that this processor lacks begins with an #error, which ends its build at once.
    """
    failure = "there is no source"
    for source in sources:
        try:
            return _load(source)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failure = " ".join(str(error).split())[:300]
    _reasons.append(failure)
    return None


def _load(source: str) -> ctypes.CDLL:
    compiler = which("cc") or which("gcc") or which("clang")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RuntimeError(f"native kernels want Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    if compiler is None:
        raise RuntimeError("there is no C compiler")
    folder, made = _folder(), os.stat(os.path.realpath(compiler))
    key = repr((source, FLAGS, compiler, made.st_size, made.st_mtime, torch.__version__, _runtimes(), _processor()))
    path = folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".so")
    if not path.exists():
        _compile(compiler, source, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, source: str, path: Path) -> None:
    """Under another name first: a process that builds the same at the same time never sees half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        (Path(scratch) / "source.c").write_text(source)
        # Linking is a step of its own: given -fopenmp, the linker would add the compiler's runtime, a second one.
        _run([compiler, *FLAGS, "-c", "source.c", "-o", "source.o"], scratch)
        _run([compiler, "-shared", "source.o", *_runtimes(), "-lm", "-o", built.name], scratch)
        built.replace(path)


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(
            next((line for line in done.stderr.splitlines() if "error" in line), "the C compiler failed")
        )


def _folder() -> Path:
    """The user's own cache."""
    folder = Path.home() / ".cache" / "compress-kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    return folder


@cache
def _runtimes() -> tuple[str, str]:
    """Torch's libraries as they are loaded: its own functions, and the OpenMP runtime that its threads live in."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = sorted({Path(line.split(maxsplit=5)[5]) for line in maps if ".so" in line})
    torches = [path for path in paths if path.name.startswith("libtorch_cpu.")]
    openmps = [path for path in paths if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    if not torches or not openmps:
        raise RuntimeError("torch was built without OpenMP")
    home = torches[0].parent
    openmps.sort(key=lambda path: home.parent.name not in path.as_posix())  # other packages may bring their own
    return str(torches[0]), str(openmps[0])


def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "".join(line for line in lines if line.startswith(("model", "cpu family", "vendor", "flags", "stepping")))
