"""What fewer tokens cost in answers and save in time: ToMe, PiToMe, EViT and pooling against tokens.merge searching."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from benches.paired import Missing, load, paired
from benches.tables import ROOT, fill
from torch import nn

HEAD = ["model", "operations asked", "by", "measure", "kept", "original", "reduced", "time at 1", "time at 32", "load"]
TABLE = ROOT / "recipes" / "tokens.csv"
TOKENS = 64  # of a text


@dataclass(frozen=True)
class Subject:
    """A model, unlabelled data to choose by, data to measure on, and the parts of its operations that stay."""

    model: str
    calibrate: tuple[str, int]
    validate: tuple[str, int]
    measures: tuple[str, ...]
    shares: tuple[float, ...]


SUBJECTS = {
    "minilm": Subject(
        "all-minilm-l6-v2", ("wikitext-2/validation.parquet", 256), ("wikitext-2/test.parquet", 128), ("cosine",),
        (0.8, 0.65),
    ),
    "cifar-vit": Subject(
        "cifar-vit", ("cifar10/train.parquet", 512), ("cifar10/test.parquet", 1000), ("kl", "accuracy"),
        (0.75, 0.6, 0.45),
    ),
    "dinov2": Subject(
        "dinov2-vits14-grocery", ("grocery/train", 512), ("grocery/test", 1322), ("kl", "accuracy"), (0.75, 0.6, 0.45)
    ),
}  # fmt: skip


RATIOS = (0.25, 0.5)  # of the tokens of a denoiser's attentions
AROUND = {  # tomesd takes the first tokens of its cells by chance, which on the digits is no better nor worse
    "tomesd's rule": {"similarity": "cosine", "proportional": False},
    "tokens.merge_unmerge, reach 1": {"reach": 1},
    "tokens.merge_unmerge": {},
}


def main(names: list[str]) -> int:
    """Measure these models, or all."""
    jobs = {name: partial(measured, subject) for name, subject in SUBJECTS.items()} | {"digits-dit": denoiser}
    return fill(TABLE, HEAD, {name: jobs[name] for name in names or jobs})


def denoiser() -> Iterator[list[list[str]]]:
    """Merges around the attentions of a small diffusion transformer, along its recorded sampling."""
    from compress.data import batches
    from compress.flops import count
    from compress.source import open_source
    from compress.transforms.tokens.merge_unmerge import MergeUnmerge
    from compress.validate import measure

    folder = ROOT / "models" / "digits-dit"
    if not folder.exists():
        raise Missing("scripts/train-dit")
    source = open_source(str(folder), dtype="float32")
    held = batches(str(folder / "trajectory.safetensors"), source, samples=600, length=0, batch=32, seed=None)
    one, many = ({key: value[:number] for key, value in held[0].items()} for number in (1, 32))
    left = partial(kept, one=one, whole=count(source.model, one))
    for share in RATIOS:
        for label, options in AROUND.items():
            merged = applied(source.model, MergeUnmerge(ratio=share, **options), held)
            error = measure(["relative_error"], merged, source.model, held)["relative_error"]
            costs = [f"{ratio(source.model, merged, batch):.3f}" for batch in (one, many)] + [load()]
            cells = [f"{share:.2f} of the tokens", label, "relative_error", f"{left(merged):.3f}", "0", f"{error:.4f}"]
            yield [["digits-dit", *cells, *costs]]


def measured(subject: Subject) -> Iterator[list[list[str]]]:
    """The rows of a model, one contender after the other."""
    from compress.flops import count
    from compress.quick import quick_products
    from compress.source import open_source
    from compress.validate import measure

    folder = ROOT / "models" / subject.model
    if not folder.exists():
        raise Missing(f"scripts/fetch {subject.model}")
    source = open_source(str(folder), dtype="float32")
    seen, held = (rows_of(source, *data) for data in (subject.calibrate, subject.validate))
    model, names = source.model, list(subject.measures)
    one, many = ({key: value[:number] for key, value in held[0].items() if key != "labels"} for number in (1, 32))
    left = partial(kept, one=one, whole=count(model, one))
    with quick_products():  # for all alike, and no less exact
        before = measure(names, model, model, held)
    for share in subject.shares:
        for label, reduce in CONTENDERS.items():
            with quick_products():
                reduced = reduce(model, share, seen, left)
                after = reduced and measure(names, reduced, model, held)
            if reduced is None:
                print(f"{subject.model}: {label} cannot keep {share}")
                continue
            own = [subject.model, f"{share:.2f}", label]
            costs = [f"{ratio(model, reduced, batch):.3f}" for batch in (one, many)] + [load()]
            told = [[kind, f"{before[kind]:.4f}", f"{after[kind]:.4f}"] for kind in names]
            yield [[*own, cells[0], f"{left(reduced):.3f}", *cells[1:], *costs] for cells in told]


def rows_of(source, data: str, number: int) -> list[dict]:
    """Batches of 32 rows; texts only where they are as long as they may be, for a short one would lose all it has."""
    from compress.data import batches

    path = str(ROOT / "models" / data)
    found = batches(path, source, samples=5 * number, length=TOKENS, batch=32, seed=0)
    rows = [{key: value[at] for key, value in batch.items()} for batch in found for at in range(len(first(batch)))]
    rows = [row for row in rows if "attention_mask" not in row or row["attention_mask"].sum() == TOKENS][:number]
    parts = [rows[at : at + 32] for at in range(0, len(rows), 32)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def first(batch: dict) -> torch.Tensor:
    """Any of its tensors."""
    return next(iter(batch.values()))


def kept(model: nn.Module, one: dict, whole: int) -> float:
    """The part of the operations that is left."""
    from compress.flops import count

    return count(model, one) / whole


@torch.no_grad()
def ratio(model: nn.Module, reduced: nn.Module, batch: dict) -> float:
    """Processor time of the reduced model over the original's."""
    calls = {"stock": lambda: model(**batch), "reduced": lambda: reduced(**batch)}
    return paired(calls, rounds=7)["reduced"].ratio


