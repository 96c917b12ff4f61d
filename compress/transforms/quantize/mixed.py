"""Mixed precision: every linear layer its own number of bits, chosen for the least loss within a budget.

How much each layer tolerates is estimated on calibration data without labels, for every choice it has: `output_kl`
quantizes one layer at a time and measures what becomes of the model's answers, at one choice for each layer; the
others follow from the error of the layer's own output, which on SmolLM2-135M predicted the measured divergence within
a factor of 1.5 from 2 to 8 bits. `fisher`, `hessian` (trace of the Gauss-Newton matrix) and `lrp` (relevance
propagation) need one forward and backward instead of a forward for each layer. Losses of layers add up, so the best
choices under a budget are a knapsack problem, which is solved exactly.

One budget: `size` of the layers' weights, `bits` a weight on average (scales and zero points included), `bops`
(multiplications times bits of both sides) or `latency`, measured layer by layer on this machine. The result is held
against the best uniform choice on calibration data that took no part, both rounded to nearest, and where that wins it
is taken; then `solver` finds the codes. A mixture's experts choose one by one where each is a layer; packed in 3-D
parameters they are left alone. Factors on inputs that a solver adds are not counted.

When it hurts: sensitivities are of single layers, and what several broken layers do together is more than their sum,
so budgets near 2 bits are predicted too well. Many choices, many kernels: what saves memory need not save time, for
which there is `latency`. Relevance says how much a layer contributes, not how it takes quantizing.

Papers: Ranjan, Savakis, "LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance
Propagation", 2024; Dong, Yao, Arfeen, Gholami, Mahoney, Keutzer, "HAWQ-V2: Hessian Aware trace-Weighted Quantization
of Neural Networks", NeurIPS 2020; Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021 (integer
program); Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from compress.errors import CompressError
from compress.linears import swap, takeable
from compress.roles import width_in
from compress.transform import Field, Plan, Transform
from compress.transforms.quantize.int8 import Int8
from compress.transforms.quantize.int8 import build as build_int8
from compress.transforms.quantize.weight_only import WeightOnly, built, fitting
from compress.view import View

Choice = Annotated[str, Field(pattern=r"^(keep|w8a8|w[23468](g(16|32|64|128))?)$")]


class Mixed(Transform):
    """Bits of each layer under a budget."""

    needs_data: ClassVar[bool] = True
    example: ClassVar[dict] = {"bits": 6.0, "group": 16, "choices": ("w8a8", "w8", "w4", "w2")}

    choices: tuple[Choice, ...] = Field(
        ("w8a8", "w8", "w6", "w4", "w3", "w2"),
        min_length=1,
        description="what a layer may become: w8a8, w8, w6, w4, w3, w2 (with g and a number: its own group), keep",
    )
    size: float | None = Field(None, gt=0, description="budget: bytes of the layers' weights, or up to 1 a share")
    bits: float | None = Field(None, gt=0, description="budget: stored bits a weight, scales included, on average")
    bops: float | None = Field(None, gt=0, le=1, description="budget: share of the bit operations")
    latency: float | None = Field(None, gt=0, description="budget: share of the layers' time, measured here")
    sensitivity: Literal["output_kl", "fisher", "hessian", "lrp"] = Field(
        "output_kl", description="how it is estimated"
    )
    group: int = Field(64, ge=0, multiple_of=16, description="inputs that share a scale below 8 bits, 0: all")
    symmetric: bool = Field(True, description="no zero points")
    solver: Literal["auto", "rtn", "hqq", "gptq"] = Field(
        "auto",
        description="how codes are found once bits are chosen, as in weight_only and int8",
    )
    probe: int = Field(4, ge=1, description="examples on which output_kl measures every layer")

    def plan(self, view: View) -> Plan:
        from compress.mixing import planned

        given = [name for name in ("size", "bits", "bops", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise CompressError(f"quantize.mixed: {' and '.join(given) or 'no budget'} given, it must be one of size, "
                                "bits, bops and latency")  # fmt: skip
        taken, refused = takeable(view, self, "quantize.mixed")
        refused |= {mlp.path: mlp.refusal for mlp in view.mlps() if "3-D" in mlp.refusal and self.takes(mlp.path)}
        return Plan(planned(self, taken, rounded) if taken else {}, notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.mixing import allocated, apart

        if not plan.edits:
            return plan
        layers = takeable(view, self, "quantize.mixed")[0]
        seen, held = apart(batches)
        edits, notes = allocated(self, view, layers, seen, held, rounded)
        refused = plan.notes["refused"] | notes["refused"]
        found = Plan(edits, notes=plan.notes | notes | {"refused": refused})
        return found if self.solver == "rtn" else solved(view, found, seen, self.solver)

    def apply(self, view: View, plan: Plan) -> None:
        swap(view, plan.edits, lambda path, module, edit: build(path, module, edit, plan.tensors))

    def settings(self, module: nn.Module) -> dict[str, dict | None]:
        """What each choice means for this layer; None: it stays as it is."""
        return {name: settings(name, self.group, self.symmetric, width_in(module)) for name in self.choices}


def settings(name: str, group: int, symmetric: bool, width: int) -> dict | None:
    """The settings of a choice for a layer with so many inputs."""
    if name == "keep":
        return None
    if name == "w8a8":
        return {"bits": 8, "activations": 8}
    bits, _, own = name[1:].partition("g")
    wanted = int(own) if own else 0 if bits == "8" else group
    return {"bits": int(bits), "group": fitting(wanted, width), "symmetric": symmetric, "solver": "rtn"}


def solved(view: View, plan: Plan, batches: list[dict], solver: str) -> Plan:
    """The plan with better codes than by rounding to nearest, found as the methods of each kind of layer find them.

    Weight-only layers come first: their solver may move factors into any layer that has no codes yet.
    """
    int8 = Int8(solver="auto" if solver == "hqq" else solver)
    for method, eight in ((WeightOnly(solver=solver), False), (int8, True)):
        own = {path: edit for path, edit in plan.edits.items() if ("activations" in edit) == eight}
        if own:
            done = method.calibrate(view, Plan(own, notes={"remarks": []}), batches)
            plan = Plan(plan.edits | done.edits, plan.tensors | done.tensors, plan.notes)
    return plan


def build(path: str, module: nn.Module, edit: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """The quantized layer, from what a solver found for it or rounded to nearest."""
    return (build_int8 if "activations" in edit else built)(path, module, edit, tensors)


def rounded(module: nn.Module, edit: dict) -> nn.Module:
    """The layer rounded to nearest."""
    return build("", module, edit, {})
