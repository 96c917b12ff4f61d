"""A model's answers against the original's and the labels, one batch at a time, as sums over tokens or examples.

Nothing depends on how the samples are batched, and no logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import CompressError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sum:
    """A sum of a measure with the number of tokens or examples in it."""

    total: float = 0.0
    number: float = 0.0

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total, self.number + other.number)

    @property
    def mean(self) -> float:
        return self.total / self.number if self.number else math.nan


def loss(output: Tensor, reference: Tensor, batch: Batch) -> Sum:
    """Cross-entropy to the next token, in nats; padding and labels of -100 do not count."""
    ids = batch["labels"] if "labels" in batch else batch[_ids(batch)]
    known = real(output, batch)
    counts = known[:, 1:] & known[:, :-1] & (ids[:, 1:] != -100)
    rows = zip(output[:, :-1], ids[:, 1:], counts, strict=True)
    total = sum(F.cross_entropy(_exact(row[keep]), target[keep], reduction="sum").item() for row, target, keep in rows)
    return Sum(total, counts.sum().item())


def divergence(output: Tensor, reference: Tensor, batch: Batch) -> Sum:
    """KL(original || compressed) of the predictions, in nats."""
    total, number = 0.0, 0
    for mine, theirs in _rows(output, reference, batch):
        mine, theirs = _exact(mine).log_softmax(-1), _exact(theirs).log_softmax(-1)
        total += F.kl_div(mine, theirs, reduction="sum", log_target=True).item()
        number += len(mine)
    return Sum(total, number)


def agreement(output: Tensor, reference: Tensor, batch: Batch) -> Sum:
    """How often the first choice is the original's."""
    total, number = 0, 0
    for mine, theirs in _rows(output, reference, batch):
        total += (mine.argmax(-1) == theirs.argmax(-1)).sum().item()
        number += len(mine)
    return Sum(total, number)


def correct(output: Tensor, reference: Tensor, batch: Batch) -> Sum:
    """How often the first choice is the label."""
    hits = output.argmax(1) == batch["labels"]
    return Sum(hits.sum().item(), hits.numel())


def similarity(output: Tensor, reference: Tensor, batch: Batch) -> Sum:
    """Cosine of each example's embedding with the original's; token features are averaged over the real tokens."""
    cosines = F.cosine_similarity(_pooled(output, batch), _pooled(reference, batch), -1)
    return Sum(cosines.sum().item(), len(cosines))


def deviation(output: Tensor, reference: Tensor, batch: Batch) -> Sum:
    """|compressed - original| / |original| of each example, in the Euclidean norm; padding does not count."""
    _same_shape(output, reference)
    if output.ndim == 3 and "attention_mask" in batch:
        known = real(output, batch).unsqueeze(-1)
        output, reference = output * known, reference * known
    output, reference = _exact(output).flatten(1), _exact(reference).flatten(1)
    tiny = torch.finfo(reference.dtype).tiny
    errors = (output - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(tiny)
    return Sum(errors.sum().item(), len(errors))


COMPARE: dict[str, Callable[[Tensor, Tensor, Batch], Sum]] = {
    "perplexity": loss,
    "kl": divergence,
    "top1": agreement,
    "accuracy": correct,
    "cosine": similarity,
    "relative_error": deviation,
}


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over the images of 10 log10(peak² / mean squared error) in dB; the peak is the reference image's range.

    100 dB stands for equal: float32 can hardly tell more.
    """
    _same_shape(images, reference)
    images, reference = images.double().flatten(1), reference.double().flatten(1)
    peak = reference.amax(1) - reference.amin(1)
    noise = (images - reference).square().mean(1)
    return (10 * (peak.square() / noise.clamp_min(1e-300)).log10()).clamp(max=100).mean().item()


def real(output: Tensor, batch: Batch) -> Tensor:
    """Which tokens of an output [batch, tokens, ...] are none of padding."""
    for name in ("decoder_attention_mask", "attention_mask"):
        if name in batch and batch[name].shape == output.shape[:2]:
            return batch[name].bool()
    return torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)


def _ids(batch: Batch) -> str:
    return "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"


def _rows(output: Tensor, reference: Tensor, batch: Batch):
    """Pairs of predictions [tokens, choices] without padding: one sequence at a time, or all examples at once."""
    _same_shape(output, reference)
    if output.ndim == 2:
        yield output, reference
    elif output.ndim == 3:
        for mine, theirs, known in zip(output, reference, real(output, batch), strict=True):
            yield mine[known], theirs[known]
    else:  # dense predictions [batch, classes, height, width]
        for mine, theirs in zip(output, reference, strict=True):
            yield mine.flatten(1).T, theirs.flatten(1).T


def _pooled(output: Tensor, batch: Batch) -> Tensor:
    """One embedding per example."""
    output = _exact(output)
    if output.ndim == 2:
        return output
    if output.ndim > 3:
        return output.flatten(2).mean(2)
    known = real(output, batch).unsqueeze(-1).to(output.dtype)
    return (output * known).sum(1) / known.sum(1)


def _exact(value: Tensor) -> Tensor:
    """At least float32."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _same_shape(output: Tensor, reference: Tensor) -> None:
    if output.shape != reference.shape:
        shapes = f"{list(output.shape)}, the original's {list(reference.shape)}"
        raise CompressError(f"validate: the compressed model answers {shapes}; they must be the same to be compared")
