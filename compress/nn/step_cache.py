"""Reuse of a denoiser's attention outputs, or of its whole stack of blocks, from one sampling step to the next.

The hooks are diffusers' own, so they live beside its offloading and caching; a `Clock` tells them when to skip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, update_wrapper

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.hooks import HookFunctionReference, HookRegistry, ModelHook
from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.step_clock import Clock, arguments

NAME = "compress_steps"  # of our hooks in diffusers' registry
BODY = "body"  # of the one cached residual, where the paths of attentions stand otherwise


class ReusedAttention(ModelHook):
    """Hook of an attention: its output before gate and residual (of a joint attention: both) is what is reused."""

    def __init__(self, clock: Clock, path: str):
        super().__init__()
        self.clock, self.path = clock, path

    def new_forward(self, module, *args, **kwargs):
        if self.clock.skips and self.path in self.clock.history:
            values = self.clock.predict(self.path)
            return values if len(values) > 1 else values[0]
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.clock.remember(self.path, output if isinstance(output, tuple) else (output,))
        return output


class ReusedBody(ModelHook):
    """Hook of one block of the span: skipped, it hands its inputs on, and the last one adds what the span added."""

    def __init__(self, clock: Clock, streams: list[str], first: bool, last: bool):
        super().__init__()
        self.clock, self.streams, self.first, self.last = clock, streams, first, last

    def new_forward(self, module, *args, **kwargs):
        clock = self.clock
        if clock.history is not None and self.first:
            clock.entry = self.inputs(module, args, kwargs)
        if clock.skips:
            outputs = self.predicted() if self.last else self.inputs(module, args, kwargs)
            return outputs if len(outputs) > 1 else outputs[0]
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last and clock.entry:
            outputs = output if isinstance(output, tuple) else (output,)
            pairs = zip(outputs, clock.entry, strict=True)
            clock.remember(BODY, tuple(None if out is None else out - entry for out, entry in pairs))
        return output

    def inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        given = arguments(module, args, kwargs)
        return tuple(given[name] for name in self.streams)

    def predicted(self) -> tuple[Tensor | None, ...]:
        """What entered the span and what the span would have added to it, for each stream."""
        pairs = zip(self.clock.entry, self.clock.predict(BODY), strict=True)
        return tuple(None if added is None else entry + added for entry, added in pairs)


class Chain:
    """What diffusers' registry does around a forward, as an object instead of a closure.

    A deepcopy leaves a closure alone: the copy would run the hooks and the weights of the original.
    """

    def __init__(self, reference: HookFunctionReference):
        self.reference = reference

    def __call__(self, module, *args, **kwargs):
        args, kwargs = self.reference.pre_forward(module, *args, **kwargs)
        return self.reference.post_forward(module, self.reference.forward(*args, **kwargs))


def add_hook(module: nn.Module, hook: ModelHook) -> None:
    """Register a diffusers hook in such a way that a deepcopy of the model has its own."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(NAME) is not None:
        raise CompressError("sharing.steps: the model already reuses its steps; it must be applied once")
    before = module.forward
    registry.register_hook(hook, NAME)
    module.forward = update_wrapper(partial(Chain(hook.fn_ref), module), before)


def block_streams(block: nn.Module) -> list[str]:
    """The arguments that a block returns, in the order in which it does; none where diffusers has no record of it."""
    try:
        known = TransformerBlockRegistry.get(type(block))
    except ValueError:
        return []
    places = {
        known.return_hidden_states_index: known.hidden_states_argument_name,
        known.return_encoder_hidden_states_index: known.encoder_hidden_states_argument_name,
    }
    return [places[place] for place in sorted(place for place in places if place is not None)]


def reuse_body(model: nn.Module, clock: Clock, blocks: Sequence[nn.Module]) -> None:
    """Skip these consecutive blocks of a denoiser in the steps that the clock skips."""
    add_hook(model, clock)
    for index, block in enumerate(blocks):
        add_hook(block, ReusedBody(clock, block_streams(block), index == 0, index == len(blocks) - 1))


def reuse_attention(model: nn.Module, clock: Clock, attentions: dict[str, nn.Module]) -> None:
    """Reuse the outputs of these attentions of a denoiser in the steps that the clock skips."""
    add_hook(model, clock)
    for path, attention in attentions.items():
        add_hook(attention, ReusedAttention(clock, path))


def reset(model: nn.Module) -> None:
    """Forget the running generation and let go of its tensors; a new generation does so by itself."""
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            hook = module._diffusers_hook.get_hook(NAME)
            if isinstance(hook, Clock):
                hook.reset()
