"""What can be measured, by name: plain data without torch, so that a recipe can be checked without loading anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TASK = "lm_eval."  # begins the name of a task of the lm-evaluation-harness
RELATIVE = ("kl", "relative_error")  # 0 for the original, so that no ratio to it can be a limit
TASKS = r"lm_eval\.\w[\w./+-]*"


@dataclass(frozen=True)
class Metric:
    """One measure of a model: its unit, which direction is good, and what it says."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    what: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "", "lower", "exponential of the mean loss per token"),
        Metric("kl", "nats", "lower", "mean Kullback-Leibler divergence of the original's predictions from ours"),
        Metric("top1", "share", "higher", "share of predictions whose first choice is the original's"),
        Metric("accuracy", "share", "higher", "share of labels that the first choice hits"),
        Metric("cosine", "", "higher", "mean cosine between our embeddings and the original's"),
        Metric("relative_error", "", "lower", "norm of the change of the output over the norm of the output"),
        Metric("psnr", "dB", "higher", "peak signal-to-noise ratio of final latents or images to the original's"),
        Metric("latency", "ms", "lower", "median time of a warm forward pass (of a denoiser: mean over a sampling)"),
        Metric("size", "bytes", "lower", "bytes of the weight files"),
        Metric("memory", "bytes", "lower", "weights and the most that one forward pass holds beside them"),
        Metric("flops", "FLOPs", "lower", "operations of a forward pass (of a denoiser: mean over a sampling)"),
        Metric("parameters", "parameters", "lower", "number of weights"),
    )
}


def metric(name: str) -> Metric:
    """The metric of this name; a task of the harness is one by its accuracy."""
    if name.startswith(TASK):
        return Metric(name, "", "higher", f"task {name.removeprefix(TASK)} of the lm-evaluation-harness")
    return METRICS[name]
