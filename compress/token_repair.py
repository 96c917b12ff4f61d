"""Closed-form repair of a model whose blocks hand on fewer tokens: the last projection of each MLP is refit, so that a
merged token leaves its block as the mean of what the tokens at its places were in the original.

Shapes: B batch, N tokens of the input, n tokens of now, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.merge_search import sharing
from compress.mixing import apart
from compress.nn.token_merge import Tokens
from compress.probing import Answers
from compress.quick import quick_products
from compress.repair import HELD, Moments, hearing, refit, stacked, write
from compress.stacks import Call, answers, chain, tensors
from compress.token_stacks import reads_class_token, stacks
from compress.transform import Plan
from compress.view import MLP, Block, View

LINEAR = 0.01  # of the squares of what an MLP adds to its block's answer may be no multiple of its own


@dataclass
class Flow:
    """One batch on its way through the blocks of both models."""

    calls: list[Call]  # of the original's blocks
    mask: Tensor | None  # B,N: which tokens are no padding
    clean: list[Tensor] = field(default_factory=list)  # what the original's block before gave
    ours: list[Tensor] = field(default_factory=list)  # and the other's
    tokens: dict = field(default_factory=dict)  # what became of the tokens until there

    def call(self, index: int, given: list[Tensor]) -> Call:
        return self.calls[index].after(given, tensors(tuple(self.calls[0])))

    def resume(self, block: nn.Module) -> None:
        """Let the block go on with this batch's tokens."""
        vars(block.merge.tokens).update(self.tokens)

    def step(self, index: int, block: nn.Module) -> None:
        """Through one block of the model with fewer tokens."""
        self.resume(block)
        self.ours = answers(block, self.call(index, self.ours))
        self.tokens = dict(vars(block.merge.tokens))


@dataclass(frozen=True)
class Place:
    """Where in a block its MLP lies, and by what factor each channel of its output enters the block's answer."""

    up: str
    down: str
    scale: Tensor | None  # D; None where a norm stands between

    @classmethod
    def of(cls, block: nn.Module, path: str, mlp: MLP, call: Call) -> Place:
        up, down = (name.removeprefix(path + ".") for name in (mlp.up[0], mlp.down))
        return cls(up, down, added(block, block.get_submodule(down), call))

    def level(self, block: nn.Module, call: Call) -> Level:
        """Run the block with an eye on its MLP."""
        up, down, tokens, given = block.get_submodule(self.up), block.get_submodule(self.down), {}, []

        def look(module: nn.Module, args: tuple, output: Tensor) -> None:
            tokens.update(vars(block.merge.tokens) if hasattr(block, "merge") else {})

        def keep(module: nn.Module, args: tuple, output) -> None:
            given.append(tensors(output)[0])

        hooks = [down.register_forward_hook(look), block.register_forward_hook(keep, prepend=True)]
        try:
            with hearing({up: "up", down: "down"}) as heard:
                answer = answers(block, call)
        finally:
            for hook in hooks:
                hook.remove()
        ((u, _),), ((x, z),) = heard["up"], heard["down"]
        stream = u + z if self.scale is None else Tokens(**tokens).settled(given[0])
        return Level(answer, stream, x, z, tokens)


@dataclass(frozen=True)
class Level:
    """What a run of a block shows of its MLP."""

    answer: list[Tensor]
    stream: Tensor  # what the MLP's output was added to, with it: B,n,D
    x: Tensor  # what its last projection reads and gives
    z: Tensor
    tokens: dict  # what had become of the tokens by then


@torch.no_grad()
@quick_products()
def repair_tokens(view: View, fewer: nn.Module, batches: list[dict], first: int) -> str:
    """Refit MLPs of `fewer`, a copy that hands on fewer tokens and shares its weights with the view's model.

    What came of it, in words; it is undone where the answers to batches held out did not come nearer. What is in no
    chain of blocks, or in one that computes its class token only, stays. The first tokens are special ones.
    """
    seen, held = apart(batches)
    judge, known = Answers.of(view.model, held), {attention.path: attention for attention in view.attentions()}
    downs = [view.module(mlp.down) for mlp in view.mlps() if not mlp.refusal]
    old = [deepcopy(module.state_dict()) for module in downs]
    before, count = judge.off(fewer), 0
    for blocks in stacks(view).values():
        blocks = [block for block in blocks if not reads_class_token(view, known[block.attentions[0]])]
        if blocks and hasattr(fewer.get_submodule(blocks[0].path), "merge"):
            calls = chain(view.model, [block.path for block in blocks], seen) or []
            flows = [Flow(each, batch.get("attention_mask")) for each, batch in zip(calls, seen)]
            count += along(view, fewer, blocks, flows, first) if flows else 0
    if (after := judge.off(fewer)) < before:
        return (
            f"{count} MLPs refit to what the original's tokens were: loss on held-out data {before:.3g} -> {after:.3g}"
        )
    for module, weights in zip(downs, old, strict=True):
        module.load_state_dict(weights)
    return f"MLPs were not refit: the loss on held-out data, {before:.3g}, did not fall"


