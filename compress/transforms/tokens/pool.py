"""Average the grid of an image's tokens two by two between blocks: the control that any merging has to beat.

From the attention of the blocks named on, each cell of two by two tokens goes on as its mean, so that a quarter of the
tokens is left; an odd grid has narrow cells at its right and lower edge. A token that stands for s others counts s
times, in later means and as a key: log s is added to its attention logits. Class, distillation and register tokens stay
as they are. The last block's output is copied back to all places, so that pooling, dense heads and patch features find
every token where it was. It looks at no token, costs next to nothing and works for images of any size. Needs no data;
where there is some, the MLPs are refit in closed form to what the whole tokens were, as in tokens.merge (`repair`),
which gains most here: a CIFAR-10 classifier at .587 of the FLOPs has a mean KL of .496 without and .141 with 512 images
(1,000 others, accuracy .858: .654 and .783).

When it hurts: it averages over edges as over sky; what merging by likeness (tokens.merge) gains over it is what looking
at the tokens is worth. A CIFAR-10 classifier of 9 blocks (65 tokens, 500 images, accuracy .812) kept .764 at .83 and
.750 at .75 of the FLOPs, with a mean KL of .082 and .157; tokens.merge at .75 kept .810 with .012. Early blocks suffer
most: prefer late ones. Dense prediction loses the detail inside a cell. Hidden states asked for from between the blocks
have fewer tokens than the input. Only for vision transformers that keep one grid of patches; not for windows and
relative positions. Rotary positions go with the tokens (DINOv3): that of a cell's first token is its position.

Papers: none of its own; fixed pooling with training in "Rethinking Spatial Dimensions of Vision Transformers", Heo,
Yun, Han, Chun, Choe, Oh, 2021; log s as in "Token Merging: Your ViT But Faster", Bolya, Fu, Dai, Zhang, Feichtenhofer,
Hoffman, 2023.
"""

from __future__ import annotations

from typing import ClassVar

from compress.errors import CompressError
from compress.nn.token_pool import PoolAfter
from compress.nn.window import ImageSize
from compress.token_layout import watch
from compress.token_stacks import chosen, grid, hand_on_fewer, shrinkable, stacks, weighing
from compress.transform import Field, Plan, Transform
from compress.view import View


class Pool(Transform):
    """Two by two average pooling of image tokens."""

    neutral: ClassVar[dict] = {"blocks": ()}
    example: ClassVar[dict] = {"blocks": (0,)}

    blocks: tuple[int, ...] | None = Field(
        None, description="blocks after which it pools, counted from 0; the last of the first half if not given"
    )
    proportional: bool = Field(True, description="let a pooled token weigh as many as it stands for")
    repair: bool = Field(True, description="refit the MLPs to what the whole tokens were, where there is data")

    @property
    def uses_data(self) -> bool:
        return self.repair

    def plan(self, view: View) -> Plan:
        if self.blocks == ():
            return Plan({})
        blocks = chosen(view, "tokens.pool", self.blocks, lambda length: {max(length // 2 - 1, 0)})
        blocks = {block.path: block for block in blocks if self.takes(block.path)}
        edits, refused = {}, {}
        for path, found in shrinkable(view, list(blocks.values())).items():
            patch = found if isinstance(found, str) else grid(view, blocks[path])
            if isinstance(patch, str):
                refused[path] = patch
            else:
                rest = {key: value for key, value in found.items() if key != "rule"}
                edits[path] = rest | {"first": found["rule"]["first"], "patch": patch}
        for members in stacks(view).values():
            for times, block in enumerate(block for block in members if block.path in edits):
                edits[block.path] |= {"times": times, "proportional": self.proportional}
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.pool cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.token_repair import repaired

        if not plan.edits or not self.repair:
            return plan
        return repaired(view, plan, batches, self.apply, max(edit["first"] for edit in plan.edits.values()))

    def apply(self, view: View, plan: Plan) -> None:
        size = ImageSize()

        def hooks(tokens, edit):
            return PoolAfter(tokens, size, **{key: edit[key] for key in ("first", "patch", "times")})

        hand_on_fewer(view, plan.edits, weighing(plan.edits), hooks)
        watch(view, list(plan.edits), size)
