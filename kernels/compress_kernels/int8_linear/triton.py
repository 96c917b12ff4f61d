"""int8_linear on a GPU: one kernel quantizes rows, one multiplies and dequantizes without an int32 round trip.

Imported only where Triton is installed. The sums are exact, so every path gives the same codes and the same sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.int8_linear.reference import groups_of
from compress_kernels.int8_linear.torch_path import FUNCTIONS
from compress_kernels.packing import packed

# Legend: R rows (tokens), K input features, N output features
HALF = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest even integer
SMALLEST = tl.constexpr(1e-30)  # as in reference.py
FARTHEST = tl.constexpr(65536.0)
GROUPED = tl.constexpr(8)  # tiles of rows that share their tiles of the weight in the cache


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_factor: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation: int = 0,
    group: int = 0,
) -> Tensor:
    """x [..., in] in its own dtype times int8 weight [out, in], as `plain` does it."""
    group = group or x.shape[-1]
    sum_GN = packed(
        weight, lambda: torch.stack([part.sum(1, dtype=torch.int32) for part in groups_of(weight, group)]), group
    )
    rows = quantize(x.reshape(-1, x.shape[-1]), group, input_factor, input_scale, input_zero_point)
    out = multiply(*rows, group, weight, sum_GN, weight_scale, bias, x.dtype).view(*x.shape[:-1], len(weight))
    return list(FUNCTIONS.values())[activation](out)


def quantize(
    x_RK: Tensor, group: int, factor_K: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes less 128 as int8, the scale and the zero point (less 128) of every row and group of inputs."""
    rows, depth = x_RK.shape
    groups = triton.cdiv(depth, group)
    codes = torch.empty_like(x_RK, dtype=torch.int8)
    scale_RG = x_RK.new_empty(rows, groups, dtype=torch.float32)
    zero_RG = x_RK.new_empty(rows, groups, dtype=torch.int32)
    block = triton.next_power_of_2(min(group, depth))
    quantize_kernel[(rows, groups)](
        x_RK, factor_K, scale, zero, codes, scale_RG, zero_RG, depth, group,
        HAS_FACTOR=factor_K is not None, HAS_SCALE=scale is not None, HAS_ZERO=zero is not None,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, scale_RG, zero_RG


def multiply(
    codes: Tensor, scale_RG: Tensor, zero_RG: Tensor, group: int, weight: Tensor, sum_GN: Tensor, scale_N: Tensor,
    bias_N: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(codes - zero) times the weight, group by group, the scales and the bias, in one kernel."""
    (rows, depth), width = codes.shape, len(weight)
    out = codes.new_empty(rows, width, dtype=dtype)
    block_r, block_n, warps = (16, 64, 4) if rows <= 16 else (64, 64, 4) if rows <= 256 else (128, 128, 8)
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(width, block_n),)
    multiply_kernel[grid](
        codes, weight, scale_RG, zero_RG, scale_N, sum_GN, bias_N, out, rows, width, depth, group,
        HAS_BIAS=bias_N is not None, BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_K=128 if group >= 128 else 32,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def quantize_kernel(
    x, factor, given_scale, given_zero, codes, scale, zero, depth, group,
    HAS_FACTOR: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * group + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < group) & (column < depth)
    value = tl.load(x + row * depth + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        value *= tl.load(factor + column, mask=inside, other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(value, 0), 0.0)
    span = tl.maximum(tl.max(value, 0), 0.0) - low
    # Minimum and maximum do not see NaN.
    finite = (tl.max((value != value).to(tl.int32), 0) == 0) & (span < float("inf"))
    if HAS_SCALE:
        step = tl.load(given_scale).to(tl.float32)
        inverse = tl.div_rn(1.0, step)
        point = 128.0
        if HAS_ZERO:
            point = tl.load(given_zero).to(tl.float32)
    else:
        step = tl.where(span > SMALLEST, tl.div_rn(span, 255.0), 0.0)
        inverse = tl.where(finite & (step > 0), tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
        point = (-low * inverse + HALF) - HALF
    point = tl.where(finite, point, 0.0)
    code = tl.minimum(tl.maximum(value * inverse, -FARTHEST), FARTHEST)
    code = (code + HALF) - HALF + point
    code = tl.where(finite, tl.minimum(tl.maximum(code, 0.0), 255.0), 0.0) - 128.0
    tl.store(codes + row * depth + column, code.to(tl.int8), mask=inside)
    own = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(scale + own, tl.where(finite, step, float("nan")))
    tl.store(zero + own, point.to(tl.int32) - 128)


@triton.jit
def multiply_kernel(
    codes, weight, row_scale, row_zero, column_scale, column_sum, bias, out, rows, width, depth, group,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, tiles_r, tiles_n = tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.cdiv(width, BLOCK_N)
    first = tile // (GROUPED * tiles_n) * GROUPED
    tall = tl.minimum(tiles_r - first, GROUPED)
    r = (first + tile % (GROUPED * tiles_n) % tall) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    n = tile % (GROUPED * tiles_n) // tall * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    result = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    groups = tl.cdiv(depth, group)
    for g in range(groups):
        last = tl.minimum((g + 1) * group, depth)
        total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.int32)
        for start in range(g * group, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(codes + r[:, None] * depth + k[None], mask=(r < rows)[:, None] & (k < last)[None], other=0)
            b = tl.load(weight + n[None] * depth + k[:, None], mask=(n < width)[None] & (k < last)[:, None], other=0)
            total = tl.dot(a, b, total)
        zero = tl.load(row_zero + r * groups + g, mask=r < rows, other=0)
        sums = tl.load(column_sum + g * width + n, mask=n < width, other=0)
        scale = tl.load(row_scale + r * groups + g, mask=r < rows, other=0.0)
        result += (total - zero[:, None] * sums[None]).to(tl.float32) * scale[:, None]
    result *= tl.load(column_scale + n, mask=n < width, other=0.0).to(tl.float32)[None]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None]
    inside = (r < rows)[:, None] & (n < width)[None]
    tl.store(out + r[:, None] * width + n[None], result.to(out.dtype.element_ty), mask=inside)
