"""What fewer heads cost in answers: plain cuts, FLAP, Michel's scores and K-FAC with repair against heads.prune."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from benches.paired import Missing
from benches.tables import ROOT, fill
from torch import Tensor, nn

HEAD = ["model", "heads removed", "by", "measure", "original", "pruned", "processor seconds"]
TABLE = ROOT / "recipes" / "heads" / "results.csv"


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated and measured on, and how many of its heads (or groups) go."""

    model: str
    calibrate: str
    validate: str
    samples: tuple[int, int]
    batch: int
    measures: tuple[str, ...]
    removed: tuple[int, ...]
    length: int = 512


SUBJECTS = {
    "minilm": Subject(
        "all-minilm-l6-v2", "sts-b/train.txt", "sts-b/test.txt", (1024, 512), 32, ("cosine",), (14, 29), length=128
    ),
    "smollm2": Subject(
        "smollm2-135m-instruct", "wikitext-2/validation.parquet", "wikitext-2/test.parquet", (32, 8), 4,
        ("kl", "perplexity"), (11, 22),
    ),
    "dinov2": Subject(
        "dinov2-vits14-grocery", "grocery/train", "grocery/test", (64, 140), 16, ("kl", "accuracy"), (9, 18)
    ),
}  # fmt: skip


def main(names: list[str]) -> int:
    """Measure these models, or all."""
    return fill(TABLE, HEAD, {name: partial(measured, SUBJECTS[name]) for name in names or SUBJECTS})


def measured(subject: Subject) -> Iterator[list[list[str]]]:
    """The rows of a model, one contender after the other."""
    from compress.data import batches
    from compress.quick import quick_products
    from compress.source import open_source
    from compress.validate import measure

    folder = ROOT / "models" / subject.model
    if not folder.exists():
        raise Missing(f"scripts/fetch {subject.model}")
    source = open_source(str(folder), dtype="float32")
    options = {"length": subject.length, "batch": subject.batch}
    seen, held = (
        batches(str(ROOT / "models" / data), source, samples=samples, seed=seed, **options)
        for data, samples, seed in zip((subject.calibrate, subject.validate), subject.samples, (0, None))
    )
    names = list(subject.measures)
    with quick_products():  # for all alike: what rounds products costs less than a ten thousandth of a nat
        before = measure(names, source.model, source.model, held)
        for removed in subject.removed:
            for label, prune in CONTENDERS.items():
                model, started = deepcopy(source.model), time.process_time()
                total = prune(model, removed, seen)
                cost = f"{time.process_time() - started:.0f}"
                after = measure(names, model, source.model, held)
                told = [[kind, f"{before[kind]:.4f}", f"{after[kind]:.4f}"] for kind in names]
                yield [[subject.model, f"{removed} of {total}", label, *cells, cost] for cells in told]


def product(**options) -> Callable[[nn.Module, int, list[dict]], int]:
    """heads.prune with these options."""

    def prune(model: nn.Module, removed: int, seen: list[dict]) -> int:
        from compress.transforms.heads.prune import Prune
        from compress.view import View

        view, total = View(model), sum(part.count for part in parts_of(model))
        method = Prune(keep=1 - removed / total, **options)
        plan = method.calibrate(view, method.plan(view), seen)
        method.apply(view, plan)
        print(*plan.notes["remarks"], sep="\n", flush=True)
        return total

    return prune


def parts_of(model: nn.Module):
    """The attentions with their heads or groups."""
    from compress.parts import heads_of
    from compress.view import View

    return [heads_of(attention, "group") for attention in View(model).attentions()]


def lowest(scores: list[Tensor], removed: int) -> list[list[int]]:
    """The units of every part that stay when the lowest scores of all go, but never all of a part."""
    kept = [{int(score.argmax())} for score in scores]
    ranked = sorted(
        ((float(s), at, unit) for at, score in enumerate(scores) for unit, s in enumerate(score)), reverse=True
    )
    for _, at, unit in ranked:
        if sum(map(len, kept)) < sum(map(len, scores)) - removed:
            kept[at].add(unit)
    return [sorted(units) for units in kept]


def michel(model: nn.Module, removed: int, seen: list[dict]) -> int:
    """Gradients of gates, normalised by layer as in the paper's code; nothing is repaired."""
    from compress.scoring import find
    from compress.view import View

    parts = parts_of(model)
    scores = find("taylor")(View(model), parts, seen).alone.split([part.count for part in parts])
    kept = lowest([score / score.norm() for score in scores], removed)
    for part, units in zip(parts, kept, strict=True):
        View(model).keep_heads(part.owner, units)
    return sum(part.count for part in parts)


@torch.no_grad()
def flap(model: nn.Module, removed: int, seen: list[dict]) -> int:
    """FLAP as in its code: squared fluctuation by channel, standardised by layer; means of what goes become biases."""
    from compress.scoring import flowing
    from compress.view import View

    view, parts = View(model), parts_of(model)
    paths = [part.outputs[0] for part in parts]
    sums = {path: [0.0, 0.0, 0] for path in paths}
    for path, x in flowing(view, paths, seen):
        x, own = x.double(), sums[path]
        sums[path] = [own[0] + x.sum(0), own[1] + x.square().sum(0), own[2] + len(x)]
    means, scores = {}, []
    for part, path in zip(parts, paths, strict=True):
        first, second, count = sums[path]
        means[path] = first / count
        metric = ((second / count - means[path].square()) * view.module(path).weight.double().square().sum(0)).square()
        metric = (metric - metric.mean()) / metric.std()
        scores.append(part.fold(metric) / part.fold(torch.ones_like(metric)))
    for part, path, units in zip(parts, paths, lowest(scores, removed), strict=True):
        module = view.module(path)
        lost = module.weight @ torch.where(part.stays(view, path, units), 0, means[path]).to(module.weight.dtype)
        module.bias = nn.Parameter(lost if module.bias is None else module.bias + lost)
        view.keep_heads(part.owner, units)
    return sum(part.count for part in parts)


CONTENDERS = {
    "magnitude, nothing repaired": product(score="magnitude", repair=False),
    "FLAP": flap,
    "Michel": michel,
    "K-FAC energy once, repaired": product(score="energy", rounds=1),
    "heads.prune": product(),
}
