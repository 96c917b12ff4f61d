"""What surgery and repair left wrong, trained away: a model learns from what it was before, and decoders from text too.

Unlike `teaching`, no answer is kept: those of decoders are larger than their models. The unchanged model is asked again
at every step.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data import rows as examples_in
from compress.distill import train
from compress.errors import CompressError
from compress.mixing import apart
from compress.outputs import answer, inputs
from compress.probing import is_logits
from compress.quick import quick_products
from compress.scoring import some
from compress.teaching import distance, unpadded
from compress.view import View

RATE = 3e-4  # of each weight's own size
TEXT = 0.2  # weight of the tokens that really follow, beside what the unchanged model expects
LESSON, JUDGE = 2**10, 2**12  # tokens of one step, and to judge by


@quick_products()
def relearn(view: View, original: nn.Module, batches: list[dict], steps: int) -> str:
    """Train the blocks to answer as the original does; what is zero stays zero. What came of it, in words.

    All but the view's model is turned to float32, since small steps vanish in bfloat16. It is undone where the loss on
    batches held out did not fall.
    """
    student, teacher = deepcopy(view.model).float(), original.float()
    wide = [{name: x.float() if x.is_floating_point() else x for name, x in batch.items()} for batch in batches]
    seen, held = apart(wide)
    judged = lessons(some(held, JUDGE))
    before = lost(student, teacher, judged)
    student.requires_grad_(False)
    found = (weight for block in view.blocks() for weight in student.get_submodule(block.path).parameters())
    weights = list(dict.fromkeys(weight for weight in found if weight.is_floating_point()))
    if not weights:
        raise CompressError("distill: the model has no blocks whose weights could be trained")
    for weight in weights:
        if (weight == 0).any():
            weight.requires_grad_().register_hook((weight != 0).mul)
    train(weights, lessons(seen), lambda batch, done: loss(student, teacher, batch), steps, RATE, view.trainings)
    after = lost(student, teacher, judged)
    if after < before:
        learned = dict(student.named_parameters())
        for name, parameter in view.model.named_parameters():
            parameter.data.copy_(learned[name])
    kept = "" if after < before else ", undone"
    return f"{steps} steps of distillation: loss on held-out data {before:.3g} -> {after:.3g}{kept}"


@torch.no_grad()
def lost(student: nn.Module, teacher: nn.Module, batches: list[dict]) -> float:
    """The mean loss of some lessons."""
    return sum(loss(student, teacher, batch).item() for batch in batches) / len(batches)


def loss(student: nn.Module, teacher: nn.Module, batch: dict) -> Tensor:
    """How far the answers are from the teacher's; of a decoder also how little it expects the tokens that follow."""
    with torch.no_grad():
        wanted = answer(teacher(**inputs(batch)))
    output = student(**inputs(batch))
    mask = batch.get("attention_mask")
    got, wanted = unpadded(answer(output), mask), unpadded(wanted, mask)
    if not is_logits(output):
        return distance(got, wanted)
    mine, theirs = (each.float().log_softmax(-1).flatten(0, -2) for each in (got, wanted))
    apart = F.kl_div(mine, theirs, log_target=True, reduction="batchmean")
    if not writes(student):
        return apart
    return (1 - TEXT) * apart + TEXT * surprise(answer(output), batch)


def writes(model: nn.Module) -> bool:
    """Does it foretell the next token of its input? Decoders do; of those with an encoder the input is another."""
    generates = getattr(model, "can_generate", None)
    return bool(generates and generates()) and not model.config.is_encoder_decoder


def surprise(logits: Tensor, batch: dict) -> Tensor:
    """Cross-entropy of the tokens that follow, without padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    following = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), following[:, 1:].flatten())


def lessons(batches: list[dict]) -> list[dict]:
    """The batches in parts of so many tokens, at least an example each."""
    found = []
    for batch in batches:
        ids, count = batch.get("input_ids"), examples_in(batch)
        rows = count if ids is None else max(1, LESSON * count // ids.numel())
        found += [{key: value[at : at + rows] for key, value in batch.items()} for at in range(0, count, rows)]
    return found
