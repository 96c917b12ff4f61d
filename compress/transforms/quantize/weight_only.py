"""4 or 8 bit weights with one scale a group of inputs; activations stay as they are (W4A16, W8A16).

Round to nearest, symmetric, stored as compressed-tensors stores them. Needs no data. A seventh of the float32 size
at 4 bits, a quarter at 8; generating one token at a time is about twice as fast as float32 on small layers and more
on large ones, since reading the weights is the work there. The largest value of a group takes the code -2^(bits-1)
and the scale its sign, which uses all codes: on SmolLM2-135M perplexity grew by 29 instead of 51 percent at 4 bits.

When it hurts: many tokens at once are slower than in bf16, because weights are unpacked first. quantize.int8 is the
faster choice for encoders and denoisers, and the more accurate one for language models below a billion parameters,
where 4 bits cost much. Groups at 8 bits have no fast product on a CPU. Up to some fifty tokens the products run in
bf16 also when the model is float32: their error, below 0.5 percent, stays under that of the weights.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (its round-to-nearest baseline).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from compress.linears import swap, takeable
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.transform import Field, Plan, Transform
from compress.view import View

SMALLEST = 16  # below this a scale costs more than what a finer group saves


class WeightOnly(Transform):
    """Linear layers with packed low-bit weights."""

    example: ClassVar[dict] = {"bits": 4, "group": 16}

    bits: Literal[4, 8] = Field(8, description="bits of a weight")
    group: int | None = Field(
        None,
        ge=0,
        multiple_of=SMALLEST,
        description="inputs that share a scale, 0: all (default: 64 at 4 bits, 0 at 8)",
    )

    def plan(self, view: View) -> Plan:
        taken, refused = takeable(view, self, "quantize.weight_only")
        wanted = (64 if self.bits == 4 else 0) if self.group is None else self.group
        edits, smaller = {}, {}
        for path, module in taken.items():
            width = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
            group = fitting(wanted, width)
            edits[path] = {"bits": self.bits, "group": group}
            if group != wanted:
                smaller[path] = group
        return Plan(edits, notes={"refused": refused} | ({"groups": smaller} if smaller else {}))

    def apply(self, view: View, plan: Plan) -> None:
        swap(
            view, plan.edits, lambda _, module, edit: WeightOnlyLinear.from_linear(module, edit["bits"], edit["group"])
        )


def fitting(group: int, width: int) -> int:
    """The wanted group halved until it divides the width; 0, the whole row, where no useful one does."""
    while group >= SMALLEST:
        if width % group == 0:
            return group
        group //= 2
    return 0
