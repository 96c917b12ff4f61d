"""Merge similar tokens as they pass through the model, so that later layers work on fewer of them.

In every block, every second token proposes the most similar of the others; the strongest proposals are merged into
their size-weighted mean (bipartite soft matching); `match: energy` lets only those merge that have many others near
them. What is compared, the features, the keys or both, is a choice that data decides where the recipe has some, and
large tokens pay more for a merge (`ward`). With `flops`, the share that each block merges is searched for: among
schedules that leave this part of the operations, that which changes the answers to unlabelled data least. From then on
a token that stands for s others counts s times as a key: log s is added to its attention logits (proportional
attention). The last block's output is copied back to all places, so that pooling, dense heads and patch features find
every token where it was. In diffusion models the tokens are merged around each self-attention only, since all else
works on the full image. Class, distillation and register tokens, a text's first and last token and padding are never
merged. Needs no data and changes no weights.

Tokens are merged after the attention where a block shows them there (BERT), else at its end. On a sentence encoder of 6
blocks (MiniLM, 96 passages of 64 tokens) the mean cosine distance of the embeddings at 65 % of the FLOPs is .120 by the
keys' likeness, as the paper has it, .036 by the features' and .034 with the schedule searched for.

When it hurts: short inputs and batch size 1, where matching costs more than the tokens it saves; dense prediction,
which loses detail; small models. A count takes most of a short text: give a ratio where lengths differ. Log sizes go
as an attention mask, which rules out flash kernels. Hidden states asked for from between the blocks have fewer tokens
than the input. Not for causal decoders, windows and rotary positions.

Papers: "Token Merging: Your ViT But Faster", Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, 2023; for diffusion "Token
Merging for Fast Stable Diffusion", Bolya, Hoffman, 2023; energy "Accelerating Transformers with Spectrum-Preserving
Token Merging", Tran et al., 2024; schedules of unequal shares "DiffRate: Differentiable Compression Rate for Efficient
Vision Transformers", Chen et al., 2023; sizes in the cost arXiv 2505.15160, 2025.
"""

from __future__ import annotations

from itertools import count
from typing import Annotated, ClassVar, Literal

from compress.attend import attend_through
from compress.attend import refusal as attend_refusal
from compress.errors import CompressError
from compress.nn.token_merge import MergeAfter, MergeAround, Rule, Sized, Tokens
from compress.roles import join, parent_of
from compress.token_layout import above, merge_point, positions, special_tokens, text_side
from compress.transform import Field, Plan, Transform
from compress.view import Attention, Block, View

WINDOWS = ("window_size", "shift_size")
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
    protect: int | None = Field(None, ge=0, description="leading tokens left alone; the special tokens if not given")
    proportional: bool = Field(True, description="let a merged token weigh as many as it stands for")
    metric: Literal["auto", "features", "keys", "both"] = Field(
        "auto", description="what of the tokens is compared; auto: what changes answers to the data least, or features"
    )
    similarity: Literal["cosine", "euclidean"] = Field("cosine", description="which tokens count as alike")
    ward: float = Field(
        0.5, ge=0, le=1, description="power of the pair's harmonic size in the cost of a merge: large tokens stay apart"
    )
    match: Literal["bipartite", "energy"] = Field(
        "bipartite", description="who may merge: every second token, or those with the most others near them"
    )

    @property
    def needs_data(self) -> bool:
        return self.flops is not None

    @property
    def uses_data(self) -> bool:
        return self.needs_data or self.metric == "auto"

    def plan(self, view: View) -> Plan:
        given = [name for name in ("ratio", "r", "flops") if name in self.model_fields_set]
        if len(given) > 1:
            raise CompressError(f"tokens.merge: {' and '.join(given)} are both given, it must be one of them")
        if self.r == 0:
            return Plan({})
        found = around(view) if view.library == "diffusers" else after(view)
        found = {path: settings for path, settings in found.items() if self.takes(path)}
        refused = {path: why for path, why in found.items() if isinstance(why, str)}
        taken = {path: settings for path, settings in found.items() if path not in refused}
        depths = zip(taken.items(), self._amounts(len(taken)), count(), strict=False)
        edits = {path: self._settings(settings, amount, at / len(taken)) for (path, settings), amount, at in depths}
        if edits and view.library == "diffusers":
            self._check_around()
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.merge cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.merge_search import Trial, choose_metric, choose_ratios, within

        if not plan.edits or view.library == "diffusers":
            return plan
        trial = Trial.of(view, plan.edits, batches, self.apply)
        edits, notes = plan.edits, {}
        if self.flops is not None:
            edits = within(trial, edits, self.flops)
        if self.metric == "auto":
            edits, notes["metric"] = choose_metric(trial, edits)
        if self.flops is not None:
            edits, notes["schedules"] = choose_ratios(trial, edits, self.flops)
        return Plan(edits, notes=plan.notes | notes)

    def _amounts(self, blocks: int) -> list[dict]:
        """What each block merges away."""
        name, amount = ("ratio", self.ratio) if self.r is None else ("r", self.r)
        amounts = amount if isinstance(amount, tuple) else (amount,) * blocks
        if len(amounts) != blocks:
            raise CompressError(f"tokens.merge: {name} has {len(amounts)} entries, it must have {blocks}, one a block")
        return [{name: amount} for amount in amounts]

    def _check_around(self) -> None:
        wrong = "flops" if self.flops else "metric" if self.metric not in ("auto", "features") else None
        if wrong:
            raise CompressError(f"tokens.merge: {wrong} is for stacks of blocks, not for merges around attentions")

    def _settings(self, found: dict, amount: dict, depth: float) -> dict:
        rule = amount | found["rule"] | {"similarity": self.similarity, "ward": self.ward}
        rule["metric"] = "features" if self.metric == "auto" else self.metric
        if self.match == "energy":
            rule["margin"] = round(0.9 - 0.9 * depth, 6)
        if self.protect is not None:
            rule["first"] = self.protect
        return found | {"rule": rule, "proportional": self.proportional}

    def apply(self, view: View, plan: Plan) -> None:
        attentions = {attention.path: attention for attention in view.attentions()}
        for path in [path for path, settings in plan.edits.items() if "text" in settings]:
            merge_around(view, attentions[path], plan.edits[path])
        for blocks in stacks(view).values():
            edits = {block.path: plan.edits[block.path] for block in blocks if block.path in plan.edits}
            if edits:
                merge_after(view, blocks, attentions, edits)