def applied(model: nn.Module, method, seen: list[dict]) -> nn.Module:
    """A copy of the model with this method."""
    from compress.view import View

    view = View(deepcopy(model))
    plan = method.plan(view)
    asked = method.needs_data or method.uses_data
    method.apply(view, method.calibrate(view, plan, seen) if asked else plan)
    return view.model


def first_within(model: nn.Module, share: float, makers: Iterator[Callable], left: Callable) -> nn.Module | None:
    """The first of ever stronger reductions that keeps to the budget."""
    for make in makers:
        found = make()
        if left(found) <= share:
            return found
    return None


def constant(match: str) -> Callable:
    """The same count of tokens in every block, compared by keys: ToMe, and PiToMe by energy.

    Where a count misses the budget, the first blocks merge one token more, so that no operations are wasted.
    """
    from compress.transforms.tokens.merge import Merge
    from compress.view import View

    def reduce(model, share, seen, left):
        options = {"metric": "keys", "ward": 0.0, "match": match, "repair": False}
        blocks = len(Merge(**options).plan(View(model)).edits)

        def made(total: int) -> nn.Module:
            count, more = divmod(total, blocks)
            return applied(model, Merge(r=(count + 1,) * more + (count,) * (blocks - more), **options), seen)

        most = 64 * blocks
        total = bisect_left(range(most), True, key=lambda total: total > 0 and left(made(total)) <= share)
        return made(total) if total < most else None

    return reduce


def pooled(model, share, seen, left):
    """Two by two pooling after the latest block that is early enough, twice where once is not enough."""
    from compress.transforms.tokens.pool import Pool
    from compress.view import View

    last = len(View(model).blocks()) - 1
    places = [(at,) for at in reversed(range(last))] + [(at, at + 1) for at in reversed(range(last - 1))]
    if "pixel_values" not in seen[0]:
        return None
    return first_within(
        model, share, (partial(applied, model, Pool(blocks=place, repair=False), seen) for place in places), left
    )


def evit(model, share, seen, left):
    """EViT: by class attention at the quarters, the rest fused."""
    from compress.transforms.tokens.prune import Prune

    makers = (partial(applied, model, Prune(keep=step / 100, repair=False), seen) for step in range(96, 2, -2))
    return first_within(model, share, makers, left)


def packed(model, share, seen, left):
    """Each image with as many tokens as it needs, within the budget on average."""
    from compress.transforms.tokens.pack import Pack

    return applied(model, Pack(flops=share), seen) if "pixel_values" in seen[0] else None


def slimmed(model, share, seen, left):
    """Learned mixes of tokens, trained at the largest number that keeps to the budget."""
    from compress.transforms.tokens.slim import Slim

    if "pixel_values" not in seen[0]:
        return None
    shares = (step / 100 for step in range(96, 2, -2))
    keep = next((keep for keep in shares if left(applied(model, Slim(keep=keep, steps=1), seen[:1])) <= share), None)
    return keep and applied(model, Slim(keep=keep), seen)


def searched(model, share, seen, left):
    """Ours."""
    from compress.transforms.tokens.merge import Merge

    return applied(model, Merge(flops=share, importance="auto"), seen)


def after_exact(model, share, seen, left):
    """Ours before a last block that computes its class token only, where the model reads no other."""
    from compress.transforms.heads.exact import Exact
    from compress.transforms.tokens.merge import Merge
    from compress.view import View

    view = View(deepcopy(model))
    plan = Exact().plan(view)
    if not any("norm" in edit for edit in plan.edits.values()):
        return None
    Exact().apply(view, plan)
    return applied(view.model, Merge(flops=share / left(view.model)), seen)


CONTENDERS = {
    "ToMe": constant("bipartite"),
    "PiToMe": constant("energy"),
    "EViT": evit,
    "2x2 pooling": pooled,
    "tokens.pack": packed,
    "tokens.slim": slimmed,
    "tokens.merge, searched": searched,
    "heads.exact, tokens.merge": after_exact,
}
