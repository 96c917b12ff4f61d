"""Activations without outliers: attention heads that can do nothing by themselves, and a short distillation.

A softmax gives every token something, so heads that want to do nothing write huge values into a few channels to make
their scores extreme. `gate` lets each head turn itself down (a gate from its query, a few hundred parameters a layer);
`clip` stretches and cuts the softmax, so that it reaches zero with finite scores. Both begin as the model was. Then all
weights but embedding tables are trained together for some hundred steps, to answer as before and with a smaller
kurtosis of what the layers give (the mean of its logarithm, times `strength`). Data held out decides: where kurtosis
did not fall, or the answers moved by more than `error`, weights and attention are left as they were at the start. The
notes tell the largest value and the kurtosis of every layer before and after, and the error of the answers.

When it hurts: it is worth something only before activations are quantized with one scale for a whole tensor; scales per
token hardly need it. A short distillation does little: on MiniLM-L6 200 steps on 256 sentences brought the kurtosis
from 21 to 17 and the largest value from 10.5 to 10.1, the answers moved by 7 percent on other sentences, and 8-bit
activations with one scale a tensor were off by 15 percent in all, where 13 had been before. Five times the weights are
in memory while training. A clipped softmax needs all scores at once: no flash attention, memory grows with the square
of the tokens; prefer the gate. Trained on few texts a model forgets what is not in them.

Paper: Bondarenko, Nagel, Blankevoort, "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do
Nothing", NeurIPS 2023.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.attend import attend_through, refusal
from compress.errors import CompressError
from compress.nn.quiet_attention import ClippedSoftmax, GatedAttention
from compress.transform import Field, Plan, Transform
from compress.view import View


class Outliers(Transform):
    """Gated attention or clipped softmax, with a distillation that takes outliers away."""

    needs_data: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    example: ClassVar[dict] = {"steps": 2}

    by: Literal["gate", "clip"] = Field("gate", description="what lets a head do nothing")
    alpha: float = Field(4.0, ge=0, description="of clip: shares below about alpha / longest sequence become zero")
    zeta: float = Field(1.0, ge=1, description="of clip: upper end of the stretch")
    steps: int = Field(200, ge=1, description="of the distillation")
    strength: float = Field(0.02, ge=0, description="of the kurtosis in the loss")
    error: float = Field(0.1, gt=0, description="how far the answers may move, relative, on data held out")

    def plan(self, view: View) -> Plan:
        if self.by == "gate" and {"alpha", "zeta"} & self.model_fields_set:
            raise CompressError("quantize.outliers: alpha and zeta belong to by: clip, the gate has no such options")
        edits, refused = {}, {}
        for attention in view.attentions():
            if not self.takes(attention.path):
                continue
            why = refusal(view, attention) or ("" if attention.heads else "its heads are not known")
            if why:
                refused[attention.path] = why
            elif self.by == "gate":
                edits[attention.path] = {"heads": attention.heads, "dim": attention.head_dim}
            else:
                length = getattr(getattr(view.model, "config", None), "max_position_embeddings", None)
                edits[attention.path] = {"alpha": self.alpha, "zeta": self.zeta, "length": length}
        return Plan(edits, notes={"refused": refused})

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.teaching import Lesson, kurtosis, take_over

        student = deepcopy(view.model)
        self.apply(View(student), plan)
        lesson = Lesson(view, student, batches)
        before = lesson.examine(view.model)
        cores = [student.get_submodule(path).attend for path in plan.edits]

        def anneal(done: float) -> None:
            for core in cores:
                if isinstance(core, ClippedSoftmax):
                    wanted = [self.alpha * done, 1 + (self.zeta - 1) * done]
                    core.alpha_zeta.copy_(core.alpha_zeta.new_tensor(wanted))

        def loud(layers: list[Tensor], batch: dict) -> Tensor:
            return self.strength * torch.stack([kurtosis(x).log() for x in layers]).mean()

        tables = {id(module.weight) for module in student.modules() if isinstance(module, nn.Embedding)}
        weights = [p for p in student.parameters() if p.is_floating_point() and id(p) not in tables]
        lesson.teach(weights, self.steps, loud, anneal)
        after = lesson.examine(student)
        better = after["kurtosis"] < before["kurtosis"] and after["error"] <= self.error
        notes = plan.notes | {"before": before, "after": after, "kept": "the trained" if better else "the start"}
        if not better:
            start = {"alpha": 0.0, "zeta": 1.0} if self.by == "clip" else {}
            return Plan({path: edit | start for path, edit in plan.edits.items()}, notes=notes)
        return Plan(plan.edits, take_over(view.model, student), notes)

    def apply(self, view: View, plan: Plan) -> None:
        known = {attention.path: attention for attention in view.attentions()}
        like = next(parameter for parameter in view.model.parameters() if parameter.is_floating_point())
        for path, edit in plan.edits.items():
            core = (GatedAttention if "heads" in edit else ClippedSoftmax)(**edit, like=like)
            attend_through(view, known[path], core)
            for name, parameter in core.named_parameters(recurse=False):
                if (key := f"{path}.attend.{name}") in plan.tensors:
                    parameter.data.copy_(plan.tensors[key])
