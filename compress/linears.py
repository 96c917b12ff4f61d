"""Which linear layers a quantizer takes, and putting the quantized layers in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container

import torch
from torch import nn

from compress.errors import CompressError
from compress.roles import is_linear
from compress.transform import Transform
from compress.view import View

HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


def takeable(
    view: View, method: Transform, name: str, head: bool = True, besides: Container[str] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear layers that `method` takes, and why others were left out; what the user named must be possible.

    An output head that shares its weight with an embedding is never among them, the others only with `head`; of those
    that the method takes `besides`, nothing is said.
    """
    attentions = {path for path, module in view.model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    sharing, heads = weight_owners(view), output_heads(view)
    taken, refused, stay = {}, {}, {}
    for path, module in (view.linears() | {path: view.module(path) for path in heads}).items():
        left = [other for other in sharing[id(module.weight)] if not method.takes(other)]
        if not method.takes(path) or path in besides:
            continue
        if heads.get(path):
            stay[path] = f"an output head that shares its weight with {heads[path]}"
        elif path in heads and not head:
            stay[path] = "an output head"
        elif path.rpartition(".")[0] in attentions:
            refused[path] = "torch's MultiheadAttention reads its weight past the layer"
        elif left:
            refused[path] = f"its weight is shared with {left[0]}, which stays as it is"
        else:
            check_finite(module.weight, path, name)
            taken[path] = module
    if method.only and (refused or stay and not taken and not besides):
        path, reason = next(iter((refused | stay).items()))
        raise CompressError(f"{name} cannot quantize {path}: {reason}")
    return taken, refused | stay


def weight_owners(view: View) -> dict[int, list[str]]:
    """The modules that hold each weight, by the identity of the weight."""
    owners = defaultdict(list)
    for path, module in view.model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            owners[id(module.weight)].append(path)
    return owners


def output_heads(view: View) -> dict[str, str]:
    """The linear layers that give logits over a vocabulary, each with the embedding it shares its weight with or ''."""
    modules, owners = dict(view.model.named_modules()), weight_owners(view)
    named = getattr(view.model, "get_output_embeddings", lambda: None)()
    found = {}
    for path, module in modules.items():
        if is_linear(module):
            tables = [other for other in owners[id(module.weight)] if isinstance(modules[other], nn.Embedding)]
            if tables or module is named:
                found[path] = next(iter(tables), "")
    return found


def check_finite(weight: torch.Tensor, path: str, name: str) -> None:
    """Refuse a weight that no scale can hold."""
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise CompressError(f"{name}: {path}.weight holds NaN or infinite values, it must be finite")


def swap(view: View, plan_edits: dict[str, dict], build: Callable[[str, nn.Module, dict], nn.Module]) -> None:
    """Put `build(path, module, settings)` in the place of each module; layers that shared a weight share it again."""
    places, built, shared = defaultdict(list), {}, {}
    for path, module in view.model.named_modules(remove_duplicate=False):
        places[id(module)].append(path)
    for path, settings in plan_edits.items():
        module = view.module(path)
        new = built[path] = build(path, module, settings)
        first = shared.setdefault(id(module.weight), new)
        for name, parameter in first.named_parameters(recurse=False):
            if name.startswith("weight"):
                setattr(new, name, parameter)
    for path, new in built.items():
        for place in places[id(view.module(path))]:
            hand_on_hooks(view.module(place), new)
            view.replace(place, new)
    tie_scales(view.model, set(built))


def hand_on_hooks(old: nn.Module, new: nn.Module) -> None:
    """What other methods hung on a layer, such as fewer tokens for keys, goes on in the one that takes its place.

    The handles of these hooks remove them from the old layer only.
    """
    for name in HOOKS:
        getattr(new, name).update(getattr(old, name))


def tie_scales(model: nn.Module, swapped: set[str]) -> None:
    """Tell transformers, which ties parameters by name, that the scales of a tied weight are tied as well."""
    known = getattr(model, "all_tied_weights_keys", None) or {}
    scales = {
        f"{target}_scale": f"{source}_scale"
        for target, source in known.items()
        if target.endswith(".weight") and {target.removesuffix(".weight"), source.removesuffix(".weight")} <= swapped
    }
    if scales:
        model.all_tied_weights_keys = known | scales
        model._tied_weights_keys = (model._tied_weights_keys or {}) | scales
