"""Which layers hand their output to an activation, and that to one other layer: their kernel can compute it all."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import reduce

import torch
from torch import Tensor

from compress.outputs import relative_error, run
from compress.probing import instead
from compress.roles import join, parent_of
from compress.view import View
from compress_kernels.int8_linear.torch_path import FUNCTIONS

CLOSE = 1e-5


def find_activations(
    view: View, paths: set[str], joinable: set[str], batch: dict[str, Tensor]
) -> dict[str, dict[str, str]]:
    """For each such layer the function, the module beside it that computed it, and, if it may, the layer `then`.

    Candidates are found by following tensors through one forward; that the model then answers the same is proven by
    doing so, nothing is written.
    """
    mlps = [mlp for mlp in view.mlps() if len(mlp.up) == 1 and not mlp.fused_gate and mlp.up[0] in paths]
    found, expected = follow(view, {mlp.up[0]: mlp.down for mlp in mlps}, batch)
    joined = {path: edit for path, edit in found.items() if joinable >= {path, edit.get("then")}}
    alone = {path: {name: edit[name] for name in edit if name != "then"} for path, edit in found.items()}
    for edits in (alone | joined, alone):
        with moved(view, edits), torch.no_grad():
            if relative_error(run(view.model, batch), expected) <= CLOSE:
                return edits
    return {}


def follow(view: View, downs: dict[str, str], batch: dict[str, Tensor]) -> tuple[dict, Tensor]:
    """The activations that take a layer's output as it is, told by what they make of it; and the model's answer."""
    made, activated, found, hooks = {}, {}, {}, []

    def keep(path: str):
        return lambda module, args, output: made.__setitem__(path, output)

    def look(path: str, name: str):
        def hook(module, args, output):
            if args and made.get(path) is args[0]:
                kind = next((kind for kind, function in FUNCTIONS.items() if close(output, function(args[0]))), None)
                if kind not in (None, "none"):
                    found[path], activated[path] = {"activation": kind, "instead of": name}, output

        return hook

    def meet(path: str, down: str):
        return lambda module, args: found[path].update(then=down) if args and activated.get(path) is args[0] else None

    for path, down in downs.items():
        hooks.append(view.module(path).register_forward_hook(keep(path)))
        hooks.append(view.module(down).register_forward_pre_hook(meet(path, down)))
        for name, child in view.module(parent_of(path)).named_children():
            if not [*child.parameters(), *child.children()]:
                hooks.append(child.register_forward_hook(look(path, name)))
    try:
        with torch.no_grad():
            return found, run(view.model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def moved(view: View, found: dict[str, dict[str, str]]) -> AbstractContextManager[None]:
    """Let the layers compute what follows them, and the modules that did hand on what they are given."""
    forwards = {}
    for path, edit in found.items():
        steps = [view.module(path).forward, FUNCTIONS[edit["activation"]]]
        steps += [view.module(edit["then"]).forward] if "then" in edit else []
        forwards[view.module(path)] = lambda x, steps=steps: reduce(lambda value, step: step(value), steps, x)
        silent = [join(parent_of(path), edit["instead of"]), *([edit["then"]] if "then" in edit else [])]
        forwards |= {view.module(name): lambda x: x for name in silent}
    return instead(forwards)


def close(output: object, expected: Tensor) -> bool:
    """The same but for rounding?"""
    return isinstance(output, Tensor) and output.shape == expected.shape and relative_error(output, expected) < CLOSE
