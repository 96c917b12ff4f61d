"""What a model answers: its main output tensor, a label-free objective on it, and how far two answers are apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import CompressError

# In the order in which a user reads them; `sample` is the denoiser's output in diffusers.
MAIN = ("logits", "logits_per_image", "sample", "image_embeds", "last_hidden_state", "pooler_output")


def answer(output) -> Tensor:
    """The tensor a user of the model reads: logits, the denoiser's sample, embeddings or hidden states."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in MAIN:
            if isinstance(output.get(name), Tensor):
                return output[name]
        output = tuple(output.values())
    first = next((value for value in output if isinstance(value, Tensor)), None)
    if first is None:
        raise CompressError(f"the model's output is {type(output).__name__} without a tensor; it must hold one")
    return first


def inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The forward arguments of a batch, without the labels that only metrics read."""
    return {name: value for name, value in batch.items() if name != "labels"}


def run(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's main output on one batch."""
    return answer(model(**inputs(batch)))


def objective(output, generator: torch.Generator) -> Tensor:
    """A label-free loss of a model's output whose squared gradient is the Fisher information.

    Logits: cross-entropy to labels drawn from the model's own distribution. Anything else: a random projection.
    """
    main = answer(output)
    if not main.isfinite().all():
        raise CompressError("the model's answers to the calibration data are not finite; they must be")
    if isinstance(output, Mapping) and output.get("logits") is main:
        flat = main.flatten(0, -2).float()
        labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
        return F.cross_entropy(flat, labels.to(flat.device), reduction="sum")
    direction = torch.randn(main.shape, generator=generator).to(main.device, main.dtype)
    return (main * direction).sum()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in the Euclidean norm."""
    reference = reference.double()
    return ((value - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