def merge_after(view: View, blocks: list[Block], attentions: dict[str, Attention], edits: dict[str, dict]) -> None:
    """Let blocks of a stack hand on fewer tokens, and its last block all of them again."""
    tokens = Tokens()
    proportional = next(iter(edits.values()))["proportional"]
    for block in blocks:
        attend_through(view, attentions[block.attentions[0]], Sized(tokens, proportional))
        module = view.module(block.path)
        rule = Rule(**edits[block.path]["rule"]) if block.path in edits else None
        module.merge = hooks = MergeAfter(tokens, rule)
        if block is blocks[0]:
            module.register_forward_pre_hook(hooks.start)
        if rule is not None:
            part = edits[block.path]["after"]
            view.module(join(block.path, part) if part else block.path).register_forward_hook(hooks.shrink)
        if block is blocks[-1]:
            module.register_forward_hook(hooks.restore)


def merge_around(view: View, attention: Attention, settings: dict) -> None:
    """Let one attention work on fewer tokens than come in and go out."""
    tokens, module = Tokens(), view.module(attention.path)
    attend_through(view, attention, Sized(tokens, settings["proportional"], settings["text"]))
    module.merge = hooks = MergeAround(tokens, Rule(**settings["rule"]))
    module.register_forward_pre_hook(hooks.shrink, with_kwargs=True)
    module.register_forward_hook(hooks.restore)


def stacks(view: View) -> dict[str, list[Block]]:
    """The blocks that follow each other, by the path of the list that holds them."""
    found = {}
    for block in view.blocks():
        found.setdefault(parent_of(block.path), []).append(block)
    return found


def after(view: View) -> dict[str, dict | str]:
    """For every block: what a merge after it must know, or why there can be none."""
    attentions = {attention.path: attention for attention in view.attentions()}
    found = {}
    for stack, blocks in stacks(view).items():
        whys = [refusal(view, block, [attentions[path] for path in block.attentions]) for block in blocks]
        why = next(filter(None, whys), "") or stack_refusal(view, stack, blocks)
        special = "" if why else special_tokens(view.model, stack)
        why = why or (special if isinstance(special, str) else "")
        point = "" if why else merge_point(view, blocks[0].path, attentions[blocks[0].attentions[0]])
        found |= {block.path: why or {"after": point, "rule": special} for block in blocks}
        if not point:
            found[blocks[-1].path] = why or "it is the last of its stack, where a merge would save nothing"
    return found


def refusal(view: View, block: Block, attentions: list[Attention]) -> str:
    """Why this block cannot work on merged tokens, or nothing."""
    if view.library != "transformers":
        return "its model is neither of transformers nor of diffusers"
    if len(attentions) != 1:
        return f"it has {len(attentions)} attentions, it must have one"
    if attentions[0].cross:
        return "its keys come from another sequence"
    if attentions[0].causal:
        return "it is causal: merged tokens would mix positions and let early ones see late ones"
    modules = view.module(block.path), view.module(attentions[0].path)
    if any(hasattr(module, name) for module in modules for name in WINDOWS):
        return "it attends within windows of the full grid"
    return next(filter(None, map(positions, modules)), "") or attend_refusal(view, attentions[0])


def stack_refusal(view: View, stack: str, blocks: list[Block]) -> str:
    """Why a stack cannot hand merged tokens from block to block, or nothing."""
    if len(blocks) != len(list(view.module(stack).children())):
        return f"{stack} also holds layers without attention"
    if any(hasattr(view.module(block.path), "merge") for block in blocks):
        return "it merges tokens already"
    if any(hasattr(module, "out_features") for module in above(view.model, stack)):
        return "its model is a backbone that hands out the tokens between its blocks"
    return ""


def around(view: View) -> dict[str, dict | str]:
    """For every attention of a diffusion model: what a merge around it must know, or why there can be none."""
    attentions, found, probed = view.attentions(), {}, {}
    joint = {parent_of(attention.path) for attention in attentions if attention.added}
    for attention in attentions:
        module = view.module(attention.path)
        if attention.cross:
            why = "its keys come from another sequence"
        elif getattr(module, "group_norm", None) is not None or getattr(module, "spatial_norm", None) is not None:
            why = "it reads a map (B, C, H, W), not tokens"
        elif hasattr(module, "merge"):
            why = "it merges tokens already"
        else:
            why = positions(module)
        if not why and joint and parent_of(attention.path) not in joint:
            why = "its tokens may hold the text of a joint model too"
        kind = type(module), type(getattr(module, "processor", None)), bool(attention.added)
        if not why and kind not in probed:
            probed[kind] = text_side(view, attention)
        side, why = ("", why) if why else probed[kind]
        found[attention.path] = why or {"rule": {}, "text": side}
    return found
