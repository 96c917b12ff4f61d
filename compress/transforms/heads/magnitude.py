"""Remove the attention heads whose value-output map is smallest, from the weights alone.

The score of a head is the Frobenius norm of W_o,h W_v,h, the linear map from the layer's input through the head to the
layer's output. Unlike the norms of the single slices it does not change when W_v is scaled and W_o scaled back.
Needs no data and takes seconds. Layers are compared by their share of the layer's largest head, since the scale of the
residual stream differs from layer to layer.

When it hurts: it does not see the attention pattern or the data. A head with large weights that hardly ever fires
stays, a small but decisive one goes: use heads.taylor where there is any calibration text or image.

Paper: the weight-norm baseline of Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.layout import fused_rows, interleaved_rows
from compress.selection import choose, edits, placeholder, prunable, unit_scores
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View


class Magnitude(Transform):
    """Head pruning by the norm of each head's value-output map."""

    neutral: ClassVar[dict] = {"keep": 1.0}
    example: ClassVar[dict] = {"keep": 0.5}

    keep: float = Field(0.9, gt=0, le=1, description="share of the heads (key-value groups) that stays")
    layout: Literal["ragged", "uniform"] = Field("ragged", description="best heads overall, or equally many per layer")
    unit: Literal["group", "query"] = Field("group", description="remove key-value groups, or queries of every group")

    def plan(self, view: View) -> Plan:
        taken, refused = prunable(view, self)
        notes = {"refused": refused}
        if any(parameter.is_meta for parameter in view.model.parameters()):
            kept = choose(placeholder(taken, self.unit), self.keep, self.layout)
            return Plan(edits(taken, kept, self.unit), notes=notes)
        scores = {path: unit_scores(head_norms(view, at) ** 2, at, self.unit).sqrt() for path, at in taken.items()}
        relative = {path: score / score.max().clamp_min(1e-30) for path, score in scores.items()}
        notes["importance"] = {path: score.mean().item() for path, score in scores.items()}
        return Plan(edits(taken, choose(relative, self.keep, self.layout), self.unit), notes=notes)

    def mask(self, view: View, plan: Plan) -> bool:
        for path, settings in plan.edits.items():
            view.mask_heads(view.attention(path), settings["groups"], settings["queries"])
        return True

    def apply(self, view: View, plan: Plan) -> None:
        for path, settings in plan.edits.items():
            view.keep_heads(view.attention(path), settings["groups"], settings["queries"])


@torch.no_grad()
def head_norms(view: View, attention: Attention) -> Tensor:
    """|W_o,h W_v,h| of every head, through the Gram matrices, so that no width x width product is formed."""
    value, output = head_weights(view, attention)
    return ((value @ value.mT) * (output.mT @ output)).sum((-2, -1)).clamp_min(0).sqrt()


def head_weights(view: View, attention: Attention) -> tuple[Tensor, Tensor]:
    """The value slice [heads, value_dim, in] and the output slice [heads, out, value_dim] of every head."""
    width = attention.value_dim
    starts = [group * width for group in range(attention.kv_heads)]
    if attention.qkv or attention.kv:
        rows = interleaved_rows if attention.layout == "interleaved" else fused_rows
        queries = attention.heads if attention.qkv else 0
        starts = rows(queries, attention.kv_heads, attention.head_dim, width)[2]
    value = _matrix(view.module(attention.v or attention.qkv or attention.kv))
    output = _matrix(view.module(attention.o))
    repeat = attention.heads // attention.kv_heads
    values = torch.stack([value[start : start + width] for start in starts]).repeat_interleave(repeat, 0)
    outputs = torch.stack([output[:, head * width : (head + 1) * width] for head in range(attention.heads)])
    return values, outputs


def _matrix(linear) -> Tensor:
    """The weight as [out, in]; transformers' Conv1D keeps it the other way round."""
    weight = linear.weight.detach().float()
    return weight if isinstance(linear, torch.nn.Linear) else weight.mT
