"""What fewer heads cost in answers: plain cuts, Torch-Pruning, FLAP, Michel and K-FAC's scores against heads.prune."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from benches.paired import Missing, paired
from benches.piqa import piqa
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
    goals: int = 0  # of PIQA


SUBJECTS = {
    "minilm": Subject(
        "all-minilm-l6-v2", "sts-b/train.txt", "sts-b/test.txt", (1024, 512), 32, ("cosine",), (14, 29), length=128
    ),
    "smollm2": Subject(
        "smollm2-135m-instruct", "wikitext-2/validation.parquet", "wikitext-2/test.parquet", (32, 8), 4,
        ("kl", "perplexity"), (11, 22), goals=1000,
    ),
    "dinov2": Subject(
        "dinov2-vits14-grocery", "grocery/train", "grocery/test", (64, 560), 16, ("kl", "accuracy"), (9, 18)
    ),
}  # fmt: skip


def main(names: list[str]) -> int:
    """Measure these models, or all; `model:removed` measures one count of heads, `model:times` the time they save."""
    jobs = {}
    for name in names or [*SUBJECTS, *(f"{model}:times" for model in SUBJECTS)]:
        model, _, what = name.partition(":")
        subject = SUBJECTS[model]
        jobs[name] = partial(measured, replace(subject, removed=(int(what),)) if what.isdigit() else subject)
        if what == "times":
            jobs[name] = partial(timed, subject)
    return fill(TABLE, HEAD, jobs)


@torch.no_grad()
def timed(subject: Subject) -> Iterator[list[list[str]]]:
    """A quarter and half of the heads less, by their weights: operations and processor time against the original's."""
    from compress.flops import count
    from compress.source import open_source
    from compress.transforms.heads.prune import Prune
    from compress.view import View

    model = open_source(str(ROOT / "models" / subject.model), dtype="float32").model
    for keep in (0.75, 0.5):
        view, method = View(deepcopy(model)), Prune(keep=keep, score="magnitude", repair=False)
        method.apply(view, method.plan(view))
        for label, batch in sizes(model).items():
            share = count(view.model, batch) / count(model, batch)
            calls = {"original": partial(model, **batch), "pruned": partial(view.model, **batch)}
            started = time.process_time()
            calls["original"]()
            rounds = 25 if time.process_time() - started < 1 else 7  # what is quick is disturbed more
            times = paired(calls, rounds, 6.0)
            ratio, removed = times["pruned"].ratio, f"{1 - keep:.0%} of the heads"
            told = {"operations": share, "time": ratio, "time saved by operations saved": (1 - ratio) / (1 - share)}
            yield [
                [subject.model, removed, "magnitude", f"{kind}, {label}", "1", f"{value:.3f}", ""]
                for kind, value in told.items()
            ]


def sizes(model: nn.Module) -> dict[str, dict]:
    """Batches of 1 and 32, and of a decoder a long context."""
    from compress.example import example

    one = {key: value[:1] for key, value in example(model).items()}
    if "input_ids" not in one:
        pixels = one["pixel_values"][..., :224, :224]  # as processors cut them
        return {f"batch {number}": {"pixel_values": pixels.expand(number, -1, -1, -1)} for number in (1, 32)}
    chance, words = torch.Generator().manual_seed(0), model.config.vocab_size
    shapes = {"batch 1": (1, 128), "batch 32": (32, 128)}
    if getattr(model, "can_generate", lambda: False)():
        shapes = {"batch 1": (1, 512), "batch 1, 2048 tokens": (1, 2048)}
    return {label: {"input_ids": torch.randint(words, shape, generator=chance)} for label, shape in shapes.items()}


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

    def results(model: nn.Module) -> dict[str, float]:
        tasks = {"piqa": piqa(model, source.processor, subject.goals)} if subject.goals else {}
        return measure(list(subject.measures), model, source.model, held) | tasks

    with quick_products():  # for all alike, and no less exact
        before = results(source.model)
        for removed in subject.removed:
            for label, prune in CONTENDERS.items():
                model, started = deepcopy(source.model), time.process_time()
                if (total := prune(model, removed, seen)) is None:
                    continue
                cost = f"{time.process_time() - started:.0f}"
                after = results(model)
                told = [[kind, f"{before[kind]:.4f}", f"{after[kind]:.4f}"] for kind in after]
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


@torch.enable_grad()
def torch_pruning(model: nn.Module, removed: int, seen: list[dict]) -> int | None:
    """Torch-Pruning by its Taylor importance, all heads in one ranking; of grouped queries it takes query heads."""
    try:
        import torch_pruning as tp
    except ImportError:
        print("Torch-Pruning is left out: pip install --no-deps torch-pruning")
        return None
    from compress.outputs import answer, inputs
    from compress.view import View

    view, total = View(model), sum(part.count for part in parts_of(model))
    attentions, heads = view.attentions(), {}
    for at in attentions:
        heads |= {view.module(at.q): at.heads, view.module(at.k): at.kv_heads, view.module(at.v): at.kv_heads}
    between = {view.module(path) for at in attentions for path in (at.q, at.k, at.v, at.o)}
    others = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer not in between]
    example = {key: value[:1, :16] if value.dim() == 2 else value[:1] for key, value in inputs(seen[0]).items()}
    model.requires_grad_(True)
    pruner = tp.pruner.BasePruner(
        model, example, tp.importance.GroupTaylorImportance(), global_pruning=True, pruning_ratio=removed / total,
        head_pruning_ratio=removed / total, num_heads=heads, prune_num_heads=True, prune_head_dims=False,
        ignored_layers=others, output_transform=lambda output: answer(output).sum(),
    )  # fmt: skip
    for batch in seen[:4]:
        logits = answer(model(**inputs(batch)))
        if logits.dim() == 3:
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()).backward()
        else:
            nn.functional.cross_entropy(logits, logits.argmax(-1)).backward()
    for group in pruner.step(interactive=True):
        group.prune()
    model.requires_grad_(False)
    for at in attentions:  # what the library leaves to its user
        module, left = view.module(at.path), view.module(at.q).out_features // at.head_dim
        for name in {"num_heads", "num_attention_heads"} & set(vars(module)):
            setattr(module, name, left)
        if at.heads != at.kv_heads:
            module.num_key_value_groups = left // (view.module(at.k).out_features // at.head_dim)
    return total


CONTENDERS = {
    "magnitude, nothing repaired": product(score="magnitude", repair=False),
    "Torch-Pruning (Taylor)": torch_pruning,
    "FLAP": flap,
    "Michel": michel,
    "K-FAC energy once, repaired": product(score="energy", rounds=1),
    "heads.prune": product(),
    "heads.prune, distill 60": product(score="energy", distill=60),
}
