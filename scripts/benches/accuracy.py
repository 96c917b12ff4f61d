"""What quantizing costs in answers, processor seconds and memory: the recipes in recipes/quantize on real models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from benches.ours import RECIPES, emitted, measured, model_of
from benches.paired import Missing
from benches.tables import ROOT, show, update

HEAD = ["model", "recipe", "measure", "before", "after", "change", "limit", "MB", "processor seconds", "peak GB"]
TABLE = RECIPES / "accuracy.csv"
PEER = "smollm2-w4-g64"  # llm-compressor gets the calibration windows of this recipe


def main(arguments: list[str]) -> int:
    """Measure these recipes, or all; the number of limits that were missed."""
    python = None
    if "--llmcompressor" in arguments:
        at = arguments.index("--llmcompressor")
        python, arguments = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
    missed, before = 0, {}
    names = arguments or sorted(path.stem for path in RECIPES.glob("*.yaml"))
    jobs = [(name, name, lambda name=name: emitted(name)) for name in names]
    if python:
        jobs.append((PEER, f"llm-compressor GPTQ {PEER.partition('-')[2]}", lambda: gptq(python)))
    for recipe, label, make in jobs:
        try:
            folder, cost = make()
        except Missing as reason:
            print(f"skipped: {label}: {reason}")
            missed += 1
            continue
        found = rows(recipe, label, folder, cost, before)
        missed += sum(row[6].startswith("missed") for row in found)
        update(TABLE, HEAD, found, keys=3)
        show(HEAD, found)
    return missed


def rows(recipe: str, label: str, folder: Path, cost, before: dict) -> list[list[str]]:
    """A line for each measure of answers in the recipe, taken on the checkpoint as it loads again."""
    from compress.judge import answered, samples, sampling, within
    from compress.metrics import metric
    from compress.recipe import Recipe
    from compress.source import open_source
    from compress.validate import measure, weight_bytes

    path = RECIPES / f"{recipe}.yaml"
    model, options = model_of(path)
    read = Recipe.read(path)
    dtype = options[options.index("--dtype") + 1] if "--dtype" in options else None
    source = open_source(str(model), dtype=dtype)
    batches = samples(read.validate_, source, None, seed=None)
    names = [name for name in answered(read) if name not in ("size", "memory", "flops", "parameters")]
    sampler = sampling(source, read, batches) if "psnr" in names else None
    key = (str(model), dtype, read.validate_.model_dump_json(exclude={"limits"}), *names)
    if key not in before:
        before[key] = measure(names, source.model, source.model, batches, sampler=sampler)
    after = measure(names, again(source.model, folder), source.model, batches, sampler=sampler)
    size, found = f"{weight_bytes(folder) / 1e6:.1f}", []
    for name in names:
        old, new = before[key][name], after[name]
        change = f"{new / old:.4f}x" if name == "perplexity" else f"{new - old:+.4f}"
        limit = read.validate_.limits[name]
        kept = limit is None or within(metric(name).better, new, limit.bound(old))
        text = "" if limit is None else limit.text if kept else f"missed: {limit.text}"
        cells = [f"{old:.4f}", f"{new:.4f}", change, text, size, f"{cost.seconds:.0f}", f"{cost.peak / 1e9:.2f}"]
        found.append([model.name, label, name, *cells])
    return found


def again(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The checkpoint by plain from_pretrained."""
    import compress  # noqa: F401  # from_pretrained knows our checkpoints by this

    return type(model).from_pretrained(folder).eval()


def gptq(python: str) -> tuple[Path, object]:
    """llm-compressor's GPTQ on the calibration windows of our recipe, and what its process cost."""
    from safetensors.torch import save_file

    from compress.judge import samples
    from compress.recipe import Recipe
    from compress.source import open_source

    path = RECIPES / f"{PEER}.yaml"
    model, _ = model_of(path)
    recipe = Recipe.read(path)
    batches = samples(recipe.calibrate, open_source(str(model)), None, seed=recipe.seed)
    out = ROOT / "bench" / "quantize" / "llmcompressor"
    out.mkdir(parents=True, exist_ok=True)
    windows = out / "windows.safetensors"
    save_file({"input_ids": torch.cat([batch["input_ids"] for batch in batches])}, windows)
    group = str(json.loads(recipe.steps[0].method.model_dump_json())["group"])
    script = ROOT / "scripts" / "benches" / "llmcompressor_gptq.py"
    cost = measured([python, str(script), str(model), str(windows), "4", group, str(out / "model")])
    return out / "model", cost
