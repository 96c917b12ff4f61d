"""Let every token attend to its neighbourhood only, so that attention costs grow linearly with the number of tokens.

Text and audio: keys at most `window` tokens away (in a causal model: behind), and the first `special` tokens of the
sequence for everyone. In a causal model these are the attention sinks, without which windowed decoders collapse; in an
encoder they also see everything, as a class token must. A decoded token reads only its window from the cache, so its
cost does not grow with the context (the cache itself still holds all keys). Images: keys at most `radius` grid steps
away, a disc as in CLEAR; class, register and text tokens see everything and are seen by all. The grid follows the image
of each call.

`distill` steps of layer-wise training let the projections of each attention make up for what the window hides: other
weights, same model. Every layer learns from the model as it was; the inputs and answers of all of them are held in
memory meanwhile. (60 steps on 2304 tokens brought SmolLM2-135M at window 64 from perplexity 42.3 to 38.1 on 4096
others; 23.1 before.)

When it hurts: on a GPU there is no speed-up below 4 to 8 thousand tokens, only loss; a 1024-pixel image of a latent
model has 4096, and there its text already dominates the cost. On a CPU attention itself gets faster from about 600
tokens on, and a whole SmolLM2-135M at 2048 tokens by about a quarter (window 256). Facts outside the window are gone
for good: retrieval over long texts fails, and small radii repeat objects in large images. SmolLM2-135M on 2048 tokens
of wikitext goes from perplexity 24.1 to 33.3 at window 256, to 48.3 at 64, and to 145.9 at 64 without sinks, all
untrained. Padded batches and models with learned position biases build a full mask and gain nothing but cheaper
decoding. Attention weights cannot be asked for.

Papers: "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", Liu, Tan, Wang, 2024; "Efficient
Streaming Language Models with Attention Sinks", Xiao, Tian, Chen, Han, Lewis, 2023.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compress.attend import attend_module, attend_through, refusal
from compress.errors import CompressError
from compress.nn.window import ImageSize, ImageWindow, TextWindow
from compress.token_layout import patch_size, watch
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View


class Window(Transform):
    """Window attention for sequences and a disc for images."""

    neutral: ClassVar[dict] = {"window": 0, "radius": 0}
    example: ClassVar[dict] = {"window": 2, "special": 1, "radius": 1}

    window: int = Field(0, ge=0, description="how far a token of a sequence sees; 0 leaves sequences alone")
    special: int = Field(4, ge=0, description="first tokens of a sequence that all see (attention sinks, class token)")
    radius: int = Field(0, ge=0, description="how far a token of an image sees, in grid steps; 0 leaves images alone")
    distill: int = Field(0, ge=0, description="training steps per layer on the calibration data")

    @property
    def needs_data(self) -> bool:
        return self.distill > 0

    def plan(self, view: View) -> Plan:
        edits, refused, attentions = {}, {}, view.attentions()
        side = text_side(view, attentions) if self.radius else None
        for attention in attentions:
            if not self.takes(attention.path):
                continue
            settings = self.settings(view, attention, side)
            if isinstance(settings, str):
                refused[attention.path] = settings
            else:
                edits[attention.path] = settings
        if self.only and refused:
            path, why = next(iter(refused.items()))
            raise CompressError(f"linear.window cannot change {path}: {why}")
        return Plan(edits, notes={"refused": refused})

    def settings(self, view: View, attention: Attention, side: str | None) -> dict | str:
        """The edit of one attention, or why it stays as it is."""
        if attention.cross:
            return "its keys are another sequence"
        if why := refusal(view, attention) or own_window(view.module(attention.path)):
            return why
        config = getattr(view.module(attention.path), "config", None) or getattr(view.model, "config", None)
        if view.library == "diffusers" or (not attention.causal and hasattr(config, "patch_size")):
            return self.image(config, side)
        if not self.window:
            return "its tokens are a sequence; give a window"
        length = getattr(config, "max_position_embeddings", None)
        if length and length <= self.window + 1:
            return f"the window covers all {length} positions"
        return {"window": self.window, "special": self.special, "causal": attention.causal}

    def image(self, config, side: str | None) -> dict | str:
        """The edit of an attention over image tokens."""
        if not self.radius:
            return "its tokens are an image; give a radius"
        patch = patch_size(config)
        if isinstance(patch, str):
            return patch
        size = getattr(config, "image_size", None) or getattr(config, "sample_size", None)
        height, width = (size, size) if isinstance(size, int) else size or (None, None)
        if height and (height // patch - 1) ** 2 + (width // patch - 1) ** 2 <= self.radius**2:
            return f"the radius covers all of {height // patch} x {width // patch} tokens"
        return {"radius": self.radius, "patch": patch, "text": side}

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        if not self.distill:
            return plan
        taught = distill(view, plan.edits, batches, self.distill)
        for weights, _ in taught.values():  # only now, so that every layer learned from the model as it was
            for name, weight in weights.items():
                view.module(name).load_state_dict(weight)
        losses = {path: {"before": before, "after": after} for path, (_, (before, after)) in taught.items()}
        return Plan(plan.edits, notes=plan.notes | {"distill": losses})

    def apply(self, view: View, plan: Plan) -> None:
        size, known = ImageSize(), {attention.path: attention for attention in view.attentions()}
        for path, settings in plan.edits.items():
            attend_through(view, known.get(path) or view.attention(path), core_of(path, settings, size))
        watch(view, [path for path, settings in plan.edits.items() if "radius" in settings], size)


def core_of(path: str, settings: dict, size: ImageSize) -> nn.Module:
    """The core that an edit asks for."""
    return ImageWindow(path, size=size, **settings) if "radius" in settings else TextWindow(**settings)


def own_window(module: nn.Module) -> str:
    """Is this attention local already?"""
    config = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and layer < len(kinds):
        local = kinds[layer] != "full_attention"
    else:
        local = hasattr(config, "window_size") or getattr(config, "sliding_window", None)
    return "it attends within a window of its own" if local else ""


def text_side(view: View, attentions: list[Attention]) -> str | None:
    """Where the text of joint attention stands, seen from a call on the meta device; None where there is no text."""
    attention = next((attention for attention in attentions if attention.added), None)
    if attention is None:
        return None
    image, text, sides = 5, 3, set()

    class Joined(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.cat and image + text in out.shape:
                sides.add("last" if image in args[0][0].shape else "first")
            return out

    module = deepcopy(view.module(attention.path)).to("meta")
    widths = [view.module(path).in_features for path in (attention.q, attention.added["q"])]
    tokens = [torch.empty(1, count, width, device="meta") for count, width in zip((image, text), widths, strict=True)]
    with Joined(), torch.no_grad():
        module(hidden_states=tokens[0], encoder_hidden_states=tokens[1])
    if len(sides) != 1:
        raise CompressError(f"{attention.path}: linear.window cannot tell where its text tokens stand")
    return sides.pop()


def distill(view: View, edits: dict[str, dict], batches: list[dict], steps: int) -> dict[str, tuple[dict, tuple]]:
    """By path: projections of a windowed copy trained towards the full attention, and the error before and after."""
    from compress.distill import fit, record_calls

    size = ImageSize()
    hooks = watch(view, list(edits), size)
    try:
        calls = record_calls(
            view.model, {path: view.module(path) for path in edits}, batches, lambda: vars(size).copy()
        )
    finally:
        for hook in hooks:
            hook.remove()
    taught = {}
    for path, settings in edits.items():
        student = deepcopy(view.module(path)).requires_grad_(False)
        attend_module(student, view.library, core_of(path, settings, size))
        inside = [p for p in view.attention(path).projections().values() if p.startswith(path + ".")]
        trained = {p: student.get_submodule(p[len(path) + 1 :]) for p in inside}
        weights = [weight.requires_grad_() for projection in trained.values() for weight in projection.parameters()]
        errors = fit(student, weights, calls.pop(path), vars(size).update, steps, view.trainings)
        taught[path] = {p: projection.state_dict() for p, projection in trained.items()}, errors
    return taught
