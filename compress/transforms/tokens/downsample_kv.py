"""Let the tokens of an image attend to a coarser grid of keys and values: attention costs a fraction, no token goes.

Every query stays; keys and values are those of the mean of each cell of factor x factor tokens (`average`) or of its
first token (`nearest`, as in the paper). Nothing has to be matched and nothing put back, and plain attention kernels do
the work (a block of a UNet at 64 x 64 took .55 of its time on one thread of a CPU, .73 with half of its tokens merged).
Text in a joint attention, class and register tokens keep their own keys; beside them each key of the image counts as
many times as its cell has tokens, so that the text gains no weight. Where an attention lets them, found by trying, keys
and values are computed for the coarser grid only; where rotary positions turn them, `nearest` uses the rows of the
tokens it picks and `average` is refused. Exact where keys and values are constant within cells. Needs no data and
changes no weights.

When it hurts: small grids, where attention costs little and neighbours differ. A diffusion transformer of 8 x 8 tokens
was off by 39 % for .81 of the FLOPs, where tokens.merge was by 22 % for .79; a CIFAR-10 classifier of as many fell from
.812 to .672. A UNet with attention at 32 x 32 and below was off by .63 % for .88 of the FLOPs (.77 % by `nearest`).
Give `least`, so that only large grids are thinned. Beside text or class tokens, and in odd grids, the counts go as an
attention mask, which rules out flash kernels. Attention masks, windows and relative positions are refused. Later steps
that put a core of their own into these attentions are refused there.

Paper: "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", Smith, Saxena, Saha, 2024.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import torch

from compress.attend import attend_module, attend_through
from compress.attend import refusal as attend_refusal
from compress.errors import CompressError
from compress.nn.coarse_keys import CoarseKeys
from compress.nn.window import ImageSize
from compress.roles import parent_of, width_in
from compress.token_layout import (
    WRONG,
    above,
    guinea_pig,
    patch_size,
    positions,
    special_tokens,
    text_side,
    watch,
    width,
)
from compress.token_stacks import WINDOWS
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View

BIASES = re.compile("bias|rel|dist|alibi")  # positions added to the scores, one for each pair of tokens


class DownsampleKv(Transform):
    """Keys and values of image self-attention from a coarser grid."""

    neutral: ClassVar[dict] = {"factor": 1}
    example: ClassVar[dict] = {"by": "nearest"}

    factor: int = Field(2, ge=1, description="side of the cells of which one key and value is left")
    by: Literal["nearest", "average"] = Field("average", description="the first token of a cell, or its mean")
    least: int = Field(0, ge=0, description="smallest grid that is thinned, in tokens")

    def plan(self, view: View) -> Plan:
        if self.factor == 1:
            return Plan({})
        edits, refused, tried = {}, {}, {}
        text = joint_side(view)
        for attention in view.attentions():
            if not self.takes(attention.path):
                continue
            module = view.module(attention.path)
            found = beside(view, attention, text)
            why = found if isinstance(found, str) else self.refusal(tied(view, attention))
            if not why:
                kind = type(module), type(getattr(module, "processor", None)), bool(attention.added)
                if kind not in tried:
                    tried[kind] = spares_projections(view, attention, found["others"])
                early, why = tried[kind]
            if why:
                refused[attention.path] = why
                continue
            settings = {"factor": self.factor, "average": self.by == "average", "least": self.least}
            edits[attention.path] = settings | found | {"early": early}
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.downsample_kv cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def refusal(self, places: str) -> str:
        """Why an attention whose tokens are tied to their places in this way stays, or nothing."""
        if BIASES.search(places):
            return places
        return f"{places}, of which there is no average; by: nearest" if places and self.by == "average" else ""

    def apply(self, view: View, plan: Plan) -> None:
        size, known = ImageSize(), {attention.path: attention for attention in view.attentions()}
        for path, edit in plan.edits.items():
            core = CoarseKeys(path, size=size, **{key: value for key, value in edit.items() if key != "early"})
            attend_through(view, known[path], core)
            for linear in (known[path].k, known[path].v) if edit["early"] else ():
                view.module(linear).register_forward_pre_hook(core.thin_input)
        watch(view, list(plan.edits), size)


def joint_side(view: View) -> str | tuple[str, str]:
    """Where the text stands in a joint attention of this model, as `text_side` says it."""
    joint = next((attention for attention in view.attentions() if attention.added), None)
    return ("", "") if joint is None else text_side(view, joint)


def beside(view: View, attention: Attention, text: tuple[str, str]) -> dict | str:
    """The grid that an attention's tokens are and what stands beside it, or why there is none."""
    module = view.module(attention.path)
    if attention.cross:
        return "its keys come from another sequence"
    if attention.causal:
        return "it is causal: its tokens are a sequence"
    if any(hasattr(part, "merge") for part in (module, *above(view.model, attention.path))):
        return "its tokens are merged already"
    if any(hasattr(module, name) for name in WINDOWS):
        return "it attends within windows of the full grid"
    if why := attend_refusal(view, attention):
        return why
    if view.library == "diffusers":
        config, others, why = view.model.config, text[0] or 0, text[1]
    elif view.library == "transformers":
        config = getattr(module, "config", view.model.config)
        others, why = leading(view, attention)
        why = "its tokens are no patches of an image" if getattr(config, "patch_size", None) is None else why
    else:
        return "its model is neither of transformers nor of diffusers"
    patch = patch_size(config)
    return why or (patch if isinstance(patch, str) else {"patch": patch, "others": others})


