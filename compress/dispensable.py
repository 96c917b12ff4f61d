"""Which attention layers a model can do without: whether one can go at all, and the order in which they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from compress.outputs import answer, inputs
from compress.probing import Answers, block_answers, instead
from compress.quick import quick_products
from compress.roles import width_in
from compress.stacks import tensors
from compress.stand_ins import Place, listening, refit, standing, teach
from compress.trial import WRONG, randomized, raw_answer
from compress.view import Attention, View

TRIES = 5  # candidates looked at again for each layer that goes, best first


def dispensable(view: View, attention: Attention) -> dict[str, bool] | str:
    """The form of an attention's answer (`pair`: with weights beside the tokens), or why it cannot be done without."""
    module = view.module(attention.path)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    config = getattr(module, "config", None)
    if attention.cross or attention.added:
        return "it also reads another sequence"
    if attention.o is None or width_in(view.module(attention.o)) != attention.heads * attention.value_dim:
        return "it has no output projection of its own"
    if names[0] != "hidden_states" or "position_bias" in names:
        return "its forward takes or hands on more than tokens"
    if getattr(module, "residual_connection", False) or getattr(module, "group_norm", None) is not None:
        return "it adds its input to its answer itself"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "its scores depend on its place in the stack"
    if len(set(getattr(config, "layer_types", None) or [])) > 1:
        return "the cache of its model has layers of several kinds, whose places are fixed"
    try:
        with randomized(view, attention.path) as copy:
            found = raw_answer(view, copy, attention)
    except WRONG as error:
        return f"it cannot be tried alone ({str(error).strip().splitlines()[0][:100]})"
    pair = isinstance(found, tuple)
    if (pair and (len(found) != 2 or not isinstance(found[0], Tensor))) or tensors(found)[0].dim() != 3:
        return "its answer is neither tokens nor tokens with weights"
    return {"pair": pair}


