"""8, 6, 4, 3 or 2 bit weights with one scale a group of inputs; activations stay as they are (W4A16 and its like).

Stored as compressed-tensors stores them, and a seventh of the float32 size at 4 bits. Generating one token at a time
is faster than in float32, since reading the weights is the work there. `solver` says how codes are found: `rtn` rounds
to nearest and `hqq` fits scales to all but the largest errors, both without data; with data `awq` enlarges the weights
of inputs that carry much and moves the inverse into the layer before, `gptq` rounds input by input and lets the others
make up for what was lost, and `signround` goes on from there with gradients through a whole block. Each block is
calibrated on what the blocks before it give when rounded. `auto` takes awq's factors and, layer by layer, the solver
with the least error of the outputs on a part of the data set apart; without data it is rtn. On SmolLM2-135M 4 bits in
groups of 64 cost 30 percent of perplexity by rtn, 10 by gptq and 12 by auto, calibrated on 8192 tokens.

When it hurts: many tokens at once are no faster than in bf16, since weights are unpacked to it. quantize.int8 is the
faster choice for encoders and denoisers. Below a billion parameters 3 bits cost much. What solvers find fits the data
that they saw, and with fewer than four batches auto judges them by the same data. signround takes many times as long
as gptq. hqq beat rtn on a sentence encoder at 3 bits and lost to it on SmolLM2.
On a CPU the products run in bf16 also when the model is float32, but for one or two tokens, which lose less.

Papers: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023; Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
MLSys 2024; Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023; Cheng et al., "Optimize
Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from compress.linears import swap, takeable
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.transform import Field, Plan, Transform
from compress.view import View

FOUND = ("codes", "scale", "zero_point", "input_factor")  # what calibration may find for a layer
SMALLEST = 16  # below this a scale costs more than what a finer group saves


class WeightOnly(Transform):
    """Linear layers with packed low-bit weights."""

    example: ClassVar[dict] = {"bits": 4, "group": 16}

    bits: Literal[2, 3, 4, 6, 8] = Field(8, description="bits of a weight")
    group: int | None = Field(
        None,
        ge=0,
        multiple_of=SMALLEST,
        description="inputs that share a scale, 0: all (default: 64 below 8 bits, 0 at 8)",
    )
    symmetric: bool = Field(True, description="no zero points")
    solver: Literal["auto", "rtn", "hqq", "awq", "gptq", "signround"] = Field("auto", description="how codes are found")

    @property
    def needs_data(self) -> bool:
        """Only where the solver does."""
        return self.solver in ("awq", "gptq", "signround")

    @property
    def uses_data(self) -> bool:
        """Where the solver can."""
        return self.needs_data or self.solver == "auto"

    def plan(self, view: View) -> Plan:
        taken, refused = takeable(view, self, "quantize.weight_only")
        wanted = (0 if self.bits == 8 else 64) if self.group is None else self.group
        solver = "hqq" if self.solver == "hqq" else "rtn"  # what does without data, also for a layer that sees none
        edits, smaller = {}, {}
        for path, module in taken.items():
            width = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
            group = fitting(wanted, width)
            edits[path] = {"bits": self.bits, "group": group, "symmetric": self.symmetric, "solver": solver}
            if group != wanted:
                smaller[path] = group
        return Plan(edits, notes={"refused": refused} | ({"groups": smaller} if smaller else {}))

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.solvers import solve

        edits = {path: dict(edit) for path, edit in plan.edits.items()}
        tensors, errors = solve(view, edits, self.solver, batches)
        return Plan(edits, tensors, plan.notes | {"errors": errors})

    def apply(self, view: View, plan: Plan) -> None:
        swap(view, plan.edits, lambda path, module, edit: built(path, module, edit, plan.tensors))


def built(path: str, module: nn.Module, edit: dict, tensors: dict[str, torch.Tensor]) -> WeightOnlyLinear:
    """The layer from what a solver found, else from the weight as it is; on the meta device only its shapes."""
    weight, transposed = module.weight, not isinstance(module, nn.Linear)
    settings = edit["bits"], edit["group"], edit["symmetric"]
    codes, scale, zero, factor = (tensors.get(f"{path}.{name}") for name in FOUND)
    if codes is None and edit["solver"] == "hqq" and not weight.is_meta:
        from compress.rounding import hqq, rtn

        rows = weight.t() if transposed else weight
        made = hqq(rows, *settings)
        codes, scale, zero = rtn(rows, made), made.scale, made.zero_point()
    if codes is None:
        factor = weight.new_empty(weight.shape[transposed ^ 1]) if "input_factor" in edit else None
        return WeightOnlyLinear.from_linear(module, *settings, factor)
    scale = scale.to(weight.dtype, copy=True)  # layers with the same inputs were solved as one, and are saved apart
    factor = None if factor is None else factor.to(weight.dtype, copy=True)
    return WeightOnlyLinear.from_codes(codes, scale, zero, module.bias, edit["bits"], factor, transposed)


def fitting(group: int, width: int) -> int:
    """The wanted group halved until it divides the width; 0, the whole row, where no useful one does."""
    while group >= SMALLEST:
        if width % group == 0:
            return group
        group //= 2
    return 0
