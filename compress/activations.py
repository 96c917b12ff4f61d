"""Which layers hand their output to an activation and to nothing else, so that their kernel can apply it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.outputs import relative_error, run
from compress.roles import join, parent_of
from compress.view import View
from compress_kernels.int8_linear.torch_path import FUNCTIONS

CLOSE = 1e-5


def find_activations(view: View, paths: set[str], batch: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """For each such layer the function and the name of the module beside it that would have computed it.

    Candidates are found by following tensors through one forward; that the model then answers the same is proven by
    hooks, nothing is written.
    """
    beside = {
        mlp.up[0]: [
            name
            for name, child in view.module(parent_of(mlp.up[0])).named_children()
            if not [*child.parameters(), *child.children()]
        ]
        for mlp in view.mlps()
        if len(mlp.up) == 1 and not mlp.fused_gate and mlp.up[0] in paths
    }
    found, expected = follow(view, beside, batch)
    with moved(view, found), torch.no_grad():
        same = relative_error(run(view.model, batch), expected) <= CLOSE
    return found if same else {}


def follow(view: View, beside: dict[str, list[str]], batch: dict[str, Tensor]) -> tuple[dict, Tensor]:
    """The activations that take a layer's output as it is, told by what they make of it; and the model's answer."""
    made, found, hooks = {}, {}, []

    def keep(path: str):
        return lambda module, args, output: made.__setitem__(path, output)

    def look(path: str, name: str):
        def hook(module, args, output):
            if args and made.get(path) is args[0]:
                kind = next((kind for kind, function in FUNCTIONS.items() if close(output, function(args[0]))), None)
                if kind not in (None, "none"):
                    found[path] = {"activation": kind, "instead of": name}

        return hook

    for path, names in beside.items():
        hooks.append(view.module(path).register_forward_hook(keep(path)))
        hooks += [view.module(join(parent_of(path), name)).register_forward_hook(look(path, name)) for name in names]
    try:
        with torch.no_grad():
            return found, run(view.model, batch)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def moved(view: View, found: dict[str, dict[str, str]]) -> Iterator[None]:
    """Let the layers apply their activations, and the modules beside them hand on what they are given."""
    hooks = []
    for path, edit in found.items():
        function = FUNCTIONS[edit["activation"]]
        hooks.append(view.module(path).register_forward_hook(lambda m, args, output, f=function: f(output)))
        hooks.append(silent(view, path, edit).register_forward_hook(lambda m, args, output: args[0]))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def silent(view: View, path: str, edit: dict[str, str]) -> nn.Module:
    """The module that computed the activation of this layer."""
    return view.module(join(parent_of(path), edit["instead of"]))


def close(output: object, expected: Tensor) -> bool:
    """The same but for rounding?"""
    return isinstance(output, Tensor) and output.shape == expected.shape and relative_error(output, expected) < CLOSE
