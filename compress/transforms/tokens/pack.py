"""Let every image keep as many tokens as it needs, and pack those of all images of a batch into one sequence.

After each of the blocks named, every image keeps the fewest tokens that hold a share, `mass`, of what its tokens'
scores add up to. A score is what the class token's attention gives a token, times the length of its value, or another
that tokens.prune has too. The other tokens of the image are fused into one, their mean weighted by their scores. What
is left of all images goes on as one sequence without padding; in attention the images with equally many tokens are one
call, so that none sees another and nothing is computed that a mask would hide. With `flops` the mass is searched for
that leaves this part of the operations on average over the data. After the last block all tokens are back: those that
stopped have moved as the token did that they were fused into. Special tokens always stay and padding is left out. Each
image is answered as if it were alone. Changes no weights.

When it hurts: shapes depend on the data. torch.compile breaks the graph and compiles again for new numbers of tokens,
exports and CUDA graphs do not work, time and memory differ from batch to batch, and every packing waits for its counts.
A number of its own for each image brings little: a CIFAR-10 classifier of 9 blocks (1000 images, accuracy .808) kept
.764 with a mean KL of .111 at .75 of the FLOPs on average, where tokens.prune had .765 and .106 at .74, and
tokens.merge .792 and .010. It took .94 of the time at batch 1 and .78 at batch 32, as tokens.prune did. DINOv2-S, whose
read-out is a mean over all tokens, loses its answers where stopped tokens stay as they are (KL 6.0, 48 photos, .56 of
the FLOPs; 1.0 as it is). Rounding, which differs with the size of the batch, can move a token across the limit. Without
data, as in a plan, operations are counted for as many tokens as there can be. Hidden states asked for from between the
blocks are one sequence. Not for masks beyond padding, causal decoders, windows, rotary positions and diffusion models.

Paper: "Context-Aware Token Selection and Packing for Enhanced Vision Transformer", Zhang, Li, Seo, Cao, 2024, whose
selection is trained; scores after "Adaptive Token Sampling For Efficient Vision Transformers", Fayyaz et al., 2022.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import ClassVar, Literal

from compress.errors import CompressError
from compress.nn.token_pack import Apart, Mass, PackAfter, Packed
from compress.nn.token_prune import Score
from compress.token_stacks import chosen, displaced, hand_on_fewer, shrinkable
from compress.transform import Field, Plan, Transform
from compress.transforms.tokens.prune import quarters
from compress.view import View

HALVINGS = 8  # of the span in which the mass lies


class Pack(Transform):
    """Adaptive numbers of tokens, packed."""

    neutral: ClassVar[dict] = {"mass": 1.0}
    example: ClassVar[dict] = {"mass": 0.5}

    mass: float = Field(0.9, gt=0, le=1, description="share of the tokens' importance that each image keeps at a block")
    flops: float | None = Field(
        None, gt=0, lt=1, description="part of the operations to keep on average: the mass is then found on the data"
    )
    blocks: tuple[int, ...] | None = Field(
        None, description="blocks after which tokens stop, counted from 0; those at the quarters if not given"
    )
    score: Literal["class_attention", "value_aware", "received"] = Field(
        "value_aware", description="what makes a token important"
    )

    @property
    def needs_data(self) -> bool:
        return self.flops is not None

    @property
    def uses_data(self) -> bool:
        return self.needs_data

    def plan(self, view: View) -> Plan:
        if {"mass", "flops"} <= self.model_fields_set:
            raise CompressError("tokens.pack: mass and flops are both given, it must be one of them")
        if self.mass == 1 or self.blocks == ():
            return Plan({})
        blocks = [block for block in chosen(view, "tokens.pack", self.blocks, quarters) if self.takes(block.path)]
        edits, refused = {}, {}
        for path, found in shrinkable(view, blocks, inside=False).items():
            if isinstance(found, str):
                refused[path] = found
            elif why := displaced(view, found):
                refused[path] = why
            elif self.score != "received" and not found["rule"]["first"]:
                refused[path] = "its tokens have no class token, whose attention would score them; score: received"
            else:
                rule = found["rule"] | {"mass": self.mass}
                edits[path] = found | {"rule": rule, "score": self.score}
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.pack cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        if self.flops is None or not plan.edits:
            return plan
        mass, kept = self.within(view, plan, batches)
        edits = {path: edit | {"rule": edit["rule"] | {"mass": mass}} for path, edit in plan.edits.items()}
        return Plan(edits, notes=plan.notes | {"mass": mass, "flops on the data": kept})

    def within(self, view: View, plan: Plan, batches: list[dict]) -> tuple[float, float]:
        """The largest mass that keeps to the budget on average, and the part of the operations that it leaves."""
        from compress.flops import count

        tensors = [*view.model.parameters(), *view.model.buffers()]
        model = deepcopy(view.model, {id(tensor): tensor for tensor in tensors})
        self.apply(View(model), plan)
        parts = [model.get_submodule(path).merge for path in plan.edits]
        whole = sum(count(view.model, batch) for batch in batches)

        def kept(mass: float) -> float:
            for part in parts:
                part.rule = replace(part.rule, mass=mass)
            return sum(count(model, batch) for batch in batches) / whole

        low, high, least = 0.0, 1.0, kept(0.0)
        if least > self.flops:
            raise CompressError(f"tokens.pack: flops is {self.flops:.3g}, it must be at least {least:.3g} here")
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if (share := kept(middle)) <= self.flops:
                low, least = middle, share
            else:
                high = middle
        return low, least

    def apply(self, view: View, plan: Plan) -> None:
        def cores(tokens, edit):
            return (Apart(tokens),) if edit is None else (Score(tokens, edit["score"]), Apart(tokens))

        def hooks(tokens, edit):
            return PackAfter(tokens, Mass(**edit["rule"]))

        hand_on_fewer(view, plan.edits, cores, hooks, Packed)
