"""Remove the attention heads that matter least in the whole model, and refit what reads the others in closed form.

A score tells what each head costs (`score`); the cheapest for what they save go first, and scores are asked anew on
the pruned model `rounds` times. Then, layer by layer on what the layers before it give now, the output projections are
solved for by least squares to give what the unchanged model gave, with or without the error that came from before,
whichever brings the layer's answer nearer; the ridge is chosen on rows set apart. No labels, and no training.

Scores: `energy` (what the answers lose with the variation of what a head writes), `fisher` (half of the gates' Fisher
information, with pairs), `taylor` (size of the gates' gradients), `leave_one_out` (measured with the head's layer refit
without it), `variance` (of what is written, times the weights), `entropy` (change of the answers'), `magnitude`
(weights alone, needs no data), `retrieval` (how surely a decoder's head finds what has to be copied). No score is the
best at all budgets, so `auto` tries energy, fisher, leave_one_out and variance, and keeps what loses least on batches
that took no part. `protect: 0.1` keeps heads that retrieve in a tenth of the cases.

Under grouped-query attention a whole group goes (key-value head and its query heads), scored jointly; `unit: query`
takes equally many query heads of every group instead, which is also what happens under multi-query attention.
`layout: uniform` keeps the same share in every layer, so that many models load natively.

One budget: `keep` (share of the heads), `flops` or `latency` (shares of the model's operations or measured time; a unit
may cost the more the more it saves). `include: [heads, mlp]` lets channels of MLPs go by the same scores and repair, in
slices of such as matter alike, so that widths stay multiples of eight.

`distill: 60` trains the blocks on for so many steps, to answer as the original does, and decoders to expect the text
besides (a fifth of the loss); it is undone where that brings nothing on data held out. SmolLM2-135M without 11 of 90
groups: perplexity of WikiText 6 % up when repaired, 10 % down when distilled, mean KL .063 and .074. It learned what
the text is like, as the original would have, so give text of the kind that it will read: with three quarters of it
unlabelled PIQA questions it solves .622 of 1,500 others, the original .621, and perplexity of WikiText stays as it was;
on PIQA questions alone it solves .620, and perplexity is 23 % up. Sixty steps of 1,024 tokens take five to twenty
minutes on two cores, and 7 GB.

When it hurts: the repair knows the calibration data only, so give ten thousand tokens or more of the kind that the
model will read. Small decoders with few key-value groups lose much with each group; `score: magnitude` without data
sees neither attention nor data and repairs nothing. Distilling DINOv2-S on 48 photos made it worse and was undone.

Papers: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019; Park, Choi, Kang, "Accurate
Retraining-free Pruning for Pretrained Encoder-based Language Models", ICLR 2024 (repair by least squares); those of
the scores stand in compress/scores.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from compress.errors import CompressError
from compress.parts import Part, channels_of, edits, heads_of, keep, kept, mask
from compress.selection import cheapest, narrowable, placeholder, prunable
from compress.transform import Field, Plan, Transform
from compress.view import View


class Prune(Transform):
    """Head pruning by pluggable scores with closed-form repair."""

    neutral: ClassVar[dict] = {"keep": 1.0}
    example: ClassVar[dict] = {"keep": 0.5, "score": "fisher", "include": ("heads", "mlp")}

    keep: float = Field(
        0.9, gt=0, le=1, description="budget: share of the heads, with mlp of their weights, that stays"
    )
    flops: float | None = Field(None, gt=0, le=1, description="budget: share of the model's operations")
    latency: float | None = Field(None, gt=0, le=1, description="budget: share of the model's time, measured here")
    include: tuple[Literal["heads", "mlp"], ...] = Field(
        ("heads",), min_length=1, description="what goes: heads, or channels of MLPs in slices (mlp), or both"
    )
    score: Literal[
        "auto", "energy", "entropy", "fisher", "leave_one_out", "magnitude", "retrieval", "taylor", "variance"
    ] = Field("auto", description="what a head costs; auto tries some and keeps the best on held-out data")
    protect: float | None = Field(None, gt=0, le=1, description="keep heads that copy in this share of cases")
    layout: Literal["ragged", "uniform"] = Field("ragged", description="best heads overall, or equally many per layer")
    unit: Literal["group", "query"] = Field("group", description="remove key-value groups, or queries of every group")
    rounds: int = Field(2, ge=1, description="times that scores are asked, each on the model pruned so far")
    repair: bool = Field(True, description="refit output projections, where there is calibration data")
    distill: int = Field(0, ge=0, description="training steps after it, to answer as before; of decoders on text too")

    @property
    def needs_data(self) -> bool:
        """Do scores look at data? What retrieves is asked with them."""
        return self.score != "magnitude" or self.protect is not None or "mlp" in self.include or self.distill > 0

    @property
    def uses_data(self) -> bool:
        """Repair does, where there is some."""
        return self.needs_data or self.repair

    def plan(self, view: View) -> Plan:
        from compress.savings import budget

        self.check()
        heads, mlps, refused = self.taken(view)
        parts = heads + [channels_of(mlp, torch.arange(mlp.width)) for mlp in mlps]
        if not parts:
            return Plan({}, notes={"refused": refused})
        counts = [part.count for part in parts]
        if self.needs_data or any(parameter.is_meta for parameter in view.model.parameters()):
            alone = placeholder(counts)
        else:
            from compress.scores.magnitude import score

            alone = score(view, parts, []).alone
        lose, costs, goal = budget(self, view, parts, None)
        gone = cheapest(alone, None, counts, costs, lose, goal)
        return Plan(edits(parts, kept(parts, gone)), notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.cutting import cut, sliced

        if not plan.edits:
            return plan
        heads, mlps, _ = self.taken(view)
        parts = heads + sliced(view, mlps, batches)
        left, notes = cut(self, view, parts, batches)
        return Plan(edits(parts, left), notes=plan.notes | notes)

    def check(self) -> None:
        """Refuse options that exclude each other."""
        given = [name for name in ("keep", "flops", "latency") if name in self.model_fields_set]
        if len(given) > 1:
            raise CompressError(f"heads.prune: {' and '.join(given)} are given, it must be one of them")
        if self.protect is not None and "heads" not in self.include:
            raise CompressError("heads.prune: protect is about heads, and include leaves them out")

    def taken(self, view: View) -> tuple[list[Part], list, dict[str, str]]:
        """The attentions and MLPs that can lose something, and why others cannot."""
        attentions, refused = prunable(view, self) if "heads" in self.include else ({}, {})
        heads = [heads_of(attention, self.unit) for attention in attentions.values()]
        if "mlp" not in self.include:
            return heads, [], refused
        mlps, others = narrowable(view, self, [attention.path for attention in view.attentions()])
        return heads, mlps, refused | others

    def mask(self, view: View, plan: Plan) -> bool:
        mask(view, plan.edits)
        return True

    def apply(self, view: View, plan: Plan) -> None:
        keep(view, plan.edits)
