"""Keep the tokens that attention looks at, and fuse the rest into one, so that later blocks work on fewer.

From the attention of each of the blocks named on, a share of the tokens goes on; the others are replaced by one token,
their mean weighted by their scores (a convex combination; the paper's weights do not sum to one), which later competes
like the rest. A score is what the class token's attention gives a token (EViT; in a text the first token's), that times
the length of the token's value (`value_aware`, after ATS), or the mean of what 16 queries evenly spaced give it
(`received`, for models without a class token). Only these rows of the attention matrix are computed. `select: spread`
takes tokens at even steps through the running sum of the scores, as ATS samples them, and fills up with the highest.
With `proportional` a fused token that stands for s others counts s times as a key. Class, distillation and register
tokens, a text's first and last token and padding stay as they are. The last block's output is copied back to all
places, the fused token to all it stands for, so that shapes are as before. Needs no data; where there is some, MLPs are
refit as in tokens.merge (`repair`), unless answers to held-out data get no nearer: so far they did not.

When it hurts: it goes by importance and not by likeness, so merging (tokens.merge) keeps more, though pooling keeps
less. DINOv2-S on 60 photos, accuracy .700: at .68 of the FLOPs .617 and a mean KL of .33, where tokens.pool had .433
and .67, tokens.merge .650 and .07 (at .67). There EViT's own score brought .40, `spread` and `received` no gain, and
`proportional` .56. Dense read-outs get one and the same feature wherever nothing looked: not for segmentation or depth.
Mean pooling counts the fused token for all it stands for. Small models and early blocks suffer most. It happens before
the MLP of a block, as in the paper, where tokens.merge could, else behind it. Hidden states asked for from between the
blocks have fewer tokens than the input. Log sizes go as an attention mask, half precision on GPUs: inside the keys.
Rotary positions go with the tokens (DINOv3); not for causal decoders, windows, relative positions and diffusion models.

Papers: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", Liang, Ge, Tong,
Song, Wang, Xie, 2022; "Adaptive Token Sampling For Efficient Vision Transformers", Fayyaz, Abbasi Koohpayegani, Rezaei
Jafari, Sengupta, Vaezi Joze, Sommerlade, Pirsiavash, Gall, 2022.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from compress.errors import CompressError
from compress.nn.token_prune import Keep, PruneAfter
from compress.token_stacks import chosen, hand_on_fewer, scoring, shrinkable
from compress.transform import Field, Plan, Transform
from compress.view import View


def quarters(length: int) -> set[int]:
    """Blocks at a quarter, half and three quarters of a stack of so many: 3, 6 and 9 of 12."""
    return {length // 4, length // 2, 3 * length // 4} - {length - 1} or {0}


class Prune(Transform):
    """Token pruning by attention with a fused rest."""

    neutral: ClassVar[dict] = {"keep": 1.0}
    example: ClassVar[dict] = {"keep": 0.5}

    keep: float = Field(0.7, gt=0, le=1, description="share of the tokens present that stay themselves at each block")
    blocks: tuple[int, ...] | None = Field(
        None, description="blocks after which it prunes, counted from 0; those at the quarters if not given"
    )
    score: Literal["class_attention", "value_aware", "received"] = Field(
        "value_aware", description="what makes a token worth keeping"
    )
    select: Literal["top", "spread"] = Field("top", description="the highest scores, or even steps through their sum")
    proportional: bool = Field(False, description="let the fused token weigh as many as it stands for")
    repair: bool = Field(True, description="refit the MLPs to what the whole tokens were, where there is data")

    @property
    def uses_data(self) -> bool:
        return self.repair

    def plan(self, view: View) -> Plan:
        if self.keep == 1 or self.blocks == ():
            return Plan({})
        blocks = [block for block in chosen(view, "tokens.prune", self.blocks, quarters) if self.takes(block.path)]
        edits, refused = {}, {}
        for path, found in shrinkable(view, blocks).items():
            if isinstance(found, str):
                refused[path] = found
            elif self.score != "received" and not found["rule"]["first"]:
                refused[path] = "its tokens have no class token, whose attention would score them; score: received"
            else:
                rule = found["rule"] | {"share": self.keep, "spread": self.select == "spread"}
                edits[path] = found | {"rule": rule, "score": self.score, "proportional": self.proportional}
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.prune cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.token_repair import repaired

        if not plan.edits or not self.repair:
            return plan
        return repaired(view, plan, batches, self.apply, max(edit["rule"]["first"] for edit in plan.edits.values()))

    def apply(self, view: View, plan: Plan) -> None:
        def hooks(tokens, edit):
            return PruneAfter(tokens, Keep(**edit["rule"]))

        hand_on_fewer(view, plan.edits, scoring(plan.edits), hooks)
