"""Few-bit weights and activations of vision transformers (W4A8, W6A6, W4A4), to see what they cost: simulated.

Weights are rounded by GPTQ, one scale an output channel, block by block with inputs from the blocks rounded before,
and stored packed: the checkpoint is really smaller. Activations are rounded in float to the values that `activations`
bits could hold; no kernel is behind that, so the model is slower than before and only its accuracy says something.

`activations_scale: token` finds a scale for every token at run time, and a factor per input channel is searched that
moves range from activations into weights (SmoothQuant with the power chosen by the error of the layer's output).
`tensor` has one scale a layer from the calibration data, as fixed-point hardware wants it. Then layer norms are
reparametrized: their gain and bias make the ranges of all channels alike and the linear layers behind undo it, exactly
(RepQ-ViT). Channels of extreme range may be cut before (LRP-QViT; its rule is not public, so this is a percentile of
the channels); whether to reparametrize and how far to cut is measured on the outputs of each norm's layers.
`attention` also rounds queries, keys, values and the softmax's output, the latter evenly, or to powers of 2 or of its
root, which keep small probabilities apart.

When it hurts: always in speed. With scales per token DINOv2-S lost nothing measurable at W6A6 and W4A8 (280 photos of
14 fruits: more of them right than before, 95 and 91 percent of the answers the same), but activations of four bits ruin
a model with massive activations in any setting, and one scale a layer costs more than one a token (W6A6: 2.9 points on
140 photos, 71 percent the same). Cut channels that carry function destroy a model, therefore the measuring.

Papers: Li, Xiao, Yang, Gu, "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers",
ICCV 2023; Ranjan, Savakis, "LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance
Propagation", 2024; Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", ICLR 2023.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.attend import attend_through, refusal
from compress.linears import swap, takeable
from compress.nn.simulated import SimulatedAttention, SimulatedLinear, round_to, round_tokens
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.roles import is_conv1d
from compress.transform import Field, Plan, Transform
from compress.view import View

ROWS = 8192  # tokens of the calibration data that a layer is fitted to
FEW = 1024  # of them, where many settings are compared


class Reparam(Transform):
    """Simulated few-bit linear layers and attention."""

    needs_data: ClassVar[bool] = True
    example: ClassVar[dict] = {"activations_scale": "tensor", "attention": "log_sqrt2"}

    weights: Literal[2, 3, 4, 6, 8] = Field(6, description="bits of a weight")
    activations: int = Field(6, ge=2, le=8, description="bits of an activation")
    activations_scale: Literal["token", "tensor"] = Field("token", description="what shares a scale")
    attention: Literal["float", "uniform", "log2", "log_sqrt2"] = Field(
        "float", description="how the softmax's output is rounded; not at all, nor queries, keys and values, at float"
    )

    def plan(self, view: View) -> Plan:
        taken, refused = takeable(view, self, "quantize.reparam", head=False)
        by_token = self.activations_scale == "token"
        settings = {"weights": self.weights, "activations": self.activations, "by_token": by_token}
        edits: dict = dict.fromkeys(taken, settings)
        if self.attention != "float":
            for attention in view.attentions():
                if not self.takes(attention.path):
                    continue
                if why := refusal(view, attention) or compressed(view.module(attention.path)):
                    refused[attention.path] = why
                else:
                    edits[attention.path] = {"activations": self.activations, "attention": self.attention}
        told = "activations are rounded in float: no kernel, no gain in speed; weights are stored packed"
        return Plan(edits, notes={"refused": refused, "simulated": told})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.sequential import stages

        linears = [path for path, edit in plan.edits.items() if "weights" in edit]
        places = [] if self.activations_scale == "token" else norms_before(view, linears, batches)
        tensors, chosen, hooks = {}, {}, []
        try:
            for stage in stages(view, linears, batches):
                rows = sampled(view, stage, batches)
                for place in places:
                    if rows.keys() >= set(place.consumers):
                        chosen[place.producer] = even(view, place, rows, self.weights, self.activations)
                for path, seen in rows.items():
                    found, hook = self.fit(view.module(path), seen)
                    tensors |= {f"{path}.{name}": tensor for name, tensor in found.items()}
                    hooks.append(view.module(path).register_forward_pre_hook(hook))
        finally:
            for hook in hooks:
                hook.remove()
        unseen = [path for path in linears if f"{path}.codes" not in tensors]
        refused = plan.notes["refused"] | dict.fromkeys(unseen, "no token of the calibration data reaches it")
        edits = {path: edit for path, edit in plan.edits.items() if path not in unseen}
        return Plan(edits, tensors, plan.notes | {"refused": refused, "evened": chosen})

    def fit(self, module: nn.Module, rows: Tensor) -> tuple[dict[str, Tensor], Callable]:
        """The tensors of a layer, and a hook with which the layer, given the rounded weight, answers as it will."""
        from compress.gptq import gptq
        from compress.ranges import balanced, static_range
        from compress.rounding import dequantize, searched

        weight, found = (module.weight.t() if is_conv1d(module) else module.weight).detach().float(), {}
        if self.activations_scale == "token":
            factor = balanced(weight, rows[:FEW], self.weights, self.activations).to(module.weight.dtype)
            weight, found["input_factor"] = weight / factor.float(), factor

            def hook(_, args):
                return (round_tokens(args[0] * factor, self.activations),)
        else:
            scale, zero = (part.to(module.weight.dtype) for part in static_range(rows, self.activations))
            found |= {"input_scale": scale, "input_zero_point": zero}

            def hook(_, args):
                return (round_to(args[0], scale, zero, self.activations),)

        rounded = hook(None, (rows,))[0].float()
        hessian = rounded.t() @ rounded
        cells = searched(weight, self.weights, 0, True, module.weight.dtype, hessian.diagonal(), norm=2)
        found |= {"codes": gptq(weight, hessian, cells), "scale": cells.scale}
        weight = dequantize(found["codes"], cells)
        module.weight.data.copy_(weight.t() if is_conv1d(module) else weight)
        return found, hook

    def apply(self, view: View, plan: Plan) -> None:
        tensors = defaultdict(dict)
        for key, tensor in plan.tensors.items():
            path, _, name = key.rpartition(".")
            tensors[path][name] = tensor
        linears = {path: edit for path, edit in plan.edits.items() if "weights" in edit}
        swap(view, linears, lambda path, module, edit: simulated(module, edit, tensors[path]))
        for path in plan.edits.keys() - linears.keys():
            edit = plan.edits[path]
            attend_through(view, view.attention(path), SimulatedAttention(edit["activations"], edit["attention"]))


def simulated(module: nn.Module, edit: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """The layer in the place of this one; without tensors only shapes."""
    if "codes" in tensors:
        scale = tensors["scale"].to(module.weight.dtype)
        packed = WeightOnlyLinear.from_codes(
            tensors["codes"], scale, None, module.bias, edit["weights"], transposed=is_conv1d(module)
        )
    else:
        packed = WeightOnlyLinear.from_linear(module, edit["weights"], 0)
    factor = module.weight.new_ones(packed.in_features) if edit["by_token"] else None
    layer = SimulatedLinear(packed, edit["activations"], factor, static=not edit["by_token"])
    for name in tensors.keys() - {"codes", "scale"}:
        getattr(layer, name).data.copy_(tensors[name])
    return layer


def compressed(module: nn.Module) -> str:
    """Does another method compute this attention already?"""
    return "its softmax is computed by another method" if hasattr(module, "attend") else ""


def norms_before(view: View, linears: list[str], batches: list[dict]) -> list:
    """The norms whose channels can be scaled without a trace and whose readers are all among these layers."""
    from compress.emit import probe_inputs
    from compress.folds import find_folds

    places = find_folds(view, probe_inputs(view.model, batches[0]))
    return [place for place in places if place.kind == "norm" and set(linears) >= set(place.consumers)]


@torch.no_grad()
def sampled(view: View, stage, batches: list[dict]) -> dict[str, Tensor]:
    """Inputs of the layers of a stage, evenly spread over the calibration data; the same tokens for all its layers."""
    from compress.outputs import inputs

    found, modules = defaultdict(list), {path: view.module(path) for path in stage.moments}
    share = max(ROWS // len(batches), 1)

    def keep(path: str):
        def hook(_, args):
            rows = args[0].flatten(0, -2)
            found[path].append(rows[:: max(len(rows) // share, 1)][:share].float())

        return hook

    hooks = [module.register_forward_pre_hook(keep(path), prepend=True) for path, module in modules.items()]
    try:
        if stage.block:
            for call in stage.calls:
                view.module(stage.block)(*call.args, **call.kwargs)
        else:
            for batch in batches:
                view.model(**inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(rows) for path, rows in found.items()}


@torch.no_grad()
def even(view: View, place, rows: dict[str, Tensor], weights: int, activations: int) -> float | None:
    """Make the ranges of a norm's channels alike where that lowers the error of its readers; the share not cut off."""
    from compress.folds import fold
    from compress.ranges import SHARES, clipped, evened, product, static_range

    norm, readers = view.module(place.producer), [view.module(path) for path in place.consumers]
    seen = rows[place.consumers[0]]
    can_shift = all(getattr(layer, "bias", None) is not None for layer in (norm, *readers))
    low, high = seen.amin(0), seen.amax(0)
    if not can_shift:
        high = torch.maximum(high, -low)
        low = -high
    weight = torch.cat([(layer.weight.t() if is_conv1d(layer) else layer.weight).float() for layer in readers])

    exact = seen[:: max(len(seen) // FEW, 1)]

    def error(ratio: Tensor, shift: Tensor) -> float:
        part, new = exact / ratio - shift, weight * ratio
        rounded = round_to(part, *static_range(part, activations), activations)
        return (product(new, rounded, weights) + new @ shift - exact @ weight.t()).square().sum().item()

    tries = {None: (torch.ones_like(low), torch.zeros_like(low))}
    tries |= {share: evened(*clipped(low, high, share)) for share in SHARES}
    errors = {share: error(*pair) for share, pair in tries.items()}
    share = min(errors, key=errors.get)
    ratio, shift = tries[share]
    fold(view, place, 1 / ratio)
    if can_shift:
        norm.bias.data.copy_(norm.bias.double() - shift)
        for layer in readers:
            new = layer.weight.t() if is_conv1d(layer) else layer.weight
            layer.bias.data.copy_(layer.bias.double() + new.double() @ shift.double())
    for path in place.consumers:
        rows[path] = rows[path] / ratio - shift
    return share
