"""token_merge on a GPU: one kernel finds each token's cheapest partner, one takes the means; between them torch sorts.

Imported only where Triton is installed. Costs are never stored: a tile of them lives in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.token_merge.reference import Merged, arranged, from_padding

# Legend: B batch, N tokens, L left tokens (every second one), R right tokens, D width, K depth of the metric


def merge(
    x_BND: Tensor, metric_BNK: Tensor, size_BN: Tensor, fixed: Tensor, alive: Tensor | None, rows: Tensor | None,
    r: int, euclidean: bool, ward: float, price: Tensor | None = None,
) -> Merged:  # fmt: skip
    """As `reference` does it."""
    metric_BNK = metric_BNK.float()
    cost_BL, target_BL = propose(metric_BNK, size_BN.float(), fixed.expand(size_BN.shape), euclidean, ward, price)
    chosen = cost_BL.argsort(dim=-1, stable=True)[:, :r]
    gone, target = chosen * 2, target_BL.gather(1, chosen) * 2 + 1
    if alive is not None:
        gone, target = from_padding(gone, target, alive, rows)
    found = arranged(gone, target, x_BND.shape[1])
    return Merged(*means(x_BND, size_BN, found), found.kept, found.gone, found.slot)


def propose(
    metric_BNK: Tensor, size_BN: Tensor, fixed_BN: Tensor, euclidean: bool, ward: float, price_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cost of the cheapest partner of every left token, and which right token that is."""
    batch, tokens, depth = metric_BNK.shape
    unit = (metric_BNK if euclidean else F.normalize(metric_BNK, dim=-1)).contiguous()
    lefts = tokens - tokens // 2
    cost = unit.new_empty(batch, lefts)
    target = unit.new_empty(batch, lefts, dtype=torch.int64)
    size, fixed = size_BN.contiguous(), fixed_BN.to(torch.int8).contiguous()
    price = size if price_BN is None else price_BN.float().contiguous()
    propose_kernel[(batch, triton.cdiv(lefts, 32))](
        unit, size, price, fixed, cost, target, tokens, depth, ward, EUCLIDEAN=euclidean, WARD=ward != 0,
        PRICE=price_BN is not None, BLOCK_L=32, BLOCK_R=32, BLOCK_K=32,
    )  # fmt: skip
    return cost, target


@triton.jit
def propose_kernel(
    metric, size, price, fixed, cost, target, tokens, depth, ward, EUCLIDEAN: tl.constexpr, WARD: tl.constexpr,
    PRICE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of left tokens against all right ones."""
    batch, lefts, rights = tl.program_id(0).to(tl.int64), tokens - tokens // 2, tokens // 2
    left = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    row = metric + batch * tokens * depth
    size_L = tl.maximum(tl.load(size + batch * tokens + 2 * left, mask=left < lefts, other=1.0), 1.0)
    best = tl.full((BLOCK_L,), float("inf"), tl.float32)
    best_at = tl.zeros((BLOCK_L,), tl.int64)
    for start in range(0, rights, BLOCK_R):
        right = start + tl.arange(0, BLOCK_R)
        dots = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
        length_L, length_R = tl.zeros((BLOCK_L,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
        for at in range(0, depth, BLOCK_K):
            k = at + tl.arange(0, BLOCK_K)
            inside_L, inside_R = (
                (left < lefts)[:, None] & (k < depth)[None],
                (right < rights)[:, None] & (k < depth)[None],
            )
            a = tl.load(row + (2 * left)[:, None] * depth + k[None], mask=inside_L, other=0.0)
            b = tl.load(row + (2 * right + 1)[:, None] * depth + k[None], mask=inside_R, other=0.0)
            dots += tl.dot(a, tl.trans(b), input_precision="ieee")
            length_L += tl.sum(a * a, 1)
            length_R += tl.sum(b * b, 1)
        costs = 1 - dots
        if EUCLIDEAN:
            costs = length_L[:, None] + length_R[None] - 2 * dots
        if WARD:
            size_R = tl.maximum(tl.load(size + batch * tokens + 2 * right + 1, mask=right < rights, other=1.0), 1.0)
            pair = 2 * size_L[:, None] * size_R[None] / (size_L[:, None] + size_R[None])
            costs = costs * tl.exp2(ward * tl.log2(pair))
        if PRICE:
            price_L = tl.load(price + batch * tokens + 2 * left, mask=left < lefts, other=1.0)
            price_R = tl.load(price + batch * tokens + 2 * right + 1, mask=right < rights, other=1.0)
            costs = costs * (price_L[:, None] * price_R[None])
        barred = tl.load(fixed + batch * tokens + 2 * right + 1, mask=right < rights, other=1) != 0
        costs = tl.where(barred[None], float("inf"), costs)
        low, low_at = tl.min(costs, 1), tl.argmin(costs, 1).to(tl.int64) + start
        best_at = tl.where(low < best, low_at, best_at)
        best = tl.minimum(low, best)
    stays = tl.load(fixed + batch * tokens + 2 * left, mask=left < lefts, other=1) != 0
    tl.store(cost + batch * lefts + left, tl.where(stays, float("inf"), best), mask=left < lefts)
    tl.store(target + batch * lefts + left, best_at, mask=left < lefts)


def means(x_BND: Tensor, size_BN: Tensor, found) -> tuple[Tensor, Tensor]:
    """The size-weighted means of what went together, and the new sizes."""
    batch, tokens, width = x_BND.shape
    left, r = found.kept.shape[1], found.gone.shape[1]
    out, sizes = x_BND.new_empty(batch, left, width), size_BN.new_empty(batch, left, dtype=torch.float32)
    into = found.slot.gather(1, found.gone)
    means_kernel[(batch, left)](
        *(tensor.contiguous() for tensor in (x_BND, size_BN.float(), found.kept, found.gone)), into, out, sizes,
        tokens, width, left, r, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out, sizes


@triton.jit
def means_kernel(x, size, kept, gone, into, out, sizes, tokens, width, left, r, BLOCK: tl.constexpr):
    """One token that stays, with those that join it; alone it stays to the bit."""
    batch, place, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    own = tl.load(kept + batch * left + place)
    before = tl.load(size + batch * tokens + own)
    alone = tl.load(x + (batch * tokens + own) * width + d, mask=d < width, other=0.0)
    total, after = alone.to(tl.float32) * before, before
    for index in range(r):
        if tl.load(into + batch * r + index) == place:
            other = tl.load(gone + batch * r + index)
            weight = tl.load(size + batch * tokens + other)
            if weight > 0:  # padding may hold anything
                total += weight * tl.load(x + (batch * tokens + other) * width + d, mask=d < width, other=0.0).to(
                    tl.float32
                )
                after += weight
    mean = (total / tl.maximum(after, 1.0)).to(alone.dtype)
    result = tl.where(after != before, mean, alone)
    tl.store(out + (batch * left + place) * width + d, result, mask=d < width)
    tl.store(sizes + batch * left + place, after)
