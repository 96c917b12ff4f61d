"""Affine maps fitted to what attention layers answer, in closed form from second moments (LMMSE), ridge held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.nn.stand_in import summary
from compress.outputs import inputs, relative_error
from compress.probing import instead
from compress.stacks import answers, chain, stacks, tensors
from compress.view import View

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # times the mean variance of a feature
KINDS = ("its own answers", "the original's", "the original's tokens")
MEMORY = 2**31  # bytes that one pass over the data may gather


@dataclass
class Moments:
    """Sums over rows of features (with a constant one as their last) and of targets."""

    ff: Tensor | None = None
    fy: Tensor | None = None
    yy: Tensor | None = None  # of each target with itself
    rows: int = 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take note of some rows."""
        f, y = torch.cat([features, torch.ones_like(features[:, :1])], 1).float(), targets.float()
        parts = (f.t() @ f).double(), (f.t() @ y).double(), y.double().square().sum(0)
        self.ff, self.fy, self.yy = (
            new if old is None else old.add_(new) for old, new in zip((self.ff, self.fy, self.yy), parts, strict=True)
        )
        self.rows += len(f)

    def minus(self, map_: Tensor) -> Moments:
        """The same with `features @ map_` taken from the targets."""
        fy = self.fy - self.ff @ map_
        return Moments(self.ff, fy, self.yy - (map_ * (self.fy + fy)).sum(0), self.rows)

    def error(self, map_: Tensor) -> float:
        """Sum of the squared errors of `features @ map_`."""
        return self.minus(map_).yy.sum().item()


def ridge(moments: Moments, strength: float) -> Tensor:
    """The map [features + 1, targets] of least squares; everything but the constant is drawn towards zero."""
    ff = moments.ff / moments.rows
    mean_f, mean_y = ff[:-1, -1], moments.fy[-1] / moments.rows
    covariance = ff[:-1, :-1] - torch.outer(mean_f, mean_f)
    cross = moments.fy[:-1] / moments.rows - torch.outer(mean_f, mean_y)
    loading = strength * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    covariance.diagonal().add_(loading)
    weight = torch.linalg.solve(covariance, cross)
    return torch.cat([weight, (mean_y - mean_f @ weight)[None]])


def fit(moments: Moments, held: Moments) -> Tensor:
    """The map of the ridge that explains the held rows best."""
    if not held.rows:
        return ridge(moments, 1e-2)
    return min((ridge(moments, strength) for strength in RIDGES), key=held.error)


@dataclass
class Lesson:
    """What one attention was seen to answer: all tokens, and the first ones with the mean token."""

    context: bool
    every: Moments = field(default_factory=Moments)
    first: Moments = field(default_factory=Moments)

    def add(self, x: Tensor, mask: Tensor | None, y: Tensor, real: Tensor | None) -> None:
        """Take note of one call; `real` tells tokens from padding."""
        features = x
        if self.context:
            context = summary(x, mask)
            features = torch.cat([x, context.expand(-1, x.shape[1], -1)], -1)
            self.first.add(context[:, 0], y[:, 0])
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real.bool()
        self.every.add(features[real], y[real])


def weights(lesson: Lesson, held: Lesson) -> dict[str, Tensor]:
    """The tensors of the stand-in that answers most alike."""
    map_ = fit(lesson.every, held.every)
    width = (len(map_) - 1) // 3 if lesson.context else len(map_) - 1
    found = {"token.weight": map_[:width].t(), "token.bias": map_[-1]}
    if lesson.context:
        mean, first, ones = map_[width : 2 * width], map_[:width] + map_[2 * width : -1], map_[-1:]
        plain = torch.cat([mean, first, ones])  # what the map makes of the first token, whose features are the context
        own = fit(lesson.first.minus(plain), held.first.minus(plain) if held.first.rows else held.first)
        found |= {"context.weight": map_[width:-1].t(), "first.weight": own[:-1].t(), "first.bias": own[-1]}
    return {name: tensor.contiguous() for name, tensor in found.items()}


@dataclass(frozen=True)
class Place:
    """An attention, the output projection where that lies beside it, and what may come in their place."""

    path: str
    attention: nn.Module
    output: nn.Module | None
    stand_in: nn.Module

    @property
    def context(self) -> bool:
        """Does the stand-in see more than each token?"""
        return getattr(self.stand_in, "context", None) is not None

    def forwards(self) -> dict[nn.Module, Callable]:
        """What answers instead of what."""
        found = {self.attention: self.stand_in.forward}
        return found if self.output is None else found | {self.output: lambda hidden_states: hidden_states}


