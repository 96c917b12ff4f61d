"""Merge the tokens of an image around each self-attention of a diffusion model or Swin transformer, and copy back.

The first token of every cell of cell x cell stays; the others propose the nearest first token of a cell, of the whole
image or of cells at most `reach` away, so that matching costs a few products a token however large the image is. The
strongest proposals, a share of `ratio` of all tokens, are merged into their size-weighted mean, and a merged token
counts as many times as a key as it stands for (`proportional`). All else in the model works on the full image; the text
of a joint attention is left alone. A matching can serve the attentions of several `blocks` in a row and several
sampling `steps`, since neighbours see alike images; with `pair` the conditional and the unconditional half of a batch
have one matching. A call that continues no generation is always matched anew. Where attention reads windows of the
image one by one (Swin), tokens are merged within each, those of places that a shifted window brings together last of
all, and keep the positions of the ones that stay. Needs no data and changes no weights. Equal tokens merge without an
error.

Along the sampling of a small diffusion transformer (8 x 8 tokens) a merge of a quarter was off by 6.2 % and of half by
16 %, by the paper's settings (random first tokens, cosine, all weigh alike) by 10.4 and 21.9 %; with `reach: 1` by 8.0
and 18.8 %, with one matching for three blocks by 14 and 24 % (cosine).

With half of 4096 tokens merged a transformer of width 512 took .56 to .60 of its time on two threads of a CPU. A Swin-T
with 50 and 70 % of its tokens merged did .83 and .77 of the operations, in .94 and .89 of the time on one thread.

When it hurts: small images, where attention costs little and neighbours differ; where only the attention core is to be
saved, tokens.downsample_kv. Log sizes go as an attention mask, half precision on GPUs: inside the keys. The MLPs of a
Swin transformer see all tokens: there is little to save. Attentions that read feature maps instead of tokens, rotary
positions, and windows with an attention of their own (Swin v2) are refused.

Papers: "Token Merging for Fast Stable Diffusion", Bolya, Hoffman, 2023; sizes as weights "Token Merging: Your ViT But
Faster", Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, 2023.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from compress.attend import attend_through, refusal
from compress.errors import CompressError
from compress.nn.token_merge import Sized, Tokens
from compress.nn.token_windows import MergeInWindow, MergeNear, Near, Shared, Shifted, Windowed
from compress.nn.window import ImageSize
from compress.roles import parent_of
from compress.token_layout import patch_size, positions, text_side, watch, window_side
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View


class MergeUnmerge(Transform):
    """Token merging around the self-attentions of denoisers and of windows."""

    neutral: ClassVar[dict] = {"ratio": 0.0}
    example: ClassVar[dict] = {"ratio": 0.5}

    ratio: float = Field(0.5, ge=0, lt=1, description="share of the tokens that each attention does without")
    cell: int = Field(2, ge=2, description="side of the cells of which one token always stays")
    reach: Annotated[int, Field(ge=0)] | Literal["all"] = Field("all", description="cells that a token may go")
    similarity: Literal["cosine", "euclidean"] = Field("euclidean", description="which tokens count as alike")
    proportional: bool = Field(True, description="let a merged token weigh as many as it stands for")
    least: int = Field(0, ge=0, description="smallest grid that is merged, in tokens")
    blocks: int = Field(1, ge=1, description="attentions in a row that share one matching")
    steps: int = Field(1, ge=1, description="sampling steps that share one matching")
    pair: bool = Field(False, description="the halves of a batch are one image under two conditions")

    def plan(self, view: View) -> Plan:
        if self.ratio == 0:
            return Plan({})
        if self.steps > 1 and view.library == "diffusers":
            from compress.transforms.sharing.steps import refuse_model

            if why := refuse_model(view):
                raise CompressError(f"tokens.merge_unmerge: steps is {self.steps}, it must be 1 here: {why}")
        found = {path: settings for path, settings in around(view).items() if self.takes(path)}
        refused = {path: why for path, why in found.items() if isinstance(why, str)}
        taken = [path for path in found if path not in refused]
        if self.only and refused and not taken:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.merge_unmerge cannot change {path}: {why}")
        if any("window" in found[path] for path in taken):
            shared = {"blocks": self.blocks > 1, "steps": self.steps > 1, "pair": self.pair}
            if given := next((name for name, more in shared.items() if more), ""):
                raise CompressError(
                    f"tokens.merge_unmerge: {given} is for diffusion models, windows have nothing to share"
                )
        edits = {path: found[path] | self.settings(at // self.blocks) for at, path in enumerate(taken)}
        return Plan(edits, notes={"refused": refused})

    def settings(self, group: int) -> dict:
        """What of the options a saved plan needs; attentions of one group share their matching."""
        near = {"ratio": self.ratio, "cell": self.cell, "reach": None if self.reach == "all" else self.reach}
        near |= {"similarity": self.similarity, "pair": self.pair, "least": self.least}
        return {"near": near, "proportional": self.proportional, "group": group, "steps": self.steps}

    def apply(self, view: View, plan: Plan) -> None:
        if not plan.edits:
            return
        known = {attention.path: attention for attention in view.attentions()}
        if "window" in next(iter(plan.edits.values())):
            for path, edit in plan.edits.items():
                within_windows(view, known[path], edit)
            return
        size, clock = ImageSize(), None
        steps = next(iter(plan.edits.values()))["steps"]
        watch(view, list(plan.edits), size)
        shared = {edit["group"]: Shared() for edit in plan.edits.values()}
        for each in shared.values():
            view.model.register_forward_pre_hook(each.clear)
        if steps > 1:
            from compress.nn.step_cache import add_hook
            from compress.nn.step_clock import Clock

            clock = Clock(steps, 0, 1)
            add_hook(view.model, clock)
        for path, edit in plan.edits.items():
            tokens, module = Tokens(), view.module(path)
            attend_through(view, known[path], Sized(tokens, edit["proportional"], edit["text"]))
            hooks = MergeNear(path, tokens, Near(**edit["near"]), edit["patch"], size, shared[edit["group"]], clock)
            module.merge = hooks
            module.register_forward_pre_hook(hooks.shrink, with_kwargs=True)
            module.register_forward_hook(hooks.restore)


def within_windows(view: View, attention: Attention, edit: dict) -> None:
    """Merge the tokens of every window that this attention reads."""
    tokens, module = Windowed(), view.module(attention.path)
    attend_through(view, attention, Sized(tokens, edit["proportional"]))
    attend_through(view, attention, Shifted(tokens))
    module.merge = hooks = MergeInWindow(attention.path, tokens, Near(**edit["near"]), edit["window"])
    module.register_forward_pre_hook(hooks.shrink, with_kwargs=True)
    module.register_forward_hook(hooks.restore)


def windows(view: View, attentions: list[Attention]) -> dict[str, dict | str]:
    """For every attention of another model: the side of the windows that it reads, or why there are none."""
    found, sides = {}, {}
    blocks = {path: view.module(block.path) for block in view.blocks() for path in block.attentions}
    for attention in attentions:
        module = view.module(attention.path)
        why = "it merges tokens already" if hasattr(module, "merge") else refusal(view, attention)
        if not hasattr(blocks.get(attention.path), "window_size") or attention.cross or attention.causal:
            why = "it reads no windows of an image, and its model is no diffusion model; there is tokens.merge"
        kind = type(module), getattr(blocks.get(attention.path), "window_size", None)
        if not why and kind not in sides:
            sides[kind] = window_side(view, attention)
        side = why or sides[kind]
        found[attention.path] = side if isinstance(side, str) else {"window": side}
    return found


def around(view: View) -> dict[str, dict | str]:
    """For every attention of a diffusion model: what a merge around it must know, or why there can be none."""
    attentions, found, probed = view.attentions(), {}, {}
    if view.library != "diffusers":
        return windows(view, attentions)
    joint = {parent_of(attention.path) for attention in attentions if attention.added}
    patch = patch_size(view.model.config)
    for attention in attentions:
        module = view.module(attention.path)
        if attention.cross:
            why = "its keys come from another sequence"
        elif getattr(module, "group_norm", None) is not None or getattr(module, "spatial_norm", None) is not None:
            why = "it reads a map (B, C, H, W), not tokens"
        elif hasattr(module, "merge"):
            why = "it merges tokens already"
        else:
            why = positions(module) or (patch if isinstance(patch, str) else "")
        if not why and joint and parent_of(attention.path) not in joint:
            why = "its tokens may hold the text of a joint model too"
        kind = type(module), type(getattr(module, "processor", None)), bool(attention.added)
        if not why and kind not in probed:
            probed[kind] = text_side(view, attention)
        side, why = ("", why) if why else probed[kind]
        found[attention.path] = why or {"text": side, "patch": patch}
    return found
