"""int8_linear on a GPU: one kernel quantizes rows, one multiplies and dequantizes without an int32 round trip.

Imported only where Triton is installed. The sums are exact, so every path gives the same codes and the same sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.packing import packed

# Legend: R rows (tokens), K input features, N output features
HALF = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest even integer
GROUPED = tl.constexpr(8)  # tiles of rows that share their tiles of the weight in the cache


def linear(x_RK: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None, factor_K: Tensor | None) -> Tensor:
    """x in its own dtype times int8 weight [N, K]; the activations get one scale and one zero point a row."""
    sum_N = packed(weight, lambda: weight.sum(1, dtype=torch.int32))
    return multiply(*quantize(x_RK, factor_K), weight, sum_N, scale_N, bias_N, x_RK.dtype)


def quantize(x_RK: Tensor, factor_K: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes less 128 as int8, the scale and the zero point (less 128) of every row."""
    rows, depth = x_RK.shape
    codes = torch.empty_like(x_RK, dtype=torch.int8)
    scale = x_RK.new_empty(rows, dtype=torch.float32)
    zero = x_RK.new_empty(rows, dtype=torch.int32)
    block = triton.next_power_of_2(depth)
    quantize_kernel[(rows,)](
        x_RK, factor_K, codes, scale, zero, depth,
        HAS_FACTOR=factor_K is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, scale, zero


def multiply(
    codes: Tensor, scale_R: Tensor, zero_R: Tensor, weight: Tensor, sum_N: Tensor, scale_N: Tensor,
    bias_N: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(codes - zero) times the weight, both scales and the bias, in one kernel."""
    (rows, depth), width = codes.shape, len(weight)
    out = codes.new_empty(rows, width, dtype=dtype)
    block_r, block_n, warps = (16, 64, 4) if rows <= 16 else (64, 64, 4) if rows <= 256 else (128, 128, 8)
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(width, block_n),)
    multiply_kernel[grid](
        codes, weight, scale_R, zero_R, scale_N, sum_N, bias_N, out, rows, width, depth,
        HAS_BIAS=bias_N is not None, BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_K=128 if depth >= 128 else 32,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def quantize_kernel(x, factor, codes, scale, zero, depth, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < depth
    value = tl.load(x + row * depth + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        value *= tl.load(factor + column, mask=inside, other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(value, 0), 0.0)
    step = tl.div_rn(tl.maximum(tl.max(value, 0), 0.0) - low, 255.0)
    lost = tl.max((value != value).to(tl.int32), 0)  # maximum and minimum do not see NaN
    safe = tl.where(step > 0, step, 1.0)
    point = (tl.div_rn(-low, safe) + HALF) - HALF
    code = (tl.div_rn(value, safe) + HALF) - HALF + point
    code = tl.minimum(tl.maximum(code, 0.0), 255.0) - 128.0
    tl.store(codes + row * depth + column, code.to(tl.int8), mask=inside)
    tl.store(scale + row, tl.where(lost > 0, float("nan"), step))
    tl.store(zero + row, point.to(tl.int32) - 128)


@triton.jit
def multiply_kernel(
    codes, weight, row_scale, row_zero, column_scale, column_sum, bias, out, rows, width, depth,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, tiles_r, tiles_n = tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.cdiv(width, BLOCK_N)
    first = tile // (GROUPED * tiles_n) * GROUPED
    tall = tl.minimum(tiles_r - first, GROUPED)
    r = (first + tile % (GROUPED * tiles_n) % tall) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    n = tile % (GROUPED * tiles_n) // tall * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.int32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(codes + r[:, None] * depth + k[None], mask=(r < rows)[:, None] & (k < depth)[None], other=0)
        b = tl.load(weight + n[None] * depth + k[:, None], mask=(n < width)[None] & (k < depth)[:, None], other=0)
        total = tl.dot(a, b, total)
    zero = tl.load(row_zero + r, mask=r < rows, other=0)
    sums = tl.load(column_sum + n, mask=n < width, other=0)
    result = (total - zero[:, None] * sums[None]).to(tl.float32)
    result *= tl.load(row_scale + r, mask=r < rows, other=0.0)[:, None]
    result *= tl.load(column_scale + n, mask=n < width, other=0.0)[None]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < width, other=0.0)[None]
    inside = (r < rows)[:, None] & (n < width)[None]
    tl.store(out + r[:, None] * width + n[None], result.to(out.dtype.element_ty), mask=inside)