@contextmanager
def listening(places: Iterable[Place], hear: Callable) -> Iterator[None]:
    """Call hear(path, input, mask, output) for every call of an attention."""
    hooks: list = []

    def listen(place: Place) -> None:
        given: list = []

        def before(module, args, kwargs):
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            given[:] = args[0] if args else kwargs["hidden_states"], mask

        def behind(module, args, output):
            hear(place.path, *given, tensors(output)[0])

        hooks.append(place.attention.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append((place.output or place.attention).register_forward_hook(behind))

    for place in places:
        listen(place)
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def real_tokens(batch: dict, x: Tensor) -> Tensor | None:
    """Which tokens are no padding, where the batch says so."""
    mask = batch.get("attention_mask")
    return mask if mask is not None and mask.shape == x.shape[:2] else None


@torch.no_grad()
def teach(view: View, places: list[Place], train: list[dict], held: list[dict]) -> None:
    """Fit all stand-ins in the unchanged model; in several passes where one would take much memory."""
    left = list(places)
    while left:
        part, size = [], 0
        while left and (not part or size < MEMORY):
            part.append(left.pop(0))
            linears = list(part[-1].stand_in.children())
            size += 32 * sum(module.in_features for module in linears) * linears[0].out_features
        books = [{place.path: Lesson(place.context) for place in part} for _ in range(2)]
        for book, batches in zip(books, (train, held), strict=True):
            for batch in batches:

                def hear(path, x, mask, y, book=book, batch=batch):
                    book[path].add(x, mask, y, real_tokens(batch, x))

                with listening(part, hear):
                    view.model(**inputs(batch))
        for place in part:
            place.stand_in.load_state_dict(weights(*(book[place.path] for book in books)))


@torch.no_grad()
def refit(view: View, places: list[Place], train: list[dict], held: list[dict]) -> dict[str, str]:
    """Fit stand-ins again from front to back, on what the ones before make of the tokens; what each was fitted to.

    Towards the attention's own answer, or towards one that also brings the tokens back to where they were in the
    original: what leaves the block nearer to the original's on data held out.
    """
    told: dict[str, str] = {}
    for stack in stacks(view):
        inside = {block: [place for place in places if place.path.startswith(block + ".")] for block in stack}
        last = max((index for index, block in enumerate(stack) if inside[block]), default=-1)
        calls = chain(view.model, stack[: last + 1], train + held) if last >= 0 else None
        if calls:
            walk = Walk(view, calls, train + held, len(held))
            for index, block in enumerate(stack[: last + 1]):
                for place in inside[block]:
                    told[place.path] = walk.teach(index, block, place)
                walk.go(index, block, inside[block])
    return told


class Walk:
    """The tokens of all batches on their way through a stack, in the original (`clean`) and in what becomes of it."""

    def __init__(self, view: View, calls: list[list], batches: list[dict], held: int) -> None:
        self.view, self.calls, self.batches = view, calls, batches
        self.train = len(batches) - held
        self.firsts = [tensors(tuple(each[0])) for each in calls]
        self.clean = self.given = [[] for _ in batches]

    def call(self, index: int, before: list[list[Tensor]], batch: int):
        """The call of a block on one batch."""
        return self.calls[batch][index].after(before[batch], self.firsts[batch])

    def go(self, index: int, block: str, places: list[Place]) -> None:
        """Carry the tokens through a block."""
        module, every = self.view.module(block), range(len(self.batches))
        self.clean = [answers(module, self.call(index, self.clean, batch)) for batch in every]
        with standing(places):
            self.given = [answers(module, self.call(index, self.given, batch)) for batch in every]

    def teach(self, index: int, block: str, place: Place) -> str:
        """Fit one stand-in; what it was fitted to."""
        whole, heard = self.view.module(block), []
        books = {kind: (Lesson(place.context), Lesson(place.context)) for kind in KINDS}
        for batch, sample in enumerate(self.batches):
            calls = self.call(index, self.clean, batch), self.call(index, self.given, batch)
            with listening([place], lambda path, x, mask, y: heard.append((x, mask, y))):
                for call in calls:
                    answers(whole, call)
            (_, _, wanted), (x, mask, own) = heard
            heard.clear()
            first, second = (tensors(tuple(call))[0] for call in calls)
            away = first - second if first.shape == wanted.shape else 0  # of what the block adds its answer to
            for kind, target in zip(KINDS, (own, wanted, wanted + away), strict=True):
                books[kind][batch >= self.train].add(x, mask, target, real_tokens(sample, x))
        tries = {"as it was": {name: tensor.clone() for name, tensor in place.stand_in.state_dict().items()}}
        tries |= {kind: weights(*book) for kind, book in books.items()}
        errors = {kind: self.error(index, block, place, found) for kind, found in tries.items()}
        best = min(errors, key=errors.get)
        place.stand_in.load_state_dict(tries[best])
        return best

    def error(self, index: int, block: str, place: Place, found: dict) -> float:
        """How far the block's answers on the held batches are from the original's with these weights."""
        place.stand_in.load_state_dict(found)
        whole, total = self.view.module(block), 0.0
        for batch in range(min(self.train, len(self.batches) - 1), len(self.batches)):
            wanted = answers(whole, self.call(index, self.clean, batch))[0]
            with standing([place]):
                got = answers(whole, self.call(index, self.given, batch))[0]
            total += relative_error(got, wanted) ** 2
        return total


def standing(places: Iterable[Place]) -> AbstractContextManager[None]:
    """Let stand-ins answer, without changing the module tree."""
    return instead({module: forward for place in places for module, forward in place.forwards().items()})
