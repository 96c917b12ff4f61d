"""The recipes in recipes/ on their real models, limits and all; their figures go to recipes/results.csv."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benches.tables import ROOT, update

HEAD = ["recipe", "model", "quality", "size", "latency, ms", "against the fastest stock path", "format"]
TABLE = ROOT / "recipes" / "results.csv"
PHYSICAL = ("size", "parameters", "latency", "memory", "flops")


def main(names: list[str]) -> int:
    """Run these recipes, or all; the number that failed."""
    failed = 0
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        first = path.read_text().splitlines()[0]
        if (names and path.stem not in names) or not first.startswith("# model: "):
            continue
        (model, *options), out = first.removeprefix("# model: ").split(), ROOT / "bench" / path.stem
        shutil.rmtree(out, ignore_errors=True)  # not --force: a missed limit must fail here
        command = [sys.executable, "-m", "compress", model, str(path), "-o", str(out), *options]
        print("$", "compress", model, path.relative_to(ROOT), *options, flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            failed += 1
            update(TABLE, HEAD, [], keys=1, gone=(path.stem,))
            continue
        update(TABLE, HEAD, [row(path.stem, json.loads((out / "report.json").read_text()))], keys=1)
    return failed


def row(name: str, report: dict) -> list[str]:
    """A line of the table from a report."""
    found = {measure["name"]: measure for measure in report["measures"]}
    answers = {name: item for name, item in found.items() if name not in PHYSICAL}
    quality = [f"{name} {item['before']:.4g} -> {item['after']:.4g}" for name, item in answers.items()]
    size, latency = found["size"], found.get("latency")
    speed = against = "-"
    if latency:
        speed = f"{latency['before']:.1f} -> {latency['after']:.1f}"
        stock = latency["baseline"]
        against = f"{stock['value'] / latency['after']:.2f}x ({stock['name']})"
    megabytes = f"{size['before'] / 1e6:.1f} -> {size['after'] / 1e6:.1f} MB"
    megabytes += f" ({size['note']})" if size["note"] else ""
    return [name, Path(report["model"]).name, "; ".join(quality), megabytes, speed, against, report["format"]]
