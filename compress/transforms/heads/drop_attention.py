"""Replace whole attention layers by an affine map of each token, fitted in closed form; their keys and values are gone.

Layers go one by one: first the one whose stand-in changes the answers least (KL to the original on data held out), then
the one that does beside it, and so on. A stand-in is the least-squares fit, with a ridge chosen on data held out, of
what the attention answers on the calibration data; in encoders it also sees the mean of all tokens and the first one
(`context`), which gets a map of its own. After the choice all are fitted again from front to back, on what the tokens
are by then and towards what they were in the original (`refit`). Per token a stand-in costs a quarter of the four
projections, nothing grows with the square of the length, and there is no cache: the layers left are numbered anew. Its
weights are that quarter, too; with `context` a little more than those of the attention (the rest works once an input).

On SmolLM2-135M (WikiText windows of 256 tokens) the maps of 6 of 30 layers, on 18 thousand tokens, cost .11 nats of KL
(.26 without them), those of 12 .31; on DINOv2-S 3 of 12 cost .08 (8.6 for the three that cosines name, without maps).

Known methods as settings: `by: cosine, stand_in: nothing` (LLM-Drop), `by: bound, context: false, refit: false` (NBL),
`by: entropy, stand_in: nothing` (the choice of lambda-ViT, without its training).

When it hurts: a stand-in of a decoder looks at no other token, so what is copied or looked up from far back suffers
first, more than perplexity says; look at long contexts too. The cache is that of fewer layers than the config names,
which our loading code knows and other engines do not. The choice takes a few forwards for each layer that goes.

Papers: Lin, Lyu, Liu, Tang, Liang, Song, Chang, "MLP Can Be a Good Transformer Learner", CVPR 2024; He, Sun, Shen, Li,
"What Matters in Transformers? Not All Attention is Needed", 2024; Erdogan, Tonin, Cevher, "Efficient Large Language
Model Inference with Neural Block Linearization", 2025.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from compress.errors import CompressError
from compress.nn.stand_in import Nothing, StandIn
from compress.roles import parent_of, width_in, width_out
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View


class DropAttention(Transform):
    """Whole attention layers replaced by fitted maps, or by nothing."""

    needs_data: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"remove": 0}
    example: ClassVar[dict] = {"remove": 1}

    remove: int = Field(1, ge=0, description="how many attention layers go")
    by: Literal["kl", "entropy", "cosine", "bound"] = Field("kl", description="what tells which ones go")
    stand_in: Literal["affine", "nothing"] = Field("affine", description="what comes in their place")
    context: bool = Field(True, description="of encoders: stand-ins also see the mean token and the first one")
    refit: bool = Field(True, description="fit the chosen ones again, on the tokens as they are by then")
    probe: int = Field(2, ge=1, description="batches, of the quarter held out, that candidates are compared on")

    def plan(self, view: View) -> Plan:
        if self.remove == 0:
            return Plan({})
        edits, refused = self.candidates(view)
        if self.only and refused and not edits or 0 < len(edits) < self.remove:
            path, why = next(iter(refused.items()), ("the others", "only or except leaves them out"))
            raise CompressError(f"heads.drop_attention can take {len(edits)} of {self.remove}; {path}: {why}")
        if edits and self.remove >= len(view.attentions()):
            raise CompressError(f"heads.drop_attention: remove is {self.remove}, one attention at least must stay")
        chosen = list(edits)[-self.remove :]  # in their place until there is data
        return Plan({path: edits[path] for path in chosen}, notes={"refused": refused})

    def candidates(self, view: View) -> tuple[dict[str, dict], dict[str, str]]:
        """The edits of all attentions that may go, and why others may not."""
        from compress.dispensable import dispensable

        edits, refused = {}, {}
        for attention in view.attentions():
            if self.takes(attention.path):
                found = dispensable(view, attention)
                if isinstance(found, str):
                    refused[attention.path] = found
                else:
                    context = self.context and not attention.causal
                    edits[attention.path] = found | {"affine": self.stand_in == "affine", "context": context}
        return edits, refused

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.dispensable import choose
        from compress.stand_ins import Place

        if not plan.edits:
            return plan
        edits, _ = self.candidates(view)
        known = {attention.path: attention for attention in view.attentions()}
        places = [
            Place(
                path,
                view.module(path),
                view.module(known[path].o) if outside(known[path]) else None,
                stand_in(view, known[path], edit),
            )
            for path, edit in edits.items()
        ]
        chosen, notes = choose(view, places, batches, self.by, self.remove, self.probe, self.refit)
        tensors = {
            f"{place.path}.{name}": tensor for place in chosen for name, tensor in place.stand_in.state_dict().items()
        }
        gone = {place.path for place in chosen}
        return Plan({path: edit for path, edit in edits.items() if path in gone}, tensors, plan.notes | notes)

    def apply(self, view: View, plan: Plan) -> None:
        stacks = {block.path: parent_of(block.path) for block in view.blocks()}
        gone = {at.path: at for at in view.attentions() if at.path in plan.edits}
        left = [at for at in view.attentions() if at.path not in plan.edits]
        for path, attention in gone.items():
            module = stand_in(view, attention, plan.edits[path])
            for name, parameter in module.named_parameters():
                if f"{path}.{name}" in plan.tensors:
                    parameter.data.copy_(plan.tensors[f"{path}.{name}"])
            view.replace(path, module)
            if outside(attention):
                view.replace(attention.o, nn.Identity())
        number(view, left, stacks)


def outside(attention: Attention) -> bool:
    """Does the output projection lie beside the attention (BERT), so that it has to go by itself?"""
    return not attention.o.startswith(attention.path + ".")


def stand_in(view: View, attention: Attention, edit: dict) -> nn.Module:
    """What comes in the place of an attention, still without its weights."""
    if not edit["affine"]:
        return Nothing(edit["pair"])
    linears = attention.projections()
    output = view.module(attention.o)
    width = width_in(view.module(linears.get("q") or linears["qkv"]))
    module = StandIn(width, width_out(output), edit["context"], edit["pair"], output.weight)
    return module.requires_grad_(output.weight.requires_grad)


def number(view: View, left: list[Attention], stacks: dict[str, str]) -> None:
    """Give the attentions that stay consecutive places in the cache; it reads the length of the text off the first."""
    known: dict[str, int] = {}
    for attention in left:
        module = view.module(attention.path)
        stack = next((stacks[block] for block in stacks if attention.path.startswith(block + ".")), None)
        if attention.cross or stack is None or not isinstance(getattr(module, "layer_idx", None), int):
            continue
        module.layer_idx = known.get(stack, 0)
        known[stack] = module.layer_idx + 1
