"""What a compressed model is worth: its answers against the original's and the labels, its size and its speed.

A model can only be measured by what it answers with: token logits by perplexity, kl and top1; class logits by accuracy,
kl and top1; features by cosine and relative_error; a denoiser by relative_error and psnr.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.checkpoint import model_folders, weight_files
from compress.compare import COMPARE, Batch, Sum, psnr
from compress.data import placed
from compress.emit import tensor_bytes, weight_count
from compress.errors import CompressError
from compress.example import example
from compress.flops import count, memory
from compress.metrics import METRICS
from compress.outputs import answer, inputs
from compress.trajectory import sampling

Sampler = Callable[[nn.Module], Tensor]

ORIGINAL, COMPRESSED, CAST = "original", "compressed", "original, bfloat16"
HOPELESS = 4  # times the original's time: a type that the processor emulates
PHYSICAL = ("size", "memory", "flops", "parameters")
FITTING = {  # what a model answers with: what can be measured on it
    "next tokens": ("perplexity", "kl", "top1"),
    "tokens": ("kl", "top1"),
    "classes": ("accuracy", "kl", "top1"),
    "features": ("cosine", "relative_error"),
    "denoised samples": ("relative_error", "psnr"),
}


def measure(
    names: list[str],
    model: nn.Module,
    original: nn.Module,
    batches: list[Batch],
    *,
    folder: Path | None = None,
    sampler: Sampler | None = None,
) -> dict[str, float]:
    """Measure a model by these names; `original` is the model that its answers are compared with.

    `folder` holds the written model (without it, size is that of the tensors in memory) and `sampler` runs a whole
    sampling with a denoiser for psnr. Latency is not measured here: only a comparison means something, see `latency`.
    """
    assert "latency" not in names
    check(names, original, batches, sampler)
    found = answers([name for name in names if name in COMPARE], model, original, batches)
    if "psnr" in names:
        assert sampler is not None
        reference = sampler(original)
        found["psnr"] = psnr(reference if model is original else sampler(model), reference)
    if "size" in names:
        found["size"] = tensor_bytes(model) if folder is None else weight_bytes(folder)
    if "memory" in names:
        found["memory"] = memory(model, batches[0] if batches else example(original))
    if "flops" in names:
        turns = sampling(batches) or [example(original)]
        found["flops"] = sum(count(model, batch) for batch in turns) / len(turns)
    if "parameters" in names:
        found["parameters"] = weight_count(model)
    return {name: float(found[name]) for name in names}


def check(names: list[str], model: nn.Module, batches: list[Batch], sampler: Sampler | None = None) -> None:
    """Refuse a measure of answers that does not fit what the model answers with."""
    wanted = [name for name in names if name not in (*PHYSICAL, "latency")]
    words, fitting = fits(model, batches, sampler) if wanted else ("", ())
    for name in wanted:
        if name not in fitting:
            raise CompressError(
                f"validate: {name} ({METRICS[name].what}) cannot be measured here, where {words}; "
                f"what fits: {', '.join((*fitting, *PHYSICAL, 'latency'))}"
            )


def answers(names: list[str], model: nn.Module, original: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """The measures of answers, in one pass over the batches; the original runs only where it is needed."""
    sums = dict.fromkeys(names, Sum())
    alone = set(names) <= {"perplexity", "accuracy"}
    for batch in batches if names else []:
        with torch.inference_mode():
            output = answer(model(**inputs(batch)))
            reference = output if alone or model is original else answer(original(**inputs(batch)))
            for name in names:
                sums[name] += COMPARE[name](output, reference, batch)
    found = {name: value.mean for name, value in sums.items()}
    if "perplexity" in found:
        found["perplexity"] = math.exp(found["perplexity"]) if found["perplexity"] < 700 else math.inf
    return found


def fits(model: nn.Module, batches: list[Batch], sampler: Sampler | None = None) -> tuple[str, tuple[str, ...]]:
    """What the model answers with, in words, and the measures of answers that fit it."""
    if not batches:
        return "no samples are given", ()
    with torch.inference_mode():
        output = model(**inputs(batches[0]))
    kind = _kind(model, output, batches[0])
    names = [name for name in FITTING[kind] if name != "psnr" or sampler is not None]
    words = f"the model answers with {kind}"
    if kind == "classes" and "labels" not in batches[0]:
        names.remove("accuracy")
        words += " and the samples have no labels"
    if kind == "denoised samples" and sampler is None:
        words += " and no whole sampling can be run"
    return words, tuple(names)


def default_metrics(model: nn.Module, batches: list[Batch], sampler: Sampler | None = None) -> tuple[str, ...]:
    """What to measure where the recipe does not say: all that fits."""
    return (*fits(model, batches, sampler)[1], *PHYSICAL, "latency")


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model or of all parts of its pipeline; variants (model.fp16) do not count."""
    return sum(path.stat().st_size for part in model_folders(folder) for path in weight_files(part))


def _kind(model: nn.Module, output, batch: Batch) -> str:
    if isinstance(output, Mapping) and "logits" in output:
        if output["logits"].ndim == 3 and ("input_ids" in batch or "decoder_input_ids" in batch):
            generates = getattr(model, "can_generate", None)
            return "next tokens" if generates and generates() else "tokens"
        return "classes"
    if isinstance(output, Mapping) and "logits_per_image" in output:
        return "classes"
    return "denoised samples" if "timestep" in batch else "features"


def latency(
    compressed: nn.Module, original: nn.Module, batches: list[Batch], *, rounds: int = 9
) -> tuple[dict[str, tuple[float, float]], str]:
    """Milliseconds of a forward, median and interquartile range, of all candidates; and the fastest one without us.

    A turn is one forward on the first batch; for a denoiser it is the mean over a whole sampling, since a model may
    share work between steps. The candidates take turns in every round, so that a busy machine disturbs all of them
    alike; three turns of each warm it up. Wall-clock time, with the threads as they are set. A candidate that cannot
    run here is left out, as is a stock path whose type this processor only emulates.
    """
    assert rounds >= 7
    calls, warm = {}, {}
    for name, model in candidates(compressed, original).items():
        call = _call(model, sampling(batches))
        try:
            call()
            warm[name] = min(call(), call())
        except RuntimeError:  # an operation has no bfloat16 here
            if name in (ORIGINAL, COMPRESSED):
                raise
        else:
            if name in (COMPRESSED, ORIGINAL) or warm[name] <= HOPELESS * warm[ORIGINAL]:
                calls[name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(calls[name]())
    found = {name: _summary(values) for name, values in times.items()}
    return found, min((name for name in found if name != COMPRESSED), key=lambda name: found[name][0])


def candidates(compressed: nn.Module, original: nn.Module) -> dict[str, nn.Module]:
    """What is compared; a path without us that a user gets for nothing is the one to beat."""
    found = {COMPRESSED: compressed, ORIGINAL: original}
    if castable(original):
        found[CAST] = copy.deepcopy(original).to(torch.bfloat16)
    return found


def castable(model: nn.Module) -> bool:
    """Is it one that a user would cast to bfloat16?"""
    return any(tensor.dtype == torch.float32 for tensor in model.parameters())


def _call(model: nn.Module, batches: list[Batch]) -> Callable[[], float]:
    """A function that runs a forward on every batch and returns the mean milliseconds of one."""
    arguments = [placed(model, inputs(batch)) for batch in batches]
    device = next(model.parameters()).device

    @torch.inference_mode()
    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for argument in arguments:
            model(**argument)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - started) / len(arguments)

    return run


def _summary(values: list[float]) -> tuple[float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, high - low
