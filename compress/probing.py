"""What single layers do to a model's answers: their inputs and gradients, and the answers with some layers replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.compare import deviation, divergence, similarity
from compress.errors import CompressError
from compress.outputs import answer, inputs, objective
from compress.quick import quick_products
from compress.view import View

ROWS = 512  # of each layer's inputs that are kept; more change the estimates by a few percent


@dataclass
class Heard:
    """A sample of the rows that went into a layer, with the gradients at its output where they were asked for."""

    parts: list[Tensor] = field(default_factory=list)  # rows of each call
    slopes: list[Tensor] = field(default_factory=list)  # gradients for them; 0 where the answer does not depend on it
    rows: int = 0  # that went through in all

    def x(self) -> Tensor:
        """The rows, [rows, in]."""
        return torch.cat(self.parts)

    def gradient(self) -> Tensor:
        """Their gradients, [rows, out]."""
        return torch.cat(self.slopes).float()


@dataclass(frozen=True)
class Answers:
    """The original's answers to some batches, and how far others are from them."""

    batches: list[dict]
    references: list[Tensor]
    logits: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, batches: list[dict]) -> Answers:
        outputs = [model(**inputs(batch)) for batch in batches]
        return cls(batches, [answer(output) for output in outputs], all(is_logits(output) for output in outputs))

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """Mean KL(original || model) of the predictions where there are logits, else the squared relative error.

        Both grow with the square of small changes, so those of several layers add up.
        """
        found = 0.0
        for batch, reference in zip(self.batches, self.references, strict=True):
            output = answer(model(**inputs(batch)))
            mean = (
                divergence(output, reference, batch).mean if self.logits else deviation(output, reference, batch).mean
            )
            found += max(mean, 0.0) if self.logits else mean**2  # rounding can make a divergence of zero negative
        if not found < float("inf"):
            raise CompressError("the model's answers to the calibration data are not finite; they must be")
        return found / len(self.batches)

    def off(self, model: nn.Module) -> float:
        """How far a model with fewer tokens is off: the divergence of its predictions, or how embeddings turned.

        Single features of merged tokens differ much and mean little.
        """
        return self.distance(model) if self.logits else self.turn(model)

    @torch.no_grad()
    def turn(self, model: nn.Module) -> float:
        """Mean of 1 - cosine between the pooled features and the original's."""
        pairs = zip(self.batches, self.references, strict=True)
        found = [similarity(answer(model(**inputs(batch))), reference, batch).mean for batch, reference in pairs]
        return 1 - sum(found) / len(found)


def is_logits(output) -> bool:
    """Does the model predict, or does it answer with features?"""
    return isinstance(output, Mapping) and output.get("logits") is answer(output)


@contextmanager
def instead(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Let modules answer by other functions, wherever in the model they are used."""
    before = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)
            vars(module).update({"forward": before[module]} if module in before else {})


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@quick_products()
def listen(
    model: nn.Module, layers: dict[str, nn.Module], batches: list[dict], gradients: bool
) -> tuple[dict[str, Heard], float]:
    """Run the batches; with `gradients` of a label-free objective whose squared gradient is the Fisher information.

    The second result turns a sum over rows of (gradient @ change of the output)^2 into the `distance` of the answers.
    """
    heard, unit = {path: Heard() for path in layers}, 0.0
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for path, module in layers.items():
            hook = listener(heard[path], -(-ROWS // len(batches)), gradients)
            stack.callback(module.register_forward_hook(hook).remove)
        for batch in batches:
            with torch.set_grad_enabled(gradients):
                output = model(**inputs(batch))
                if answer(output).requires_grad:
                    objective(output, generator).backward()
            main = answer(output).detach()
            unit += 2 * main[..., 0].numel() if is_logits(output) else main.float().square().sum().item()
    return heard, 1 / unit if unit else 0.0


def listener(note: Heard, most: int, gradients: bool) -> Callable:
    """A forward hook that keeps at most so many rows of a call."""

    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        rows = arguments[0].detach().flatten(0, -2)
        picked = torch.linspace(0, len(rows) - 1, min(len(rows), most)).round().long()
        note.parts.append(rows[picked])
        note.rows += len(rows)
        if gradients:
            if not output.requires_grad:
                output = output.detach().requires_grad_() * 1
            at = len(note.slopes)
            note.slopes.append(output.new_zeros(len(picked), output.shape[-1]))
            output.register_hook(lambda gradient: note.slopes.__setitem__(at, gradient.flatten(0, -2)[picked]))
        return output

    return hook


@torch.no_grad()
def one_at_a_time(view: View, replaced: dict[str, Callable[[], nn.Module]], batches: list[dict]) -> dict[str, float]:
    """The distance of the model's answers from its own with each layer alone replaced.

    The blocks before the layer are not run again: they answer what they answered, where that was proven exact.
    """
    model, found = view.model, dict.fromkeys(replaced, 0.0)
    for batch in batches:
        answers = Answers.of(model, [batch])
        before = block_answers(view, answers)
        for path, make in replaced.items():
            known = {}
            for block, output in before:
                if path.startswith(block + "."):
                    break
                known[view.module(block)] = lambda *args, output=output, **options: output
            else:  # it lies in no block
                known = {}
            with instead(known | {view.module(path): make().forward}):
                found[path] += answers.distance(model) / len(batches)
    return found


def block_answers(view: View, answers: Answers) -> list[tuple[str, object]]:
    """What each block returned, in the order of execution; nothing where blocks do not simply follow one another."""
    (batch,), (reference,), kept = answers.batches, answers.references, []
    with ExitStack() as stack:
        for block in view.blocks():
            hook = lambda module, args, output, path=block.path: kept.append((path, tree_map(copied, output)))  # noqa: E731
            stack.callback(view.module(block.path).register_forward_hook(hook).remove)
        view.model(**inputs(batch))
    known = {view.module(path): lambda *args, output=output, **options: output for path, output in kept[:-1]}
    if len(known) < len(kept) - 1:
        return []  # some ran more than once
    with instead(known):
        exact = all(torch.equal(answer(view.model(**inputs(batch))), reference) for _ in range(2))
    return kept if exact else []


def copied(leaf):
    """A copy of a tensor, so that work in place cannot reach it."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
