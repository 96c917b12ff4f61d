"""Merge similar tokens as they pass through the model, so that later layers work on fewer of them.

In every block, every second token proposes the most similar of the others; the strongest proposals are merged into
their size-weighted mean (bipartite soft matching); `match: energy` lets only those merge that have many others near
them, `criteria` sends half of them from either side, by likeness, importance and size at once (MCTF), `sizes` merges
the small into the large in the later half of the blocks (ATM). With `importance` a token costs more to merge the more
attention looks at it. What is compared, the features, the keys or both, is a choice that data decides where the recipe
has some, and large tokens pay more for a merge (`ward`). With `flops`, the share that each block merges is searched
for: among schedules that leave this part of the operations, that which changes the answers to unlabelled data least.
From then on a token that stands for s others counts s times as a key: log s is added to its attention logits
(proportional attention). The last block's output is copied back to all places, so that pooling, dense heads and patch
features find every token where it was; one that computes its class token only (heads.exact) goes on doing so. Class,
distillation and register tokens, a text's first and last token and padding are never merged. Needs no data.

Where there is data, the MLPs are repaired (`repair`): block by block, the last projection of each is refit by ridge
regression, so that a merged token leaves the block as the mean of what the original had at its places; special tokens
weigh as much as all others of their image. It is undone where that does not bring answers to held-out data nearer.
DINOv2-S on 1,322 photos, its schedule searched and repaired with 512 others: at 75, 60 and 45 % of the FLOPs a mean KL
of .019, .038 and .126 and an accuracy of .726, .704 and .681 (the paper's .042, .158, .692 and .720, .679, .520; .729
before). On MiniLM it gains nothing and is undone.

Tokens are merged between a block's attention and its MLP: after the attention where that has its residual with it
(BERT); where the block keeps all tokens in a residual of its own (ViT), its MLP reads fewer, what it says of each is
copied to all that it stands for, and the block's answer is brought to the fewer. Where neither can be seen to give the
same, they are merged at its end (DistilBERT, Whisper). On a sentence encoder of 6 blocks (MiniLM, 96 passages of 64
tokens) the mean cosine distance of the embeddings at 65 % of the FLOPs is .120 by the keys' likeness, as the paper has
it, .036 by the features' and .034 with the schedule searched for; of 128 others .035, with `importance: auto` .029.

Importance and other matchings bring little and not the same everywhere. At 59 % of the FLOPs with an equal count in
every block, mean KL of a CIFAR-10 classifier (400 images) and of DINOv2-S (96 photos): .058 and .128 by every second
token; with importance `class` .058 and .111, `received` .055 and .121, `values` .060 and .111; by criteria .056 and
.124, with `received` .076 and .167; by sizes .070 and .122; the paper's keys .078 and .176. Only the matching of every
second token has a kernel, and importance costs time: MiniLM at 65 % of the FLOPs takes .97 of the original's by values
and .89 without at batch 1, .64 with it at 32. More comes from heads.exact in front, where only the class token is
read: a CIFAR-10 classifier, its schedule searched for, at 75, 60 and 45 % of the FLOPs .0040, .021 and .087 (the
paper's .0153, .076 and .787), accuracy .816, .809 and .782 of .820 (.811, .786 and .504).

When it hurts: short inputs and batch size 1, where matching costs more than the tokens it saves; dense prediction,
which loses detail; small models. A count takes most of a short text: give a ratio where lengths differ. Log sizes go as
an attention mask, half precision on GPUs: inside the keys. Hidden states asked for from between the blocks have fewer
tokens than the input. Rotary positions go with the tokens (DINOv3); not for causal decoders, windows and relative
positions.

Papers: "Token Merging: Your ViT But Faster", Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, 2023; energy "Accelerating
Transformers with Spectrum-Preserving Token Merging", Tran et al., 2024; schedules of unequal shares "DiffRate:
Differentiable Compression Rate for Efficient Vision Transformers", Chen et al., 2023; criteria "Multi-criteria Token
Fusion with One-step-ahead Attention for Efficient Vision Transformers", Lee, Choi, Kim, 2024; sizes arXiv 2505.15160,
2025.
"""

from __future__ import annotations

from itertools import count
from typing import Annotated, ClassVar, Literal

from compress.errors import CompressError
from compress.nn.token_merge import MergeAfter, Rule
from compress.token_stacks import grid, hand_on_fewer, places, reads_class_token, scoring
from compress.transform import Field, Plan, Transform
from compress.view import View

Share = Annotated[float, Field(ge=0, le=0.5)]
Count = Annotated[int, Field(ge=0)]


