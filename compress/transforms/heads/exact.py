"""What attention computes for nothing, taken out: the answers stay the same (but for rounding), no data is needed.

Three identities. A bias of the keys adds the same to all scores of a query, which the softmax takes no notice of, so
it goes; not under rotary positions or norms of keys. Attention weights sum to one, so the bias of the values arrives at
the output as a constant and is added to the bias of the output projection. And where a model reads nothing but the
class token (image and sequence classifiers), its last block computes queries, output and MLP for that token alone, with
the keys and values of all: 7 % of the FLOPs of a vision transformer of 12 blocks, 9 % of one of 9, which then ran 1.09
times as fast.

Nothing of this goes by names of models: each attention is tried alone, on random weights in float64, before and after,
and what is read of the last block is seen by following its output through the model. The last block goes back to
computing every token by itself when hidden states or attention weights are asked for, in training, and when the encoder
is run without its classifier.

Fewer tokens before it (tokens.merge, prune, pool) are keys and values of the last block with the weights they have;
what goes by keys or the length of values sees them without their bias, and may choose others.

When it hurts: never the answers. Later steps that put an attention of their own into the last block (linear.window)
are refused there, and quantizers which calibrate block by block look at the whole model at once;
`class_token: false` leaves the block as it is. The result is no ordinary config, so it is saved with our loading code.

Papers: none of its own; for the last block see "DiffRate: Differentiable Compression Rate for Efficient Vision
Transformers", Chen, Shao, Xu, Lin, Luo, Qiao, 2023, whose learned schedules leave hardly a token in it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from compress.attend import attend_module
from compress.errors import CompressError
from compress.nn.class_token import ClassToken
from compress.roles import is_conv1d, is_linear
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View


class Exact(Transform):
    """The free identities of attention."""

    example: ClassVar[dict] = {}

    class_token: bool = Field(True, description="compute the last block for the class token only, where that suffices")

    def plan(self, view: View) -> Plan:
        from compress.class_readers import class_readers

        edits, refused = {}, {}
        taken = [attention for attention in view.attentions() if self.takes(attention.path)]
        for attention in taken:
            parts, why = idle_biases(view, attention)
            if parts:
                edits[attention.path] = {"biases": parts}
            if why:
                refused[attention.path] = why
        if self.class_token:
            found, whole = class_readers(view, taken)
            edits, refused = edits | found, refused | whole
        if self.only and not edits and refused:
            path, why = next(iter(refused.items()))
            raise CompressError(f"heads.exact cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def mask(self, view: View, plan: Plan) -> bool:
        return True  # nothing that is to go contributes as it is

    def apply(self, view: View, plan: Plan) -> None:
        known = {attention.path: attention for attention in view.attentions()}
        for path, edit in plan.edits.items():
            if "biases" in edit:
                drop_biases(view, known[path], edit["biases"])
            else:
                core = read_class_token(view.module(path), view.library, edit)
                view.model.register_forward_pre_hook(core.start, with_kwargs=True)
                view.model.register_forward_hook(core.stop, always_call=True)


def idle_biases(view: View, attention: Attention) -> tuple[list[str], str]:
    """Which of the biases ("key", "value") go without a trace, and why others stay."""
    from compress.trial import harmless

    if not (attention.k and attention.v):
        return [], "the bias of its keys and values is part of a larger one"
    if odd := [path for path in attention.projections().values() if not is_linear(view.module(path))]:
        return [], f"{odd[0]} is a {type(view.module(odd[0])).__name__}, not a Linear"
    output = attention.o and view.module(attention.o)
    parts = ["key"] if view.module(attention.k).bias is not None else []
    if view.module(attention.v).bias is not None and output and output.bias is not None:
        parts.append("value")
    if not parts:
        return [], "it has no bias of keys, and none of values beside one of the output"
    whys = {part: harmless(view, attention, lambda part=part: drop_biases(view, attention, [part])) for part in parts}
    left = [f"its bias of the {part}s stays: {why}" for part, why in whys.items() if why]
    return [part for part in parts if not whys[part]], "; ".join(left)


@torch.no_grad()
def drop_biases(view: View, attention: Attention, parts: list[str]) -> None:
    """Take out the bias of the keys, and move that of the values into that of the output."""
    if "key" in parts:
        view.module(attention.k).bias = None
    if "value" in parts:
        values, output = view.module(attention.v), view.module(attention.o)
        weight = (output.weight.mT if is_conv1d(output) else output.weight).double()
        bias = values.bias.double().unflatten(0, (attention.kv_heads, -1))
        bias = bias.repeat_interleave(attention.heads // attention.kv_heads, 0).flatten()
        output.bias.data.add_((weight[:, : len(bias)] @ bias).to(output.bias.dtype))
        values.bias = None


def read_class_token(block: nn.Module, library: str, edit: dict) -> ClassToken:
    """Let a block compute its class token only, whenever its core is `asked` to."""
    core = ClassToken(edit["norm"], edit["keys"], edit["values"]).to(next(block.parameters()).device)
    attend_module(block.get_submodule(edit["attention"]), library, core)
    block.register_forward_pre_hook(core.cut, with_kwargs=True)
    return core
