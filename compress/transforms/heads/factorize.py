"""Narrower heads: the products of the query and key and of the value and output projections at a lower rank.

What a head computes depends on its projections through two products only, so each may be written with fewer channels
between. Which are worth keeping is seen on calibration data: directions are ordered by what they carry to the output
(both sides whitened by what flows there; keys without their mean, which the softmax does not see), and ranks of all
layers are chosen together, by their effect on the answers through gradients without labels. Layers are narrowed one
after the other on the tokens that the narrowed ones give, and the output projection is fitted again to all heads at
once. Under grouped queries the values of a group are narrowed together for all its heads. Values in the cache become
as much shorter. Biases are part of it; at full rank nothing is changed.

Queries and keys are narrowed only where nothing but their product lies between: not under rotary positions or norms.
Every attention is tried alone, with random weights in float64, and what is not exact is refused by name.
`by: weights` takes directions and equal ranks from the weights alone (COMCAT without its training), for comparison.

`distill: 60` trains the blocks on for so many steps, as in heads.prune: values of SmolLM2-135M at rank 48 of 64 have
1.04 of the perplexity without it, .90 with it, and a mean KL of .062 and .070.

When it hurts: by weights alone it ruins decoders, whose tokens are far from evenly spread. Ranks below three quarters
cost visibly. Heads of other widths miss some fast attention kernels: on a CPU, prompts are read no faster, what gets
smaller is weights and cache. The width of a head is no ordinary config, so our loading code is needed.

Paper: Xiao, Yin, Gong, Zang, Ren, Yuan, "COMCAT: Towards Efficient Compression and Customization of Attention-Based
Vision Models", ICML 2023.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.layout import ranges
from compress.nn.narrow_heads import narrow
from compress.roles import width_in, width_out
from compress.surgery import keep_columns, keep_rows
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View


class Factorize(Transform):
    """Query-key and value-output products of lower rank."""

    neutral: ClassVar[dict] = {"keep": 1.0}
    example: ClassVar[dict] = {"keep": 0.5, "step": 2}

    keep: float = Field(0.75, gt=0, le=1, description="share of the weights in the projections concerned that stays")
    step: int = Field(8, ge=1, description="ranks are multiples of this")
    by: Literal["data", "weights"] = Field("data", description="where directions and ranks come from")
    parts: Literal["all", "values"] = Field("all", description="narrow values only, or queries and keys where possible")
    distill: int = Field(0, ge=0, description="training steps after it, to answer as before; of decoders on text too")

    @property
    def needs_data(self) -> bool:
        return self.by == "data"

    def plan(self, view: View) -> Plan:
        if self.by == "weights" and self.distill:
            raise CompressError("heads.factorize: distill learns from data, by is weights; leave one out")
        if self.keep == 1:
            return Plan({})
        taken, refused = self.candidates(view)
        edits = {}
        for path, edit in taken.items():
            at = view.attention(path)
            rank = {"values": int(self.keep * at.value_dim), "keys": int(self.keep * at.head_dim)}
            rank = {name: max(rank[name] // self.step * self.step, self.step) for name in edit["parts"]}
            if rank["values"] < at.value_dim:
                edits[path] = rank | {"scaled": edit["scaled"]}
            else:
                refused[path] = f"its heads of {at.value_dim} cannot be narrowed by {self.step}"
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"heads.factorize cannot change {path}: {why}")
        if self.by == "weights" and not any(parameter.is_meta for parameter in view.model.parameters()):
            edits = {path: edit | {"weights": True} for path, edit in edits.items()}
        return Plan(edits, notes={"refused": refused})

    def candidates(self, view: View) -> tuple[dict[str, dict], dict[str, str]]:
        """What of each attention can be narrowed, and why nothing of others can."""
        taken, refused = {}, {}
        for at in view.attentions():
            if not self.takes(at.path):
                continue
            why = unfit(view, at)
            if not why and (why := provable(view, at, {"values": at.value_dim // 2})):
                why = f"its values cannot be narrowed: {why}"
            if why:
                refused[at.path] = why
                continue
            taken[at.path] = {"parts": ["values"], "scaled": False}
            if self.parts == "all" and at.heads == at.kv_heads:
                for scaled in (False, True):
                    whole = {"keys": at.head_dim // 2, "values": at.value_dim // 2, "scaled": scaled}
                    if not provable(view, at, whole):
                        taken[at.path] = {"parts": ["values", "keys"], "scaled": scaled}
        return taken, refused

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.factoring import bases, factor, share, slopes, whole
        from compress.relearning import relearn

        if not plan.edits or self.by == "weights":
            return plan
        attentions = [at for at in view.attentions() if at.path in plan.edits]
        seen, (out, asked) = whole(view, attentions, batches), slopes(view, attentions, batches)
        energies = {}
        for at in attentions:
            found, edit = bases(view, at, seen[at.path], out[at.path], asked[at.path]), plan.edits[at.path]
            values, keys = costs(view, at)
            parts = [("values", found.values, values), ("keys", found.scores, keys)]
            energies[at.path] = [part for part in parts if part[0] in edit]
        ranks = share(energies, self.keep, self.step)
        original = deepcopy(view.model) if self.distill else view.model
        errors = factor(view, attentions, ranks, out, batches)
        edits = {path: ranks[path] | {"scaled": plan.edits[path]["scaled"]} for path in ranks if ranks[path]}
        notes = {"ranks": ranks, "error of the output": errors}
        if self.distill:
            notes["remarks"] = [relearn(view, original, batches, self.distill)]
        return Plan(edits, notes=plan.notes | notes)

    def mask(self, view: View, plan: Plan) -> bool:
        return not any("weights" in edit for edit in plan.edits.values())  # what goes is zero since calibration

    def apply(self, view: View, plan: Plan) -> None:
        known = {at.path: at for at in view.attentions()}
        for path, edit in plan.edits.items():
            if edit.get("weights") and not view.module(known[path].o).weight.is_meta:
                by_weights(view, known[path], edit)
            shorten(view, known[path], edit)


def unfit(view: View, at: Attention) -> str:
    """Why the shapes of an attention are no case for factors, or nothing."""
    if at.added:
        return "its keys and values come from two streams"
    if not (at.q and at.k and at.v and at.o):
        return "its projections are not separate"
    if odd := [path for path in (at.q, at.k, at.v, at.o) if not isinstance(view.module(path), nn.Linear)]:
        return f"{odd[0]} is a {type(view.module(odd[0])).__name__}, not a Linear"
    if at.head_dim != at.value_dim or at.head_dim < 2:
        return "its values are narrowed already" if at.head_dim != at.value_dim else "its heads have one channel"
    if width_in(view.module(at.o)) != at.heads * at.value_dim:
        return "its output projection also reads something else"
    return ""


def provable(view: View, at: Attention, edit: dict) -> str:
    """Why an attention is not what factors take it for, tried alone with these widths; empty where it is."""
    from compress.trial import harmless

    turn = torch.randn(at.head_dim, at.head_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = torch.eye(at.head_dim, dtype=torch.float64) + turn / at.head_dim**0.5

    def mix(path: str, count: int, by: Tensor) -> None:
        for tensor in view.module(path).parameters():
            tensor.data.copy_(torch.block_diag(*[by] * count) @ tensor.data)

    def mixed() -> None:
        mix(at.v, at.kv_heads, turn)
        output = view.module(at.o).weight.data
        output.copy_(output @ torch.block_diag(*[torch.linalg.inv(turn)] * at.heads))
        if "keys" in edit:
            mix(at.q, at.heads, turn)
            mix(at.k, at.kv_heads, torch.linalg.inv(turn).t())

    def zeroed() -> None:
        for name, path, count in (("keys", at.q, at.heads), ("keys", at.k, at.kv_heads), ("values", at.v, at.kv_heads)):
            for tensor in view.module(path).parameters() if name in edit else ():
                tensor.data.unflatten(0, (count, -1))[:, edit[name] :] = 0

    return harmless(view, at, mixed) or harmless(view, at, lambda: shorten(view, at, edit), zeroed)


def costs(view: View, at: Attention) -> tuple[int, int]:
    """Weights of the projections for each channel of all heads: of values and output, of queries and keys."""
    q, k, v = (width_in(view.module(path)) for path in (at.q, at.k, at.v))
    return at.kv_heads * v + at.heads * width_out(view.module(at.o)), at.heads * q + at.kv_heads * k


def shorten(view: View, at: Attention, edit: dict) -> None:
    """Cut each head to its first channels, which hold all that is left."""
    keys, values = edit.get("keys", at.head_dim), edit.get("values", at.value_dim)
    for path, count, width, dim in (
        (at.q, at.heads, keys, at.head_dim),
        (at.k, at.kv_heads, keys, at.head_dim),
        (at.v, at.kv_heads, values, at.value_dim),
    ):
        if width < dim:
            keep_rows(view.module(path), ranges(range(0, count * dim, dim), width))
    if values < at.value_dim:
        keep_columns(view.module(at.o), ranges(range(0, at.heads * at.value_dim, at.value_dim), values))
    if edit.get("scaled"):  # its forward divides by the root of the width that it finds
        for parameter in view.module(at.q).parameters():
            parameter.data.mul_((keys / at.head_dim) ** 0.5)
    narrow(view.module(at.path), at.heads, at.kv_heads, at.head_dim, keys, values)


def by_weights(view: View, at: Attention, edit: dict) -> None:
    """Write the directions that the weights alone give."""
    from compress.factoring import bases, turn, white

    seen = white(view, at)
    turn(view, at, bases(view, at, seen), edit, seen, None)