class Merge(Transform):
    """Token merging with proportional attention."""

    neutral: ClassVar[dict] = {"r": 0}
    example: ClassVar[dict] = {"ratio": 0.25}

    ratio: Share | tuple[Share, ...] = Field(
        0.08, description="share of the tokens present that each block merges away, or one for each block in turn"
    )
    r: Count | tuple[Count, ...] | None = Field(None, description="counts of tokens instead of shares")
    flops: float | None = Field(
        None, gt=0, lt=1, description="part of the operations to keep: the shares are then searched for on the data"
    )
    latency: float | None = Field(
        None, gt=0, lt=1, description="the same by time: part of it to keep, measured on the first calibration batch"
    )
    protect: int | None = Field(None, ge=0, description="leading tokens left alone; the special tokens if not given")
    proportional: bool = Field(True, description="let a merged token weigh as many as it stands for")
    metric: Literal["auto", "features", "keys", "both"] = Field(
        "auto", description="what of the tokens is compared; auto: what changes answers to the data least, or features"
    )
    similarity: Literal["cosine", "euclidean"] = Field("cosine", description="which tokens count as alike")
    ward: float = Field(
        0.5, ge=0, le=1, description="power of the pair's harmonic size in the cost of a merge: large tokens stay apart"
    )
    match: Literal["bipartite", "energy", "criteria", "sizes"] = Field(
        "bipartite",
        description="who merges: every second token, those with the most others near them, half from either side by "
        "likeness, importance and size, or in the later half of the blocks the small ones into the large",
    )
    importance: Literal["none", "class", "received", "values", "auto"] = Field(
        "none",
        description="tokens cost more to merge by the class token's attention, by what 16 queries give them, or by the "
        "class token's attention times the length of their values; auto: what changes answers to data least, where "
        "that is a tenth less than without, or none",
    )

    repair: bool = Field(True, description="refit the MLPs to what the unmerged tokens were, where there is data")

    @property
    def needs_data(self) -> bool:
        return self.flops is not None or self.latency is not None

    @property
    def uses_data(self) -> bool:
        return self.needs_data or self.repair or "auto" in (self.metric, self.importance)

    def plan(self, view: View) -> Plan:
        given = [name for name in ("ratio", "r", "flops", "latency") if name in self.model_fields_set]
        if len(given) > 1:
            raise CompressError(f"tokens.merge: {' and '.join(given)} are both given, it must be one of them")
        if self.r == 0:
            return Plan({})
        if self.match == "criteria" and (self.similarity != "cosine" or "ward" in self.model_fields_set):
            name = "ward" if self.similarity == "cosine" else "similarity"
            raise CompressError(f"tokens.merge: {name} is given, it has no place in match: criteria")
        found = {path: self._importance(settings) for path, settings in places(view).items() if self.takes(path)}
        refused = {path: why for path, why in found.items() if isinstance(why, str)}
        taken = {path: settings for path, settings in found.items() if path not in refused}
        depths = zip(taken.items(), self._amounts(len(taken)), count(), strict=False)
        edits = {path: self._settings(settings, amount, at / len(taken)) for (path, settings), amount, at in depths}
        alone = any(reads_class_token(view, one) for one in view.attentions())
        bound = [one["rule"]["first"] if "rotary" in one else int(alone) for one in taken.values()]
        least = max(bound, default=0)
        if self.protect is not None and self.protect < least:
            why = "only the class token is read" if alone else "leading tokens have no rotary position"
            raise CompressError(f"tokens.merge: protect is {self.protect}, it must be at least {least}: {why}")
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.merge cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.merge_search import (
            SEARCH,
            Trial,
            choose_importance,
            choose_metric,
            choose_ratios,
            share_within,
            within,
        )
        from compress.scoring import some
        from compress.token_pictures import pictures
        from compress.token_repair import repair_tokens

        if not plan.edits:
            return plan
        few = some(batches, SEARCH)
        trial = Trial.of(view, plan.edits, few, self.apply)
        edits, notes, budget = plan.edits, {}, self.flops
        if self.latency is not None:
            budget = notes["operations"] = share_within(trial, view.model, edits, self.latency, batches[0])
        if budget is not None:
            edits = within(trial, edits, budget)
        if self.metric == "auto":
            edits, notes["metric"] = choose_metric(trial, edits)
        if self.importance == "auto":
            edits, notes["importance"] = choose_importance(view, edits, few, self.apply)
            trial = Trial.of(view, edits, few, self.apply)
        if budget is not None:
            edits, notes["schedules"] = choose_ratios(trial, edits, budget)
        if self.repair:
            first = max(edit["rule"]["first"] for edit in edits.values())
            notes["remarks"] = [repair_tokens(view, trial.following(edits), batches, first)]
        patches = [grid(view, block) for block in view.blocks() if block.path in edits]
        if "pixel_values" in batches[0] and isinstance(patches[-1], int):
            notes["pictures"] = pictures(trial.following(edits), edits, batches[0], patches[-1])
        return Plan(edits, notes=plan.notes | notes)

    def _amounts(self, blocks: int) -> list[dict]:
        """What each block merges away."""
        name, amount = ("ratio", self.ratio) if self.r is None else ("r", self.r)
        amounts = amount if isinstance(amount, tuple) else (amount,) * blocks
        if len(amounts) != blocks:
            raise CompressError(f"tokens.merge: {name} has {len(amounts)} entries, it must have {blocks}, one a block")
        return [{name: amount} for amount in amounts]

    def _importance(self, found: dict | str) -> dict | str:
        """With the score that tells which tokens are important, or why there is none."""
        from compress.merge_search import AS_WELL, SCORES

        if isinstance(found, str) or self.importance in ("none", "auto"):
            return found
        if self.importance not in AS_WELL and not found["rule"]["first"]:
            return "its tokens have no class token, whose attention would tell; importance: received"
        return found | {"score": SCORES[self.importance]}

    def _settings(self, found: dict, amount: dict, depth: float) -> dict:
        rule = amount | found["rule"] | {"similarity": self.similarity, "ward": self.ward}
        rule["metric"] = "features" if self.metric == "auto" else self.metric
        if self.match == "energy":
            rule["margin"] = round(0.9 - 0.9 * depth, 6)
        elif self.match == "criteria" or (self.match == "sizes" and depth >= 0.5):
            rule["match"] = self.match
        if self.importance not in ("none", "auto"):
            rule["importance"] = self.importance
        if self.protect is not None:
            rule["first"] = self.protect
        return found | {"rule": rule, "proportional": self.proportional}

    def apply(self, view: View, plan: Plan) -> None:
        if plan.edits:
            hand_on_fewer(
                view, plan.edits, scoring(plan.edits), lambda tokens, edit: MergeAfter(tokens, Rule(**edit["rule"]))
            )
