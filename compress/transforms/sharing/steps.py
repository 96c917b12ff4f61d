"""Compute a diffusion transformer only every n-th sampling step and continue its work on a straight line in between.

What the whole stack of blocks adds to its input (`reuse: body`), or what each attention returns (`reuse: attention`),
changes smoothly from one sampling step to the next. In a skipped step it is not computed but extrapolated from the last
two computed steps (`order: 1`) or taken from the last one (`order: 0`). Nothing is trained and no weight changes. The
first `warmup` steps and the last one are always computed; blocks at either end of the stack that `except` names always
run. `body` costs less memory than `attention`, saves more, and came out nearer to the original.

It serves the models that diffusers ships no cache for (DiT, PixArt, SD3), and is stored in the checkpoint. A cache
belongs to one context: the n-th call of the denoiser at a timestep, so conditional and unconditional calls never mix,
nor the two evaluations of a second-order sampler; inside `model.cache_context(name)` the n-th call of that name. It is
forgotten as soon as a call cannot be the next step of the same images, and that call is computed: a single call is
always exact.

When it hurts: with fewer than about 15 steps, on distilled few-step models, and with samplers that add much noise in
each step (where the latent turns too far it computes). ControlNet residuals and other conditions that change in every
step are noticed as well, and then nothing is saved. Compare with a sampler of fewer steps at the same cost before you
trust it. The decision is taken on the host: a synchronisation per call and a graph break under torch.compile. Memory:
one tensor of the size of the hidden states per context, two with `order: 1`; under `attention` as many per attention.

Papers: Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", 2025; Liu et al.,
"Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (TeaCache), 2024; for attention Zhao et al.,
"Real-Time Video Generation with Pyramid Attention Broadcast", 2024.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.errors import CompressError
from compress.nn.step_cache import block_streams, reuse_attention, reuse_body
from compress.nn.step_clock import Clock
from compress.transform import Field, Plan, Transform

if TYPE_CHECKING:
    from compress.view import View


class Steps(Transform):
    """Reuse of attention outputs or of the whole body from one sampling step to the next."""

    neutral: ClassVar[dict] = {"every": 1}
    example: ClassVar[dict] = {"every": 2, "warmup": 1}

    reuse: Literal["body", "attention"] = Field("body", description="reuse the stack of blocks, or each attention")
    every: int = Field(2, ge=1, description="compute every n-th step; 1 computes all")
    order: int = Field(1, ge=0, le=1, description="0 repeats the last computed step, 1 extrapolates from the last two")
    warmup: int = Field(2, ge=1, description="first steps of a generation that are always computed")

    def plan(self, view: View) -> Plan:
        paths, refused = self.sites(view)
        if refused and self.only:
            path, reason = next(iter(refused.items()))
            raise CompressError(f"sharing.steps cannot change {path}: {reason}")
        settings = self.model_dump(include={"reuse", "every", "order", "warmup"})
        edits = {path: dict(settings) for path in paths} if self.every > 1 else {}
        return Plan(edits, notes={"refused": refused})

    def sites(self, view: View) -> tuple[list[str], dict[str, str]]:
        """The blocks or attentions that are taken, and what is refused and why."""
        if reason := refuse_model(view):
            return [], {type(view.model).__name__: reason}
        if self.reuse == "body":
            blocks = [block.path for block in view.blocks() if self.takes(block.path)]
            reason = refuse_body(view, blocks)
            return ([], {type(view.model).__name__: reason}) if reason else (blocks, {})
        paths = [attention.path for attention in view.attentions() if self.takes(attention.path)]
        refused = [path for path in paths if getattr(view.module(path), "residual_connection", False)]
        return [path for path in paths if path not in refused], dict.fromkeys(
            refused, "it adds its input to its output"
        )

    def apply(self, view: View, plan: Plan) -> None:
        if not plan.edits:
            return
        settings = next(iter(plan.edits.values()))
        clock = Clock(settings["every"], settings["order"], settings["warmup"])
        if settings["reuse"] == "attention":
            reuse_attention(view.model, clock, {path: view.module(path) for path in plan.edits})
        else:
            # In the order of execution, which a saved plan need not have kept.
            paths = [block.path for block in view.blocks() if block.path in plan.edits]
            reuse_body(view.model, clock, [view.module(path) for path in paths])


def refuse_model(view: View) -> str:
    """Why the steps of this model cannot be told apart, or nothing."""
    if view.library != "diffusers" or "timestep" not in inspect.signature(type(view.model).forward).parameters:
        return "it is no diffusers denoiser whose forward takes a timestep"
    return ""


def refuse_body(view: View, paths: list[str]) -> str:
    """Why this span of blocks cannot be skipped as a whole, or nothing."""
    blocks = [block.path for block in view.blocks()]
    if not blocks:
        return "it has no stack of transformer blocks"
    stacks = {path.rpartition(".")[0] for path in blocks}
    if len(stacks) > 1 or "." in min(stacks):
        return f"its blocks are no single stack but lie in {', '.join(sorted(stacks))}; `reuse: attention` may serve"
    unknown = {type(view.module(path)).__name__ for path in paths if not block_streams(view.module(path))}
    if unknown:
        return f"diffusers does not record what {', '.join(sorted(unknown))} returns; `reuse: attention` may serve"
    start = blocks.index(paths[0]) if paths else 0
    if paths != blocks[start : start + len(paths)]:
        return "the blocks taken are not consecutive; `only` and `except` must leave one run of blocks"
    return ""