def repaired(view: View, plan: Plan, batches: list[dict], apply: Callable[[View, Plan], None], first: int) -> Plan:
    """The same for a plan that is still to be applied; it says what came of it."""
    fewer = sharing(view.model, plan.edits, apply)
    return Plan(plan.edits, notes=plan.notes | {"remarks": [repair_tokens(view, fewer, batches, first)]})


def along(view: View, fewer: nn.Module, blocks: list[Block], flows: list[Flow], first: int) -> int:
    """The same for the blocks of one chain, each on the tokens that those before it give by then."""
    mlps, count = {mlp.path: mlp for mlp in view.mlps() if not mlp.refusal}, 0
    for index, found in enumerate(blocks):
        original, block = view.module(found.path), fewer.get_submodule(found.path)
        if len(found.mlps) == 1 and found.mlps[0] in mlps:
            flow = flows[0]
            place = Place.of(original, found.path, mlps[found.mlps[0]], flow.call(index, flow.clean))
            targets = []
            for flow in flows:
                level = place.level(original, flow.call(index, flow.clean))
                flow.clean = level.answer
                targets.append(level.stream)
            count += mend(block, place, index, flows, targets, first)
        else:
            for flow in flows:
                flow.clean = answers(original, flow.call(index, flow.clean))
        for flow in flows:
            flow.step(index, block)
    return count


def mend(block: nn.Module, place: Place, index: int, flows: list[Flow], wanted: list[Tensor], first: int) -> bool:
    """Refit the MLP of one block towards these streams of the original; whether that brings it nearer."""
    moments, chance = Moments(), torch.Generator().manual_seed(0)
    for flow, target in zip(flows, wanted, strict=True):
        flow.resume(block)
        level = place.level(block, flow.call(index, flow.ours))
        count = torch.ones_like(target[..., 0]) if flow.mask is None else flow.mask.to(target)
        weight = count.float()
        if level.stream.shape != target.shape:
            weight = level.tokens["size"].float()
            target = means(target, level.tokens["slot"], count, weight.to(target))
        lost = (target - level.stream).float()
        if place.scale is not None:
            lost = torch.where(place.scale == 0, 0, lost / place.scale.float())
        special = torch.arange(weight.shape[1], device=weight.device) < first
        weight = torch.where(special, weight * weight.sum(1, keepdim=True), weight)  # all read these, many answers too
        real = weight.flatten() > 0
        held = torch.rand(int(real.sum()), generator=chance).to(real.device) < 1 / HELD
        rows, aims = level.x.float().flatten(0, 1)[real], (level.z + lost).flatten(0, 1)[real]
        moments.add(rows, aims, held, weight.flatten()[real, None])
    module = block.get_submodule(place.down)
    old = stacked(module)
    new, ridge, _ = refit(moments, old, torch.ones(len(old) - 1, dtype=torch.bool), module.bias is not None)
    write(module, new)
    return ridge is not None


def added(block: nn.Module, down: nn.Module, call: Call) -> Tensor | None:
    """By what factor each channel of the MLP's output enters the block's answer; None where a norm stands between."""
    with hearing({down: ""}) as heard:
        whole = answers(block, call)[0]
    ((_, z),) = heard[""]
    hook = down.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        part = whole - answers(block, call)[0]
    finally:
        hook.remove()
    part, z = part.flatten(0, -2).double(), z.flatten(0, -2).double()
    scale = (part * z).sum(0) / z.square().sum(0).clamp_min(1e-30)
    return scale.to(whole) if (part - scale * z).square().sum() < LINEAR * part.square().sum() else None


def means(x: Tensor, slot: Tensor, weight: Tensor, size: Tensor) -> Tensor:
    """Of tokens (B,N,D) that went to these slots (B,N), the weighted mean in each (B,n,D)."""
    sums = x.new_zeros(*size.shape, x.shape[-1])
    sums.scatter_add_(1, slot[..., None].expand_as(x), x * weight[..., None])
    return sums / size[..., None].clamp_min(1)
