"""int8 weights and int8 activations (W8A8): one scale an output channel, one range a token found at run time.

The linear layers take a quarter of their float32 size and run on the processor's int8 units. On a CPU with AVX512-VNNI,
a C compiler and many tokens they are 6 to 8 times faster than torch's float32, 3 times faster than the best float32 and
1.5 times faster than the best bf16 path. A CPU with AVX2 only has no such units: by products of words they are there
1.3 to 1.7 times faster than torch's float32, and 1.7 to 3.1 times at a few tokens (AMD Zen 3). The range per token is
what keeps language models usable: one for the whole tensor, as torch's dynamic quantization has it, doubled the
perplexity of SmolLM2-135M.

It works without data, and better with it. Where the recipe has a `calibrate` section, loud channels are evened out
(`smooth`): x * v meets W / v, with the v that loses least on rows of the data. Where norms, values or gated branches in
front can take v over without a trace it is folded into them, elsewhere the layer keeps it; `smooth: fold` does only the
former, which formats for other readers need. Then weights are rounded by GPTQ where that loses less on rows that it has
not seen. Relative errors of the last hidden state without and with data: MiniLM .048 and .028, DINOv2-S .028 and .015;
of a diffusion UNet along its sampling .032 and .002. `group` gives every so many channels of a token a range of their
own: with 192, MiniLM goes from .034 to .027 on texts of 128 tokens, for 3 % of its speed. `activations: static` fixes
one range a layer from the data.

`embeddings` also stores embedding tables as int8 rows, half the size of a small encoder, at no cost in speed. The
output head stays as it is unless `head` asks for it; a table that is tied to it then holds the same codes, once.

When it hurts: without a C compiler torch's own operators run, and at some ten tokens a narrow layer (384 to 1536) is
slower than in bf16 then. Fixed ranges lose more, on MiniLM twice as much. Calibration takes minutes, and on data unlike
that of use its factors fit less well. With neither AVX-512 nor AVX2 it only saves memory, and takes longer.

Papers: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
NeurIPS 2022; Yao, Aminabadi, Zhang, Wu, Li, He, "ZeroQuant: Efficient and Affordable Post-Training Quantization for
Large-Scale Transformers", NeurIPS 2022 (scales per token); Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate
and Efficient Post-Training Quantization for Large Language Models", ICML 2023; Frantar, Ashkboos, Hoefler, Alistarh,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from torch import Tensor, nn

from compress.attend import attend_through, refusal
from compress.errors import CompressError, one_of
from compress.linears import check_finite, output_heads, swap, takeable, weight_owners
from compress.nn.fused_attention import FusedAttention
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear
from compress.nn.int8_mlp import Int8Mlp
from compress.roles import is_linear, join, parent_of
from compress.transform import Field, Plan, Transform
from compress.view import View

NARROW = 32  # an embedding row below this hardly shrinks


class Int8(Transform):
    """Linear layers in int8, weights and activations."""

    smooth: Literal["auto", "fold", "off"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description="even out channels: auto searches a factor for every layer, fold only those that other weights "
        "can take over, a number is the share that the weights take of all",
    )
    solver: Literal["auto", "rtn", "gptq"] = Field("auto", description="rounding of the weights; auto: what loses less")
    activations: Literal["dynamic", "static"] = Field("dynamic", description="a range per token, or one from the data")
    embeddings: bool = Field(False, description="also store embedding tables as int8 rows")
    head: bool = Field(False, description="also take the output head, and an embedding table tied to it")
    group: int = Field(
        0,
        ge=0,
        multiple_of=64,
        description="how many input channels share a range within a token; 0: all, which the formats of others need",
    )
    fuse: Literal["encoders", "all", "off"] = Field(
        "encoders",
        description="in which of transformers' models our kernels compute softmax and activations too; all: anywhere, "
        "whatever `only` names, and a decoder loses the formats that others load by it",
    )

    @property
    def uses_data(self) -> bool:
        return self.smooth != "off" or self.solver != "rtn" or self.activations == "static" or self.fuse != "off"

    @property
    def needs_data(self) -> bool:
        return self.smooth not in ("auto", "off") or self.solver == "gptq" or self.activations == "static"

    def plan(self, view: View) -> Plan:
        if self.group and self.activations == "static":
            raise CompressError(
                "quantize.int8: group parts ranges found per token, with activations: static it must be 0"
            )
        tied, left_tied = tied_heads(view, self) if self.head else ({}, {})
        taken, refused = takeable(view, self, "quantize.int8", self.head, besides=tied)
        if self.embeddings:
            tables, left = embeddings(view, self)
            taken, refused = taken | tables, refused | left
        refused = {path: why for path, why in (refused | left_tied).items() if path not in tied}
        remarks = [f"{one_of(tied, 9)} hold the same int8 rows"] if tied else []
        edits = {path: {"bits": 8} for path in taken | tied}
        for path in edits if self.group else ():
            if is_linear(view.module(path)):
                edits[path]["group"] = self.group
        if edits and self.fuses(view):
            edits |= {path: {"attention": True} for path in softmaxes(view, self)}
        return Plan(edits, notes={"refused": refused, "remarks": remarks})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.activations import find_activations
        from compress.emit import probe_inputs
        from compress.int8_calibration import Fit

        heads = output_heads(view)
        paths = [path for path in plan.edits if is_linear(view.module(path)) and not heads.get(path)]
        static = self.activations == "static"
        fitted = Fit(view, self.smooth, self.solver, static, self.group).run(paths, batches)
        edits = {path: edit | fitted.settings.get(path, {}) for path, edit in plan.edits.items()}
        if self.fuses(view):
            joinable = set() if static else fitted.alone
            probe = probe_inputs(view.model, batches[0], tokens=32)
            for number, (path, edit) in enumerate(find_activations(view, set(paths), joinable, probe).items()):
                edits[path] |= {name: edit[name] for name in ("activation", "instead of")}
                for one in (path, edit["then"]) if "then" in edit else ():
                    edits[one]["pair"] = number  # not by its path, which a checkpoint may load under another one
        remarks = plan.notes["remarks"] + fitted.notes.pop("remarks", [])
        return Plan(edits, fitted.tensors, plan.notes | fitted.notes | {"remarks": remarks})

    def fuses(self, view: View) -> bool:
        """Are softmax and activations of this model ours to compute?"""
        causal = any(attention.causal for attention in view.attentions())
        return view.library == "transformers" and (self.fuse == "all" or self.fuse == "encoders" and not causal)

    def apply(self, view: View, plan: Plan) -> None:
        layers = {path: edit for path, edit in plan.edits.items() if "attention" not in edit}
        attentions = [view.attention(path) for path in plan.edits if path not in layers]
        swap(view, layers, lambda path, module, edit: build(path, module, edit, plan.tensors))
        seconds = {edit["pair"]: path for path, edit in layers.items() if "pair" in edit and "activation" not in edit}
        for path, edit in layers.items():
            if "activation" in edit:
                view.replace(join(parent_of(path), edit["instead of"]), nn.Identity())
            if "activation" in edit and "pair" in edit:
                second = seconds[edit["pair"]]
                view.replace(path, Int8Mlp(view.module(path), view.module(second)))
                view.replace(second, nn.Identity())
        for attention in attentions:
            attend_through(view, attention, FusedAttention())


def build(path: str, module: nn.Module, edit: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """The int8 layer for this layer; what calibration fitted is in `tensors`, or still to be loaded."""
    if isinstance(module, nn.Embedding):
        return Int8Embedding.from_embedding(module)
    nearest, weight = Int8Linear.from_linear(module), module.weight
    parts = {"weight": nearest.weight.data, "weight_scale": nearest.weight_scale.data}
    if edit.get("factor"):
        parts["input_factor"] = weight.new_ones(nearest.in_features)
    if edit.get("static"):
        parts["input_scale"] = weight.new_ones(())
        parts["input_zero_point"] = weight.new_zeros(())
    fitted = {name: tensors.get(f"{path}.{name}", part) for name, part in parts.items()}
    further = {"activation": edit.get("activation", "none"), "group": edit.get("group", 0)}
    return Int8Linear(**fitted, bias=module.bias, transposed=nearest.transposed, **further)


def softmaxes(view: View, method: Int8) -> list[str]:
    """The attentions whose softmax is ours to compute."""
    chosen = method.model_copy(update={"only": ()}) if method.fuse == "all" else method
    return [
        attention.path
        for attention in view.attentions()
        if chosen.takes(attention.path)
        and not hasattr(view.module(attention.path), "attend")
        and not refusal(view, attention)
    ]


def tied_heads(view: View, method: Int8) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Output heads with the embedding tables that hold the same weight, and why others cannot share codes."""
    owners, taken, refused = weight_owners(view), {}, {}
    for head, table in output_heads(view).items():
        members = {path: view.module(path) for path in owners[id(view.module(head).weight)]}
        left = next((path for path in members if not method.takes(path)), None)
        odd = next((path for path, module in members.items() if not is_linear(module) and not is_table(module)), None)
        if not table or left == head:
            continue
        if left or odd:
            refused[head] = f"{left} stays as it is" if left else f"{odd} is more than a table"
        else:
            check_finite(view.module(head).weight, head, "quantize.int8")
            taken |= members
    return taken, refused


def is_table(module: nn.Module) -> bool:
    """Is it an embedding that does nothing but look rows up?"""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None


def embeddings(view: View, method: Int8) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The embedding tables that can be stored as int8 rows, and why others cannot."""
    owners = Counter(id(p) for m in view.model.modules() for p in m.parameters(recurse=False))
    taken, refused = {}, {}
    for path, module in view.model.named_modules():
        if not isinstance(module, nn.Embedding) or not method.takes(path):
            continue
        if owners[id(module.weight)] > 1:
            refused[path] = "its table is also the weight of another layer"
        elif not is_table(module):
            refused[path] = "it is more than a table"
        elif module.embedding_dim < NARROW:
            refused[path] = f"its rows are narrower than {NARROW}"
        else:
            check_finite(module.weight, path, "quantize.int8")
            taken[path] = module
    return taken, refused
