"""8-bit floating point (e4m3): weights with a scale a channel, tensor or block, activations with a scale a token.

Half of bf16 in memory, and on GPUs of compute capability 8.9 or later (Ada, Hopper and after them) products at twice
the rate of bf16 for many rows, also through vLLM, which reads the checkpoint. Needs no data: a floating code keeps its
relative precision over five decades, so single huge activations do not drown the small ones as they do in int8.
`scales: block` gives every 128 x 128 of a weight and every 128 channels of a token a scale of their own; layers that
do not divide get a scale a channel. `activations: none` quantizes only weights.

When it hurts: 3 bits of mantissa are coarser than int8 on well-behaved layers (3.7 against 1 percent on normal data),
so without outliers quantize.int8 is the more accurate choice. On a CPU, and on older GPUs, there are no such products:
the weights are dequantized before each one, which is slower than the original. The checkpoint can be made there for a
GPU, with a report that is right about errors and sizes, but a limit on latency is refused. Block scales run by
dequantization in torch everywhere and are fast only in vLLM.

Papers: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; block scales: DeepSeek-AI, "DeepSeek-V3 Technical
Report", 2024.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from compress.errors import CompressError
from compress.linears import swap, takeable
from compress.nn.fp8_linear import Fp8Linear
from compress.transform import Field, Plan, Transform
from compress.view import View

BLOCK = 128


class Fp8(Transform):
    """Linear layers in e4m3."""

    emulated: ClassVar[tuple[str, ...]] = ("cpu",)

    scales: Literal["channel", "tensor", "block"] = Field("channel", description="what shares a scale in a weight")
    activations: Literal["dynamic", "none"] = Field("dynamic", description="a scale per token at run time, or as it is")
    head: bool = Field(False, description="also take an output head that is not tied to an embedding")

    def plan(self, view: View) -> Plan:
        taken, refused = takeable(view, self, "quantize.fp8", self.head)
        kept = getattr(view.model, "_keep_in_fp32_modules", None) or ()
        for path in [path for path in taken if set(path.split(".")) & set(kept)]:
            del taken[path]
            refused[path] = "the model keeps it in float32"
        if self.only and refused and not taken:
            path, reason = next(iter(refused.items()))
            raise CompressError(f"quantize.fp8 cannot quantize {path}: {reason}")
        odd = [path for path, module in taken.items() if any(size % BLOCK for size in module.weight.shape)]
        edits = {}
        for path in taken:
            scales = "channel" if self.scales == "block" and path in odd else self.scales
            edits[path] = {"scales": scales, "activations": self.activations == "dynamic"}
        notes = {"refused": refused, "remarks": [remark] if (remark := slow(view.model)) else []}
        if self.scales == "block" and odd:
            notes["remarks"].append(
                f"{len(odd)} layers do not divide by {BLOCK} and have a scale a channel: {odd[0]}, …"
            )
        return Plan(edits, notes=notes)

    def apply(self, view: View, plan: Plan) -> None:
        swap(view, plan.edits, build)


def build(path: str, module: nn.Module, edit: dict) -> Fp8Linear:
    """The e4m3 layer for this layer."""
    return Fp8Linear.from_linear(module, edit["scales"], BLOCK if edit["scales"] == "block" else 0, edit["activations"])


def slow(model: nn.Module) -> str:
    """Why this machine does not show what the format is good for, or nothing."""
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return ""
    return "products of e4m3 need a GPU of compute capability 8.9; here weights are dequantized, no speed is claimed"
