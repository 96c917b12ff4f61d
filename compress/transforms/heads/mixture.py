"""A mixture of heads: some are on for every token, of the others each token chooses its own (MoH).

`shared` heads are always on, those whose output varies most. A router chooses among the rest, so that a share of
`active` is on in all; it starts as a ridge regression from the token's queries to how much each head is about to write
beyond its mean. A head that is off writes its mean, and the output projections are refit to that by least squares. Then
routers, gates, means and output projections are distilled together for some hundred steps, to answer as before and with
a loss that spreads the tokens over the heads (`balance`). Data held out decides whether the start or the trained is
kept. With all heads active the model is what it was.

When it hurts: it is no faster. Every head is still computed for every token, since the keys and values are needed by
other tokens and no stock kernel skips single queries; the key-value cache keeps its size. It shows how many heads a
token needs, and is a start for training on. With three quarters of the heads on, the features of MiniLM-L6 were off by
14 percent (20 before the refit), and 200 steps on 192 sentences changed little. To save time, heads.prune removes heads
for all tokens, at less loss.

Paper: Jin, Zhu, Yuan, Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

from compress.attend import attend_through, refusal
from compress.errors import CompressError
from compress.nn.head_mixture import HeadMixture
from compress.transform import Field, Plan, Transform
from compress.view import Attention, View

RATE = 3e-4  # of each weight's own size; three times that made MiniLM worse on sentences held out
SLOW = "no faster: every head is computed for every token, and the key-value cache keeps its size"


class Mixture(Transform):
    """Shared and routed heads."""

    needs_data: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"active": 1.0}
    example: ClassVar[dict] = {"active": 0.5, "shared": 0.25, "steps": 2}

    active: float = Field(0.75, gt=0, le=1, description="share of the heads that is on for a token")
    shared: float = Field(0.5, gt=0, lt=1, description="share of the heads that is on for every token")
    steps: int = Field(200, ge=1, description="of the distillation")
    balance: float = Field(1e-4, ge=0, description="weight of the loss that spreads tokens over heads")

    def plan(self, view: View) -> Plan:
        if self.active < self.shared:
            raise CompressError(
                f"heads.mixture: active is {self.active:g}, it must be at least shared, {self.shared:g}"
            )
        edits, refused = {}, {}
        for attention in view.attentions():
            if not self.takes(attention.path) or self.active == 1:
                continue
            why = refusal(view, attention) or ("" if (attention.heads or 0) > 1 else "it has no heads to choose from")
            if why:
                refused[attention.path] = why
            else:
                edits[attention.path] = self.settings(attention)
        return Plan(edits, notes={"refused": refused} | ({"remarks": [SLOW]} if edits else {}))

    def settings(self, attention: Attention) -> dict[str, int]:
        """How many heads are shared and how many of the others are active; at least one of each."""
        shared = min(max(1, round(self.shared * attention.heads)), attention.heads - 1)
        active = max(1, round(self.active * attention.heads) - shared)
        widths = {"heads": attention.heads, "dim": attention.head_dim, "value_dim": attention.value_dim}
        return widths | {"shared": shared, "active": active}

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.routing import begin, unevenness
        from compress.teaching import Lesson, take_over

        student = deepcopy(view.model)
        self.apply(View(student), plan)
        cores = {path: student.get_submodule(path).attend for path in plan.edits}
        outputs = {a.path: student.get_submodule(a.o) for a in view.attentions() if a.path in cores}
        begin(student, cores, outputs, batches)
        lesson = Lesson(view, student, batches)
        start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        before = lesson.examine(student)["error"]
        if any(core.active < len(core.routed_weight) for core in cores.values()):
            trained = [weight for module in [*cores.values(), *outputs.values()] for weight in module.parameters(False)]
            with unevenness(cores) as uneven:
                lesson.teach(trained, self.steps, lambda layers, batch: self.balance * uneven(), rate=RATE)
        after = lesson.examine(student)["error"]
        if after >= before:
            student.load_state_dict(start)
        told = {"error at the start": before, "error": min(after, before)}
        return Plan(plan.edits, take_over(view.model, student), plan.notes | told)

    def apply(self, view: View, plan: Plan) -> None:
        known = {attention.path: attention for attention in view.attentions()}
        like = next(parameter for parameter in view.model.parameters() if parameter.is_floating_point())
        for path, edit in plan.edits.items():
            core = HeadMixture(**edit, like=like)
            attend_through(view, known[path], core)
            for name, tensor in core.state_dict(keep_vars=True).items():
                if (key := f"{path}.attend.{name}") in plan.tensors:
                    tensor.data.copy_(plan.tensors[key])
