"""Which linear layers a quantizer takes, and putting the quantized layers in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from compress.errors import CompressError
from compress.transform import Transform
from compress.view import View


def takeable(view: View, method: Transform, name: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear layers that `method` takes, and why others were left out; what the user named must be possible."""
    linears = view.linears()
    attentions = {path for path, module in view.model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    sharing = defaultdict(list)
    for path, module in linears.items():
        sharing[id(module.weight)].append(path)
    taken, refused = {}, {}
    for path, module in linears.items():
        left = [other for other in sharing[id(module.weight)] if not method.takes(other)]
        if not method.takes(path):
            continue
        if path.rpartition(".")[0] in attentions:
            refused[path] = "torch's MultiheadAttention reads its weight past the layer"
        elif left:
            refused[path] = f"its weight is shared with {left[0]}, which stays as it is"
        else:
            check_finite(module.weight, path, name)
            taken[path] = module
    if method.only and refused:
        path, reason = next(iter(refused.items()))
        raise CompressError(f"{name} cannot quantize {path}: {reason}")
    return taken, refused


def check_finite(weight: torch.Tensor, path: str, name: str) -> None:
    """Refuse a weight that no scale can hold."""
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise CompressError(f"{name}: {path}.weight holds NaN or infinite values, it must be finite")


def swap(view: View, plan_edits: dict[str, dict], build: Callable[[nn.Module, dict], nn.Module]) -> None:
    """Put `build(module, settings)` at every place of each module; layers that shared a weight share the new one."""
    places, built, shared = defaultdict(list), {}, {}
    for path, module in view.model.named_modules(remove_duplicate=False):
        places[id(module)].append(path)
    for path, settings in plan_edits.items():
        module = view.module(path)
        new = built[path] = build(module, settings)
        first = shared.setdefault(id(module.weight), new)
        for name, parameter in first.named_parameters(recurse=False):
            if name.startswith("weight"):
                setattr(new, name, parameter)
    for path, new in built.items():
        for place in places[id(view.module(path))]:
            view.replace(place, new)
