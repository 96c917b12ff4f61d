"""Mix the tokens of an image to fewer by a small MLP, which begins from clusters and is distilled.

After each of the blocks named, an MLP of the normed tokens gives logits, and a softmax of them over the tokens tells
what each of the new tokens is made of. It begins in closed form: the places of the calibration images are clustered by
how alike their tokens are on average (Ward), so that a cluster means the same in every image, a ridge regression
foretells a token's cluster from its features, and the softmax is made as sharp as brings the tokens back best. Then
only the MLPs are distilled for some hundred steps, to the original's answers and to the tokens that its last block
hands out; data held out decide whether the start or the trained is kept. After the last block all tokens are back: each
has moved as those did that it went into. Class, distillation and register tokens are left alone; the model's own
weights do not change.

When it hurts: it loses to tokens.merge, which needs no training. A CIFAR-10 classifier of 9 blocks (512 images to learn
from, 1000 to measure, accuracy .808) kept .750 with a mean KL of .123 at .75 of the FLOPs, where tokens.prune had .765
and .106, tokens.merge .792 and .010, and only tokens.pool less, .744 and .154; and .693 with .258 at .60, where
tokens.pool had .591 and .482, tokens.merge .787 and .047. It took .86 of the time at batch 1 and .75 at batch 32 at the
first. Clusters of each image's own, instead of common ones, and weighing a new token by how many it stands for brought
nothing. The paper trains the whole model for over a hundred epochs. Each new token is made of all others, so dense
read-outs are smeared. It always leaves as many tokens, whatever the size of the image. Hidden states asked for from
between the blocks have fewer tokens than the input. Only for vision transformers that keep one grid of patches; not for
windows, rotary or relative positions.

Paper: "Self-slimmed Vision Transformer", Zong, Li, Song, Wang, Qiao, Leng, Liu, 2022.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

from compress.errors import CompressError
from compress.nn.token_slim import SlimAfter, Slimmed
from compress.token_layout import width
from compress.token_stacks import chosen, displaced, grid, hand_on_fewer, shrinkable, stacks
from compress.transform import Field, Plan, Transform
from compress.transforms.tokens.prune import quarters
from compress.view import Block, View

RATE = 4e-3  # of each weight's own size


def patches(view: View, block: Block) -> int | str:
    """How many patches an image has by the config, or why that is not known."""
    side = grid(view, block)
    if isinstance(side, str):
        return side
    size = getattr(getattr(view.module(block.attentions[0]), "config", view.model.config), "image_size", None)
    if size is None:
        return "its config does not say how large an image is"
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (height // side) * (width // side)


class Slim(Transform):
    """Learned soft aggregation of image tokens."""

    needs_data: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"keep": 1.0}
    example: ClassVar[dict] = {"keep": 0.5, "steps": 2}

    keep: float = Field(0.7, gt=0, le=1, description="share of the image's tokens that each slimming leaves")
    blocks: tuple[int, ...] | None = Field(
        None, description="blocks after which it slims, counted from 0; those at the quarters if not given"
    )
    steps: int = Field(300, ge=1, description="of the distillation")

    def plan(self, view: View) -> Plan:
        if self.keep == 1 or self.blocks == ():
            return Plan({})
        blocks = chosen(view, "tokens.slim", self.blocks, quarters)
        blocks = {block.path: block for block in blocks if self.takes(block.path)}
        edits, refused, tokens = {}, {}, {}
        attentions = {attention.path: attention for attention in view.attentions()}
        for path, found in shrinkable(view, list(blocks.values()), inside=False).items():
            number = found if isinstance(found, str) else displaced(view, found) or patches(view, blocks[path])
            if isinstance(number, str):
                refused[path] = number
            else:
                wide = width(view, attentions[blocks[path].attentions[0]])
                edits[path] = {"after": found["after"], "special": found["rule"]["first"], "width": wide}
                tokens[path] = number
        if self.only and refused and not edits:
            path, why = next(iter(refused.items()))
            raise CompressError(f"tokens.slim cannot change {path}: {why}")
        return Plan(self.counted(view, edits, tokens), notes={"refused": refused})

    def counted(self, view: View, edits: dict[str, dict], tokens: dict[str, int]) -> dict[str, dict]:
        """The edits with how many tokens each leaves of those that an image has in the first place."""
        found = dict(edits)
        for members in stacks(view).values():
            share = 1.0
            for block in (block for block in members if block.path in edits):
                share *= self.keep
                found[block.path] = edits[block.path] | {"count": max(1, round(share * tokens[block.path]))}
        return found

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.slimming import begin, image_tokens, recalibration
        from compress.teaching import Lesson, take_over

        if not plan.edits:
            return plan
        edits = self.counted(view, plan.edits, image_tokens(view.model, plan.edits, batches[0]))
        student = deepcopy(view.model)
        self.apply(View(student), Plan(edits))
        slims = [student.get_submodule(path).merge for path in edits]
        notes = {"start": begin(student, slims, batches)}
        lesson = Lesson(view, student, batches)
        start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        before = lesson.examine(student)["error"]
        weights = [weight for slim in slims for weight in slim.parameters()]
        lesson.teach(weights, self.steps, recalibration(view.model, lesson.lessons), rate=RATE)
        after = lesson.examine(student)["error"]
        if not after < before:
            student.load_state_dict(start)
        notes |= {"error at the start": before, "error": min(after, before)}
        return Plan(edits, take_over(view.model, student), plan.notes | notes)

    def apply(self, view: View, plan: Plan) -> None:
        like = next(parameter for parameter in view.model.parameters() if parameter.is_floating_point())

        def hooks(tokens, edit):
            return SlimAfter(tokens, edit["special"], edit["count"], edit["width"], like)

        hand_on_fewer(view, plan.edits, lambda tokens, edit: (), hooks, Slimmed)
        for path in plan.edits:
            for name, tensor in view.module(path).merge.state_dict(keep_vars=True).items():
                if (key := f"{path}.merge.{name}") in plan.tensors:
                    tensor.data.copy_(plan.tensors[key])
