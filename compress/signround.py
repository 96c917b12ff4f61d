"""SignRound: rounding and scales of a whole block's weights learned together by the signs of gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compress.quick import quick_products
from compress.roles import is_conv1d
from compress.rounding import Grid, dequantize, storable
from compress.stacks import Call, tensors

STEPS = 100
EDGE = 0.499  # a value this far from its code still rounds to it


class Learned:
    """One weight between its codes at the start and those that are learned: an offset each, a stretch each scale."""

    def __init__(self, weight: Tensor, codes: Tensor, grid: Grid) -> None:
        near = grid.grouped(weight) / grid.scale[..., None] + grid.zero[..., None]
        start = grid.grouped(codes)
        self.grid = grid
        self.latent = torch.minimum(torch.maximum(near, start - EDGE), start + EDGE) - grid.zero[..., None]
        self.offset = torch.zeros_like(self.latent, requires_grad=True)
        self.stretch = torch.ones_like(grid.scale, requires_grad=True)

    def codes(self) -> Tensor:
        """The codes as they are now, with the gradient of what is rounded."""
        zero = self.grid.zero[..., None]
        value = self.latent / self.stretch[..., None] + self.offset + zero
        return value + (value.round() - value).detach()

    def weight(self) -> Tensor:
        """The weight that these codes stand for."""
        inside = self.codes().clamp(self.grid.low, self.grid.high) - self.grid.zero[..., None]
        return (inside * (self.grid.scale * self.stretch)[..., None]).flatten(1)

    def step(self, rate: float) -> None:
        """Move against the signs of the gradients; a weight that does not matter to the block has none."""
        if self.offset.grad is None:
            return
        for value, middle, reach in ((self.offset, 0, 0.5), (self.stretch, 1, 0.1)):
            moved = value.detach() - rate * reach * value.grad.sign()
            value.data.copy_(moved.clamp(middle - reach, middle + reach))
            value.grad = None

    def settled(self, dtype: torch.dtype) -> tuple[Tensor, Grid]:
        """Codes and grid, the scales as they are stored."""
        grid = replace(self.grid, scale=storable(self.grid.scale * self.stretch.detach(), dtype))
        self.stretch.data.copy_(grid.scale / self.grid.scale)
        codes = self.codes().detach().clamp(grid.low, grid.high)
        return codes.to(torch.int8).flatten(1), grid


@quick_products()
def signround(
    block: nn.Module, layers: dict[str, tuple[Tensor, Tensor, Grid]], calls: list[Call], targets: list[list[Tensor]],
    dtype: torch.dtype, steps: int = STEPS,
) -> dict[str, tuple[Tensor, Grid]]:  # fmt: skip
    """Better codes and grids for layers of a block (name -> weight, codes, grid), or the same where none were found.

    The block is to give `targets` on `calls`.
    """
    learned = {name: Learned(*start) for name, start in layers.items()}
    generator = torch.Generator().manual_seed(0)
    before = mean_loss(
        block, {name: dequantize(codes, grid) for name, (_, codes, grid) in layers.items()}, calls, targets
    )
    for step in range(steps):
        index = torch.randint(len(calls), (), generator=generator).item()
        with torch.enable_grad():
            weights = {name: each.weight() for name, each in learned.items()}
            loss(block, weights, calls[index], targets[index]).backward()
        for each in learned.values():
            each.step(2 / steps * (1 - step / steps))
    found = {name: each.settled(dtype) for name, each in learned.items()}
    after = mean_loss(block, {name: dequantize(*each) for name, each in found.items()}, calls, targets)
    return found if after < before else {name: start[1:] for name, start in layers.items()}


def loss(block: nn.Module, weights: dict[str, Tensor], call: Call, target: list[Tensor]) -> Tensor:
    """Squared errors of the block's answers with these weights, each relative to the size of the answer."""
    swapped = {name: value.detach() for name, value in block.named_parameters()}  # none but the weights learns
    for name, weight in weights.items():
        layer = block.get_submodule(name)
        swapped[f"{name}.weight"] = (weight.t() if is_conv1d(layer) else weight).to(layer.weight.dtype)
    answers = tensors(functional_call(block, swapped, call.args, call.kwargs))
    pairs = [(got.float(), wanted.float()) for got, wanted in zip(answers, target, strict=True)]
    return sum((got - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30) for got, wanted in pairs)


@torch.no_grad()
def mean_loss(block: nn.Module, weights: dict[str, Tensor], calls: list[Call], targets: list[list[Tensor]]) -> float:
    """The loss over all calls."""
    return sum(loss(block, weights, *pair).item() for pair in zip(calls, targets, strict=True)) / len(calls)
