"""Checkpoints made by the product's own command, and the model of each loaded as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from benches.paired import Missing
from benches.tables import ROOT

RECIPES = ROOT / "recipes" / "quantize"


@dataclass(frozen=True)
class Cost:
    """What a command took: processor seconds of all its processes, and the peak memory of the largest."""

    seconds: float
    peak: int


def measured(command: list[str]) -> Cost:
    """Run a command on one thread; what it cost."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Missing(f"{' '.join(command[:4])} ... ended with {process.returncode}")
    # On Linux the peak is in KiB.
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def model_of(recipe: Path) -> tuple[Path, list[str]]:
    """The folder of the model that the first line of a recipe names, and the options with it."""
    folder, *options = recipe.read_text().splitlines()[0].removeprefix("# model: ").split()
    return ROOT / folder, options


def emitted(name: str) -> tuple[Path, Cost]:
    """The checkpoint that a recipe makes, measured elsewhere than by itself, and what it cost."""
    recipe = RECIPES / f"{name}.yaml"
    model, options = model_of(recipe)
    if not model.exists():
        raise Missing(f"scripts/fetch {model.name}")
    out = ROOT / "bench" / "quantize" / name
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    plain = out.with_name(f"{name}.yaml")
    data = yaml.safe_load(recipe.read_text())
    data.pop("validate", None)
    plain.write_text(yaml.safe_dump(data, sort_keys=False))
    cost = measured([sys.executable, "-m", "compress", str(model), str(plain), "-o", str(out), *options])
    return out, cost
