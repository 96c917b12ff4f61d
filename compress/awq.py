"""AWQ: inputs that carry much get larger weights before rounding, so that these lose less; pure functions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from compress.gptq import gram_error

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.5)  # with GPTQ behind it, more than 0.5 was never the best
ROWS = 256  # of a weight, evenly spread, that a search looks at


def boosts(moment: Tensor, share: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The factors on the inputs of a weight to try, 1 first: powers of how large each input is, middled around 1.

    `share` makes inputs that can only have one factor alike.
    """
    size = share(moment.diagonal().clamp_min(0).sqrt())
    size = size.clamp_min(1e-4 * size.max().clamp_min(1e-30))
    powers = [size**ratio for ratio in RATIOS]
    return [power / (power.max() * power.min()).sqrt() for power in powers]


def boosted(moment: Tensor, factor: Tensor) -> Tensor:
    """The second moment of inputs divided by a factor."""
    return moment / factor / factor[:, None]


def best_boost(
    weight: Tensor, moment: Tensor, held: Tensor, rounded: Callable[[Tensor, Tensor], Tensor],
    share: Callable[[Tensor], Tensor],
) -> Tensor | None:  # fmt: skip
    """The factor on the inputs of `weight` with which `rounded(weight, factor)` errs least on `held`; None for none."""
    rows = weight[:: -(-len(weight) // ROWS)].float()
    least, best = None, None
    for index, factor in enumerate(boosts(moment, share)):
        off = gram_error(rows, rounded(rows, factor), held).sum().item()
        if least is None or off < least:
            least, best = off, factor if index else None
    return best
