"""Remove the attention heads that matter least in the whole model, and refit what reads the others in closed form.

A score tells what each head costs (`score`); the cheapest for what they save go first, and scores are asked anew on
the pruned model `rounds` times. Then, layer by layer on what the layers before it give now, the output projections are
solved for by least squares to give what the unchanged model gave, with or without the error that came from before,
whichever brings the layer's answer nearer; the ridge is chosen on rows set apart. No labels, no training.

Scores: `energy` (what the answers lose with the variation of what a head writes), `fisher` (half of the gates' Fisher
information, with pairs), `taylor` (size of the gates' gradients), `leave_one_out` (measured with the head's layer refit
without it), `variance` (of what is written, times the weights), `entropy` (change of the answers'), `magnitude`
(weights alone, needs no data), `retrieval` (how surely a decoder's head finds what has to be copied). No score is the
best at all budgets, so `auto` tries energy, fisher, leave_one_out and variance, and keeps what loses least on batches
that took no part. `protect: 0.1` keeps heads that retrieve in a tenth of the cases.

Under grouped-query attention a whole group goes (key-value head and its query heads), scored jointly; `unit: query`
takes equally many query heads of every group instead, which is also what happens under multi-query attention.
`layout: uniform` keeps the same share in every layer, so that many models load natively.

When it hurts: the repair knows the calibration data only, so give ten thousand tokens or more of the kind that the
model will read. Small decoders with few key-value groups lose much with each group; `score: magnitude` without data
sees neither attention nor data and repairs nothing.

Papers: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019; Park, Choi, Kang, "Accurate
Retraining-free Pruning for Pretrained Encoder-based Language Models", ICLR 2024 (repair by least squares); those of
the scores stand in compress/scores.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from compress.parts import Part, heads_of, kept
from compress.selection import cheapest, edits, placeholder, prunable, quotas
from compress.transform import Field, Plan, Transform
from compress.view import View


class Prune(Transform):
    """Head pruning by pluggable scores with closed-form repair."""

    neutral: ClassVar[dict] = {"keep": 1.0}
    example: ClassVar[dict] = {"keep": 0.5, "score": "fisher"}

    keep: float = Field(0.9, gt=0, le=1, description="share of the heads (key-value groups) that stays")
    score: Literal[
        "auto", "energy", "entropy", "fisher", "leave_one_out", "magnitude", "retrieval", "taylor", "variance"
    ] = Field("auto", description="what a head costs; auto tries some and keeps the best on held-out data")
    protect: float | None = Field(None, gt=0, le=1, description="keep heads that copy in this share of cases")
    layout: Literal["ragged", "uniform"] = Field("ragged", description="best heads overall, or equally many per layer")
    unit: Literal["group", "query"] = Field("group", description="remove key-value groups, or queries of every group")
    rounds: int = Field(2, ge=1, description="times that scores are asked, each on the model pruned so far")
    repair: bool = Field(True, description="refit output projections, where there is calibration data")

    @property
    def needs_data(self) -> bool:
        """Do scores look at data? What retrieves is asked with them."""
        return self.score != "magnitude" or self.protect is not None

    @property
    def uses_data(self) -> bool:
        """Repair does, where there is some."""
        return self.needs_data or self.repair

    def plan(self, view: View) -> Plan:
        taken, refused = prunable(view, self)
        parts = [heads_of(attention, self.unit) for attention in taken.values()]
        if not parts:
            return Plan({}, notes={"refused": refused})
        counts = [part.count for part in parts]
        if self.needs_data or any(parameter.is_meta for parameter in view.model.parameters()):
            alone = placeholder(counts)
        else:
            from compress.scores.magnitude import score

            alone = score(view, parts, []).alone
        lose, costs, goal = self.budget(parts)
        gone = cheapest(alone, None, counts, costs, lose, goal)
        return Plan(edits(taken, kept(parts, gone), self.unit), notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.cutting import cut

        if not plan.edits:
            return plan
        taken, _ = prunable(view, self)
        parts = [heads_of(attention, self.unit) for attention in taken.values()]
        stay, notes = cut(self, view, parts, batches)
        return Plan(edits(taken, stay, self.unit), notes=plan.notes | notes)

    def budget(self, parts: list[Part]) -> tuple[list[int], list[float], float]:
        """How many units each part may lose, what one of them saves, and how much is to be saved."""
        counts = [part.count for part in parts]
        lose = quotas(counts, self.keep, self.layout)
        least = sum(lose) if self.layout == "uniform" else sum(counts) - max(len(parts), round(self.keep * sum(counts)))
        return lose, [1.0] * len(parts), least

    def mask(self, view: View, plan: Plan) -> bool:
        for path, settings in plan.edits.items():
            view.mask_heads(view.attention(path), settings["groups"], settings["queries"])
        return True

    def apply(self, view: View, plan: Plan) -> None:
        for path, settings in plan.edits.items():
            view.keep_heads(view.attention(path), settings["groups"], settings["queries"])
