"""weight_only_linear on a GPU: weights of 2 to 8 bits are unpacked in registers, for one row and for many.

Imported only where Triton is installed. One row is a dot product a weight row, bound by reading the weight; more rows
use the tensor cores on the dequantized tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.packing import packed
from compress_kernels.weight_only_linear.reference import unpack_zeros

# Legend: R rows (tokens), K input features, N output features, G groups


def linear(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None, factor: Tensor | None, bits: int
) -> Tensor:
    """x [..., in] in its own dtype times the packed weight."""
    x_RK = (x if factor is None else x * factor.to(x.dtype)).reshape(-1, x.shape[-1])
    zero_NG = None if zeros is None else packed(zeros, lambda: unpack_zeros(zeros, bits, len(words)).contiguous())
    return multiply(x_RK, words, scale, zero_NG, bias, bits).view(*x.shape[:-1], len(words))


def multiply(
    x_RK: Tensor, words: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bias_N: Tensor | None, bits: int
) -> Tensor:
    """One row by dot products, more of them by tiles."""
    (rows, depth), (width, groups) = x_RK.shape, scale_NG.shape
    out = x_RK.new_empty(rows, width)
    group = depth // groups
    # A tile of the weight lies within one group, so that a row of it has one scale.
    block_k = min(128, triton.next_power_of_2(depth) if groups == 1 else group & -group)
    tile = {"BITS": bits, "BLOCK_K": block_k, "HAS_ZERO": zero_NG is not None, "HAS_BIAS": bias_N is not None}
    tensors = (x_RK, words, scale_NG, zero_NG, bias_N, out)
    if rows == 1 or block_k < 16:  # below 16 there is no tile for the tensor cores
        block_n = 16
        one_row_kernel[(triton.cdiv(width, block_n), rows)](
            *tensors, width, depth, group, groups, words.shape[1], **tile, BLOCK_N=block_n, num_warps=4
        )
        return out
    block_r, block_n, warps = (16, 64, 4) if rows <= 16 else (64, 64, 4) if rows <= 128 else (128, 128, 8)
    many_rows_kernel[(triton.cdiv(rows, block_r), triton.cdiv(width, block_n))](
        *tensors, rows, width, depth, group, groups, words.shape[1],
        **tile, BLOCK_R=block_r, BLOCK_N=block_n, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def weight_tile(
    words, scale, zero, n, start, width, depth, group, groups, row_words,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """The dequantized weight [BLOCK_N, BLOCK_K] from this column on, in float32; zero outside."""
    MASK: tl.constexpr = (1 << BITS) - 1
    k = start + tl.arange(0, BLOCK_K)
    inside = (n < width)[:, None]
    if 32 % BITS == 0 and BLOCK_K * BITS >= 32:
        EACH: tl.constexpr = 32 // BITS
        word = start // EACH + tl.arange(0, BLOCK_K // EACH)
        packed = tl.load(words + n[:, None] * row_words + word[None], mask=inside & (word < row_words)[None], other=0)
        shift = tl.arange(0, EACH) * BITS
        codes = tl.reshape((packed[:, :, None] >> shift[None, None]) & MASK, (BLOCK_N, BLOCK_K))
    else:  # a code may lie across two words
        bit = k * BITS
        place = words + n[:, None] * row_words + (bit // 32)[None]
        low = tl.load(place, mask=inside & (k < depth)[None], other=0).to(tl.uint32, bitcast=True)
        across = (bit % 32 + BITS > 32) & (k < depth)
        high = tl.load(place + 1, mask=inside & across[None], other=0).to(tl.uint32, bitcast=True)
        left = tl.where(across, 32 - bit % 32, 0).to(tl.uint32)
        codes = ((low >> (bit % 32).to(tl.uint32)[None]) | (high << left[None])).to(tl.int32, bitcast=True) & MASK
    value = (codes - (1 << (BITS - 1))).to(tl.float32)
    place = n * groups + start // group
    if HAS_ZERO:
        value -= tl.load(zero + place, mask=n < width, other=0).to(tl.float32)[:, None]
    value *= tl.load(scale + place, mask=n < width, other=0.0).to(tl.float32)[:, None]
    return tl.where((k < depth)[None], value, 0.0)


@triton.jit
def one_row_kernel(
    x, words, scale, zero, bias, out, width, depth, group, groups, row_words,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + row * depth + k, mask=k < depth, other=0.0).to(tl.float32)
        total += a[None] * weight_tile(
            words, scale, zero, n, start, width, depth, group, groups, row_words, BITS, BLOCK_K, BLOCK_N, HAS_ZERO
        )
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + n, result.to(out.dtype.element_ty), mask=n < width)


@triton.jit
def many_rows_kernel(
    x, words, scale, zero, bias, out, rows, width, depth, group, groups, row_words,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + r[:, None] * depth + k[None], mask=(r < rows)[:, None] & (k < depth)[None], other=0.0)
        b = weight_tile(
            words, scale, zero, n, start, width, depth, group, groups, row_words, BITS, BLOCK_K, BLOCK_N, HAS_ZERO
        )
        total = tl.dot(a, tl.trans(b).to(a.dtype), total)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None]
    inside = (r < rows)[:, None] & (n < width)[None]
    tl.store(out + r[:, None] * width + n[None], total.to(out.dtype.element_ty), mask=inside)