@torch.no_grad()
@quick_products()
def choose(
    view: View, places: list[Place], batches: list[dict], by: str, remove: int, probe: int, again: bool
) -> tuple[list[Place], dict]:
    """The places to give up, their stand-ins fitted, and notes for the report."""
    cut = len(batches) - max(len(batches) // 4, 1) if len(batches) > 1 else len(batches)
    train, held = batches[:cut], batches[cut:]
    if any(True for place in places for _ in place.stand_in.parameters()):
        teach(view, places, train, held)
    looked = (held or batches)[:probe]
    if by in ("kl", "entropy"):
        original = Answers.of(view.model, looked)
        measure = Divergence(view, original) if by == "kl" else Entropy(view, original)
        chosen, notes = greedy(places, remove, measure)
    else:
        scores = (cosine if by == "cosine" else bound)(view, places, train)
        chosen = sorted(places, key=lambda place: scores[place.path])[:remove]
        notes = {"scores": scores}
    if again and any(True for place in chosen for _ in place.stand_in.parameters()):
        notes["fitted to"] = refit(view, chosen, train, held)
    return chosen, notes


def greedy(places: list[Place], remove: int, measure: Callable) -> tuple[list[Place], dict]:
    """One place after the other, each time that with the least loss; only the most promising are measured again."""
    alone = measure([], places)
    gains, chosen, steps = dict(alone), [], {}
    loss = 0.0
    while len(chosen) < remove:
        rest = sorted((place for place in places if place not in chosen), key=lambda place: gains[place.path])
        found = measure(chosen, rest[:TRIES]) if chosen else alone
        best = min((place for place in rest if place.path in found), key=lambda place: found[place.path])
        gains |= {path: value - loss for path, value in found.items()}
        chosen, loss = [*chosen, best], found[best.path]
        steps[best.path] = loss
    return chosen, {"alone": alone, "chosen": steps}


class Divergence:
    """How far the answers are from the original's with one more stand-in beside others."""

    def __init__(self, view: View, original: Answers) -> None:
        self.view, self.original = view, original

    def __call__(self, chosen: list[Place], others: list[Place]) -> dict[str, float]:
        found, original = dict.fromkeys((place.path for place in others), 0.0), self.original
        for batch, reference in zip(original.batches, original.references, strict=True):
            one = Answers([batch], [reference], original.logits)
            with standing(chosen):
                before = block_answers(self.view, Answers.of(self.view.model, [batch]))
            for place in others:
                known = {}
                for block, output in before:  # those before the place answer what they answered
                    if place.path.startswith(block + "."):
                        break
                    known[self.view.module(block)] = lambda *args, output=output, **options: output
                else:
                    known = {}
                with standing([*chosen, place]), instead(known):
                    found[place.path] += one.distance(self.view.model) / len(original.batches)
        return found


class Entropy:
    """How far the entropy of the answers is from the original's, each channel taken for a Gaussian over all rows."""

    def __init__(self, view: View, original: Answers) -> None:
        self.view, self.batches = view, original.batches
        self.wanted = self.entropy([])

    def entropy(self, places: list[Place]) -> float:
        rows, total, squares = 0, 0.0, 0.0
        with standing(places):
            for batch in self.batches:
                out = answer(self.view.model(**inputs(batch))).flatten(0, -2).double()
                rows, total, squares = rows + len(out), total + out.sum(0), squares + out.square().sum(0)
        variance = (squares / rows - (total / rows).square()).clamp_min(1e-12)
        return 0.5 * variance.log().sum().item()

    def __call__(self, chosen: list[Place], others: list[Place]) -> dict[str, float]:
        return {place.path: abs(self.entropy([*chosen, place]) - self.wanted) for place in others}


def streams(view: View, places: list[Place], batches: list[dict], take: Callable[[str, Tensor, Tensor], None]) -> None:
    """Hand take(path, tokens that enter the block, attention's answer) every call."""
    entered: dict[str, Tensor] = {}
    blocks = {place.path: next(b.path for b in view.blocks() if place.path in b.attentions) for place in places}

    def enter(path):
        return lambda module, args, kwargs: entered.__setitem__(path, tensors((args, kwargs))[0])

    hooks = [
        view.module(block).register_forward_pre_hook(enter(path), with_kwargs=True) for path, block in blocks.items()
    ]
    try:
        with listening(places, lambda path, x, mask, y: take(path, entered[path].flatten(0, -2), y.flatten(0, -2))):
            for batch in batches:
                view.model(**inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()


def cosine(view: View, places: list[Place], batches: list[dict]) -> dict[str, float]:
    """One minus the mean cosine between the tokens before and behind the attention's sum (LLM-Drop)."""
    sums: dict[str, list] = {place.path: [0.0, 0] for place in places}

    def take(path, x, y):
        sums[path][0] += torch.cosine_similarity(x.float(), x.float() + y.float(), dim=-1).sum().item()
        sums[path][1] += len(x)

    streams(view, places, batches, take)
    return {path: 1 - total / count for path, (total, count) in sums.items()}


def bound(view: View, places: list[Place], batches: list[dict]) -> dict[str, float]:
    """The bound of NBL: what canonical correlations between the tokens before and behind leave unexplained."""
    sums: dict[str, list] = {place.path: [0, 0.0, 0.0] for place in places}

    def take(path, x, y):
        both = torch.cat([x, x + y], 1).double()
        book = sums[path]
        book[:] = book[0] + len(both), book[1] + both.sum(0), book[2] + both.t() @ both

    streams(view, places, batches, take)
    return {path: unexplained(total / rows, squares / rows) for path, (rows, total, squares) in sums.items()}


def unexplained(mean: Tensor, moment: Tensor) -> float:
    """Sum of 1 - r^2 over the canonical correlations r of the two halves of a vector."""
    covariance, half = moment - torch.outer(mean, mean), len(mean) // 2
    roots = []
    for part in (covariance[:half, :half], covariance[half:, half:]):
        values, vectors = torch.linalg.eigh(part)
        inverse = torch.where(values > 1e-8 * values.max(), values.clamp_min(1e-30).rsqrt(), 0)
        roots.append(vectors * inverse @ vectors.t())
    correlations = torch.linalg.svdvals(roots[0] @ covariance[:half, half:] @ roots[1])
    return (1 - correlations.square()).clamp_min(0).sum().item()
