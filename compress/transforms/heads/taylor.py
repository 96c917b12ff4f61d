"""Remove the attention heads that the output depends on least, by first-order Taylor scores without labels.

Every head's output is multiplied by a gate of one. The score is the mean over examples of |d loss / d gate|, where the
loss is the cross-entropy to labels drawn from the model's own predictions (a random projection where there are no
logits), so unlabelled text or images suffice. Scores of all layers are compared as they are: normalising them by
layer forces an even cut and loses accuracy.

Under grouped-query attention a whole group goes (key-value head and its query heads), scored jointly; `unit: query`
takes equally many query heads of every group instead, which is also what happens under multi-query attention.
`layout: uniform` keeps the same number in every layer, so that many models load natively.

When it hurts: first-order scores miss heads that stand in for each other, and nothing is repaired: beyond about a fifth
of the heads expect a visible loss. Small decoders with few key-value groups lose much with each group.

Paper: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.outputs import inputs, objective
from compress.selection import choose, edits, placeholder, prunable, unit_scores
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View


class Taylor(Transform):
    """Head pruning by label-free first-order scores."""

    needs_data: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"keep": 1.0}
    example: ClassVar[dict] = {"keep": 0.5}

    keep: float = Field(0.9, gt=0, le=1, description="share of the heads (key-value groups) that stays")
    layout: Literal["ragged", "uniform"] = Field("ragged", description="best heads overall, or equally many per layer")
    unit: Literal["group", "query"] = Field("group", description="remove key-value groups, or queries of every group")

    def plan(self, view: View) -> Plan:
        taken, refused = prunable(view, self)
        kept = choose(placeholder(taken, self.unit), self.keep, self.layout)
        return Plan(edits(taken, kept, self.unit), notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        if not plan.edits:
            return plan
        taken, _ = prunable(view, self)
        scores = head_scores(view, list(taken.values()), batches, lambda score, at: unit_scores(score, at, self.unit))
        kept = choose(scores, self.keep, self.layout)
        notes = plan.notes | {"importance": {path: score.sum().item() for path, score in scores.items()}}
        return Plan(edits(taken, kept, self.unit), notes=notes)

    def mask(self, view: View, plan: Plan) -> bool:
        for path, settings in plan.edits.items():
            view.mask_heads(view.attention(path), settings["groups"], settings["queries"])
        return True

    def apply(self, view: View, plan: Plan) -> None:
        for path, settings in plan.edits.items():
            view.keep_heads(view.attention(path), settings["groups"], settings["queries"])


def head_scores(
    view: View, attentions: list[Attention], batches: list[dict], fold: Callable[[Tensor, Attention], Tensor]
) -> dict[str, Tensor]:
    """Mean over examples of |d loss / d gate|, the signed gradients folded into units before the absolute value."""
    totals: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    examples = 0
    trainable = [parameter for parameter in view.model.parameters() if parameter.requires_grad]
    for parameter in trainable:  # only the gates need gradients
        parameter.requires_grad_(False)
    try:
        for batch in batches:
            for at, gradient in _gate_gradients(view, attentions, batch, generator):
                score = fold(gradient.float(), at).abs().sum(0).cpu()
                totals[at.path] = totals.get(at.path, 0) + score
            examples += len(next(iter(inputs(batch).values())))
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    if not all(score.isfinite().all() for score in totals.values()):
        raise CompressError("heads.taylor: the gradients are not finite; calibrate in float32 or bfloat16")
    unused = {at.path: torch.zeros_like(fold(torch.zeros(at.heads), at)) for at in attentions}
    return {path: score / examples for path, score in (unused | totals).items()}


def _gate_gradients(view: View, attentions: list[Attention], batch: dict, generator: torch.Generator):
    """Run one batch forward and backward; yields (attention, gradient [rows, heads]) of every gate that was passed."""
    gates: list[tuple[Attention, Tensor]] = []

    def gated(at: Attention) -> Callable:
        def hook(module: nn.Module, arguments: tuple) -> tuple:
            x = arguments[0]
            gate = torch.ones(x.shape[0], at.heads, dtype=x.dtype, device=x.device, requires_grad=True)
            gates.append((at, gate))
            width = at.heads * at.value_dim
            wide = gate.repeat_interleave(at.value_dim, -1).view(x.shape[0], *[1] * (x.dim() - 2), width)
            rest = wide.new_ones(*wide.shape[:-1], x.shape[-1] - width)  # a fused MLP half behind the heads
            return (x * torch.cat((wide, rest), -1), *arguments[1:])

        return hook

    outputs = [(at, path) for at in attentions for path in (at.o, at.added.get("o")) if path]
    hooks = [view.module(path).register_forward_pre_hook(gated(at)) for at, path in outputs]
    try:
        with torch.enable_grad():
            output = view.model(**inputs(batch))
            objective(output, generator).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return [(at, gate.grad) for at, gate in gates if gate.grad is not None]