def tied(view: View, attention: Attention) -> str:
    """What ties this attention's tokens to their places, itself or the block around it."""
    owners = [view.module(block.path) for block in view.blocks() if attention.path in block.attentions]
    return next(filter(None, map(positions, (view.module(attention.path), *owners))), "")


def leading(view: View, attention: Attention) -> tuple[int, str]:
    """How many special tokens stand before an image's, or why that is not known."""
    block = next((block.path for block in view.blocks() if attention.path in block.attentions), "")
    if not block:
        return 0, "it is in no block"
    special = special_tokens(view.model, parent_of(block))
    return (0, special) if isinstance(special, str) else (special["first"], "")


@torch.no_grad()
def spares_projections(view: View, attention: Attention, others: int | str) -> tuple[bool, str]:
    """May keys and values be projected for the coarser grid only? Found by trying both on a grid of 4 x 4; or why the
    attention cannot be reached at all."""
    if positions(view.module(attention.path)):
        return False, ""  # rotary positions are those of all tokens
    made = torch.Generator().manual_seed(0)
    before = others if isinstance(others, int) else 0
    tokens = {"hidden_states": torch.randn(1, 16 + before, width(view, attention), generator=made)}
    if attention.added:
        text = width_in(view.module(attention.added["k"]))
        tokens["encoder_hidden_states"] = torch.randn(1, 3, text, generator=made)
    module = guinea_pig(view.module(attention.path))
    size = ImageSize()
    size.height = size.width = 4
    core = CoarseKeys(attention.path, 2, False, 0, 1, others, size)
    attend_module(module, view.library, core)
    try:
        late = module(**tokens)
    except WRONG as error:
        return False, f"its attention does not work on plain tokens ({error})"
    inside = [linear[len(attention.path) + 1 :] for linear in (attention.k, attention.v) if linear]
    try:
        for name in inside:
            module.get_submodule(name).register_forward_pre_hook(core.thin_input)
        early = module(**tokens)
    except WRONG:
        return False, ""
    late, early = (answer[0] if isinstance(answer, tuple) else answer for answer in (late, early))
    same = late.shape == early.shape and torch.allclose(late, early, rtol=1e-4, atol=1e-4)
    return same and len(inside) == 2, ""
