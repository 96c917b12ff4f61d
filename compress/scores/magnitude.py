"""The size of what a unit writes for a unit of what it reads: |W_out W_value|, from the weights alone.

Unlike the norms of the single slices it does not change when values are scaled up and their readers down. Layers are
compared by their share of the layer's largest, since the scale of the residual stream differs from layer to layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.basis import weight_of
from compress.layout import fused_rows, interleaved_rows
from compress.parts import Part
from compress.scoring import Scores
from compress.view import Attention, View


def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """The norm of every unit's own map, as a share of the largest of its module."""
    norms = []
    for part in parts:
        if isinstance(part.owner, Attention):
            found = part.fold_heads(head_norms(view, part.owner).square()).sqrt()
        else:
            ups = [weight_of(view.module(path)).float().square().sum(1) for path in part.owner.up]
            read = torch.cat(ups).unflatten(0, (-1, part.owner.width)).sum(0)
            found = part.fold(read * weight_of(view.module(part.owner.down)).float().square().sum(0)).sqrt()
        norms.append(found / found.max().clamp_min(1e-30))
    return Scores(torch.cat(norms).detach().cpu())


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
    value = weight_of(view.module(attention.v or attention.qkv or attention.kv)).detach().float()
    output = weight_of(view.module(attention.o)).detach().float()
    repeat = attention.heads // attention.kv_heads
    values = torch.stack([value[start : start + width] for start in starts]).repeat_interleave(repeat, 0)
    outputs = torch.stack([output[:, head * width : (head + 1) * width] for head in range(attention.heads)])
    return values, outputs
