"""What whole attention layers and the width of heads are worth: LLM-Drop, NBL and plain SVD against our methods."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from benches.paired import Missing
from benches.tables import ROOT, fill
from torch import nn

HEAD = ["model", "what", "by", "measure", "original", "result", "processor seconds"]
TABLE = ROOT / "recipes" / "heads" / "layers.csv"
DROPPING = {
    "dropped by cosine (LLM-Drop)": {"by": "cosine", "stand_in": "nothing"},
    "NBL": {"by": "bound", "context": False, "refit": False},
    "NBL's map, chosen by cosine": {"by": "cosine", "context": False, "refit": False},
    "heads.drop_attention": {"probe": 1},
}
FACTORING = {
    "plain SVD (COMCAT, not trained)": {"by": "weights"},
    "heads.factorize": {},
    "heads.factorize, distill 60": {"distill": 60},
}


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated and measured on, how many layers go and what share of the heads' width stays."""

    model: str
    calibrate: str
    validate: str
    samples: tuple[int, int]
    batch: int
    measures: tuple[str, ...]
    removed: tuple[int, ...]
    keep: float = 0.75
    length: int = 256


SUBJECTS = {
    "cifar-vit": Subject(
        "cifar-vit", "cifar10/train.parquet", "cifar10/test.parquet", (256, 500), 32,
        ("kl", "accuracy"), (3,),
    ),
    "dinov2": Subject(
        "dinov2-vits14-grocery", "grocery/train", "grocery/test", (64, 140), 8, ("kl", "accuracy"),
        (3,),
    ),
    "smollm2": Subject(
        "smollm2-135m-instruct", "wikitext-2/validation.parquet", "wikitext-2/test.parquet", (128, 16), 4,
        ("kl", "perplexity"), (6, 12),
    ),
}  # fmt: skip


def main(names: list[str]) -> int:
    """Measure these models, or all; `model:layers` and `model:factors` measure one half."""
    jobs = {}
    for name in names or SUBJECTS:
        model, _, half = name.partition(":")
        jobs[name] = partial(measured, SUBJECTS[model], half)
    return fill(TABLE, HEAD, jobs)


def measured(subject: Subject, half: str) -> Iterator[list[list[str]]]:
    """The rows of a model, one contender after the other."""
    from compress.data import batches
    from compress.quick import quick_products
    from compress.source import open_source
    from compress.transforms.heads.drop_attention import DropAttention
    from compress.transforms.heads.factorize import Factorize
    from compress.validate import measure

    folder = ROOT / "models" / subject.model
    if not folder.exists():
        raise Missing(f"scripts/fetch {subject.model}")
    source = open_source(str(folder), dtype="float32")
    options = {"length": subject.length, "batch": subject.batch}
    seen, held = (
        batches(str(ROOT / "models" / data), source, samples=samples, seed=seed, **options)
        for data, samples, seed in zip((subject.calibrate, subject.validate), subject.samples, (0, None), strict=True)
    )
    jobs = [(f"{subject.keep:.0%} of the heads' width", Factorize, {"keep": subject.keep}, FACTORING)]
    jobs += [(f"{count} layers less", DropAttention, {"remove": count}, DROPPING) for count in subject.removed]
    jobs = [job for job in jobs if half in ("", "factors" if job[1] is Factorize else "layers")]
    names = list(subject.measures)
    with quick_products():  # for all alike, and no less exact
        before = measure(names, source.model, source.model, held) | other(source.model, source.model, held)
        for what, method, setting, contenders in jobs:
            for label, more in contenders.items():
                model, started = deepcopy(source.model), time.process_time()
                carry_out(model, method(**setting, **more), seen)
                cost = f"{time.process_time() - started:.0f}"
                after = measure(names, model, source.model, held) | other(model, source.model, held)
                yield [
                    [subject.model, what, label, kind, told(before[kind]), told(after[kind]), cost] for kind in after
                ]


def carry_out(model: nn.Module, method, seen: list[dict]) -> None:
    """Plan, calibrate and apply a method."""
    from compress.view import View

    plan = method.plan(View(model))
    if method.needs_data:
        plan = method.calibrate(View(model), plan, seen)
    method.apply(View(model), plan)
    print(plan.edits, flush=True)


@torch.no_grad()
def other(model: nn.Module, original: nn.Module, held: list[dict]) -> dict[str, float]:
    """Bytes of the cache for a token, of a model that has one; of others the relative error of the answers."""
    from compress.outputs import relative_error, run

    if not getattr(model, "can_generate", lambda: False)():
        pairs = [[run(each, batch) for batch in held] for each in (model, original)]
        return {"relative error": relative_error(*map(torch.cat, pairs))}
    ids = torch.arange(16)[None]
    layers = [layer for layer in model(ids, use_cache=True).past_key_values.layers if layer.is_initialized]
    return {"cache bytes a token": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / ids.numel()}


def told(value: float) -> str:
    """A figure for the table."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4f}"
