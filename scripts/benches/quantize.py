"""Speed of W8A8 encoders against everything else that runs them here: processor time of one thread, in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from benches.ours import RECIPES, emitted, model_of
from benches.paired import Missing, load, paired
from benches.stock import Call, compiled, contenders, hidden
from benches.tables import show, update
from torch import nn

HEAD = ["model", "batch", "contender", "ms", "of fp32 eager", "spread", "relative error", "load"]
TABLE = RECIPES / "speed.csv"
SIZES = (1, 32)
TOKENS = 128
SUBJECTS = {  # recipe: (texts or photos to measure on, to calibrate the peers on)
    "minilm-w8a8": ("models/wikitext-2/test.parquet", "models/wikitext-2/validation.parquet"),
    "dinov2-w8a8": ("models/grocery/test", "models/grocery/train"),
}


def main(names: list[str]) -> int:
    """Measure these models, or all; what could not take part is told at the end."""
    torch.set_num_threads(1)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else what is called compiled would run eagerly
    skipped = []
    for name in names or SUBJECTS:
        rows, left = speed(name, *SUBJECTS[name])
        update(TABLE, HEAD, rows, keys=3)
        show(HEAD, rows)
        skipped += left
    for line in skipped:
        print(f"skipped: {line}")
    return 0


def speed(name: str, test: str, train: str) -> tuple[list[list[str]], list[str]]:
    """The rows of one model and what was skipped."""
    from compress.outputs import relative_error

    model, inputs, samples = subject(name, test, train)
    makers, folder = contenders(model.base_model, samples), None
    absent = []
    try:
        folder, _ = emitted(name)
    except Missing as reason:
        absent = [f"ours: {reason}"]
    if folder:
        makers["ours eager"] = lambda: hidden(loaded(type(model), folder))
        makers["ours compiled"] = lambda: compiled(loaded(type(model), folder))
    calls, skipped = ready(makers)
    rows = []
    for size in SIZES:
        part = {key: value[:size].contiguous() for key, value in inputs.items()}
        reference = calls["fp32 eager"](part)
        errors = {key: relative_error(call(part), reference) for key, call in calls.items()}
        turns = paired({key: lambda call=call, part=part: call(part) for key, call in calls.items()})
        for key, time in turns.items():
            cells = [f"{1000 * time.seconds:.1f}", f"{time.ratio:.3f}", f"{time.spread:.3f}", f"{errors[key]:.4f}"]
            rows.append([name.removesuffix("-w8a8"), str(size), key, *cells, load()])
    return rows, [f"{name}: {line}" for line in absent + skipped]


def ready(makers: dict[str, Callable[[], Call]]) -> tuple[dict[str, Call], list[str]]:
    """The contenders that are installed, and why others are not."""
    calls, skipped = {}, []
    for key, make in makers.items():
        try:
            calls[key] = make()
        except Missing as reason:
            skipped.append(f"{key}: {reason}")
    return calls, skipped


def subject(name: str, test: str, train: str):
    """The float32 model, 32 rows of real inputs, and samples for peers that calibrate."""
    from compress.data import batches
    from compress.source import open_source

    source = open_source(str(model_of(RECIPES / f"{name}.yaml")[0]), dtype="float32")
    options = {"length": TOKENS, "batch": 32, "seed": 0}
    inputs = full(batches(test, source, samples=400, **options), 32)
    samples = full(batches(train, source, samples=400, **options), 64)
    rows = [{key: value[at : at + 1] for key, value in samples.items()} for at in range(64)]
    return source.model, inputs, rows


def full(found: list[dict], number: int) -> dict:
    """The first rows without padding, all as long."""
    whole = [
        {key: value[row] for key, value in batch.items() if key != "labels"}
        for batch in found
        for row in range(len(next(iter(batch.values()))))
        if "attention_mask" not in batch
        or batch["attention_mask"].shape[1] == TOKENS
        and batch["attention_mask"][row].all()
    ]
    assert len(whole) >= number, f"only {len(whole)} texts are long enough"
    return {key: torch.stack([row[key] for row in whole[:number]]) for key in whole[0]}


def loaded(kind: type[nn.Module], folder: Path) -> nn.Module:
    """The encoder of an emitted checkpoint, by plain from_pretrained."""
    import compress  # noqa: F401  # from_pretrained knows our checkpoints by this

    return kind.from_pretrained(folder).eval().base_model
