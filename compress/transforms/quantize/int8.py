"""int8 weights and int8 activations (W8A8): one scale an output channel, one scale a token found at run time.

The linear layers take a quarter of their float32 size and run on the processor's int8 units. On a CPU with VNNI and
many tokens they are 5 to 7 times faster than torch's float32, 2 to 3 times faster than the best float32 and 1.1 to
1.5 times faster than the best bf16 path. Needs no data. The scale per token is what keeps language models usable:
one scale for the whole tensor, as torch's dynamic quantization has it, doubled the perplexity of SmolLM2-135M where
this costs 2 percent. `embeddings` also stores embedding tables as int8 rows, half the size of a small encoder, at
no cost in speed; a table that is tied to an output head stays.

When it hurts: at some ten tokens a narrow layer (384 to 1536) is slower than in bf16, because quantizing the
activations eats the gain. Activations with single huge channels lose their small ones. Without VNNI instructions it
only saves memory. A layer that has run keeps a second copy of its codes, packed for the machine; it is not saved.

Papers: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
NeurIPS 2022; Yao, Aminabadi, Zhang, Wu, Li, He, "ZeroQuant: Efficient and Affordable Post-Training Quantization for
Large-Scale Transformers", NeurIPS 2022 (scales per token).
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from compress.linears import check_finite, swap, takeable
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear
from compress.transform import Field, Plan, Transform
from compress.view import View

NARROW = 32  # an embedding row below this hardly shrinks


class Int8(Transform):
    """Linear layers in int8, weights and activations."""

    embeddings: bool = Field(False, description="also store embedding tables as int8 rows")

    def plan(self, view: View) -> Plan:
        taken, refused = takeable(view, self, "quantize.int8")
        if self.embeddings:
            tables, left = embeddings(view, self)
            taken, refused = taken | tables, refused | left
        return Plan({path: {"bits": 8} for path in taken}, notes={"refused": refused})

    def apply(self, view: View, plan: Plan) -> None:
        swap(view, plan.edits, build)


def build(path: str, module: nn.Module, settings: dict) -> nn.Module:
    """The int8 layer for this layer."""
    return Int8Embedding.from_embedding(module) if isinstance(module, nn.Embedding) else Int8Linear.from_linear(module)


def embeddings(view: View, method: Int8) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The embedding tables that can be stored as int8 rows, and why others cannot."""
    owners = Counter(id(p) for m in view.model.modules() for p in m.parameters(recurse=False))
    taken, refused = {}, {}
    for path, module in view.model.named_modules():
        if not isinstance(module, nn.Embedding) or not method.takes(path):
            continue
        if owners[id(module.weight)] > 1:
            refused[path] = "its table is also the weight of another layer"
        elif type(module).forward is not nn.Embedding.forward or module.max_norm is not None:
            refused[path] = "it is more than a table"
        elif module.embedding_dim < NARROW:
            refused[path] = f"its rows are narrower than {NARROW}"
        else:
            check_finite(module.weight, path, "quantize.int8")
            taken[path] = module
    return taken, refused
