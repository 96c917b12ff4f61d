"""weight_only_linear on a CPU for many rows, and for all where there is no C kernel: torch's packed products for few.

Torch's operators take bf16 activations only (float32 ones run on loops a hundred times slower) and read beyond the
weight where its sizes are not multiples of 16, so such layers never reach them.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compress_kernels.packing import packed
from compress_kernels.timing import trusted
from compress_kernels.weight_only_linear.reference import dequantize, pack, reference, unpack, unpack_zeros

FEW = {4: 96, 8: 48}  # rows up to which torch's packed product beats its dequantizing (576x1536 and 768x3072)
GROUPS = (256, 128, 64, 32)  # of the 4-bit product; a larger one that they divide is read as several
FLOATS = (torch.float32, torch.bfloat16)


def linear(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None, factor: Tensor | None,
    bits: int, library: ctypes.CDLL | None = None,
) -> Tensor:  # fmt: skip
    """Like bf16 for float32 and bf16, exact in float64; `library` holds the C kernels."""
    weight, rows = (words, scale, zeros), x.numel() // x.shape[-1]
    if library and x.dtype in FLOATS and scale.dtype in FLOATS:
        dense = in_bf16(library, *weight, bits, x.shape[-1])
        if dense is not None:
            return _product(x, dense, bias, factor)
    fits = 0 < rows <= FEW.get(bits, 0) and x.dtype != torch.float64 and _fits(x.shape[-1], *weight[1:], bits)
    if not fits or bits not in fast_bits():
        return plain(x, *weight, bias, factor, bits)
    flat = (x if factor is None else x * factor).reshape(-1, x.shape[-1])
    out = few(flat, *weight, bits).to(x.dtype).view(*x.shape[:-1], len(words))
    return out if bias is None else out.add_(bias)


def in_bf16(
    library: ctypes.CDLL, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, columns: int
) -> Tensor | None:
    """The weight [out, in] written by the C kernel; None where it does not know the kind."""
    (width, groups), half = scale.shape, scale.dtype == torch.bfloat16
    out = scale.new_empty(width, columns, dtype=torch.bfloat16)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in (words, scale, zeros, out)]
    places = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = [ctypes.c_int64(size) for size in (columns, width, groups)]
    known = library.weight_only_dequantize(*places[:2], ctypes.c_int64(half), *places[2:], *sizes, bits)
    return out if known else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None) -> Tensor:
    """x in bf16 times a bf16 weight."""
    half = (x if factor is None else x.float() * factor.float()).to(torch.bfloat16)
    if x.dtype == torch.bfloat16:
        return F.linear(half, weight, None if bias is None else bias.to(torch.bfloat16))
    out = F.linear(half, weight).to(x.dtype)
    return out if bias is None else out.add_(bias)


def plain(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None, factor: Tensor | None, bits: int
) -> Tensor:
    """A dense layer with the weight dequantized in the dtype of x."""
    weight = dequantize(words, scale, zeros, bits, x.shape[-1], x.dtype)
    return F.linear(x if factor is None else x * factor.to(x.dtype), weight, None if bias is None else bias.to(x.dtype))


def few(x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """x [rows, in] in bf16 times the machine's own packed form of the weight."""
    weight, scales = packed(words, lambda: _repack(words, scale, zeros, bits, x.shape[1]))
    x = x.to(torch.bfloat16).contiguous()
    if bits == 8:
        return torch.ops.aten._weight_int8pack_mm(x, weight, scales)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, x.shape[1] // len(scales), scales)


@cache
def fast_bits() -> frozenset:
    """The widths whose packed product agrees with the reference here and is not slow; asked once a process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 256, generator=generator).to(torch.bfloat16)

    def serves(bits: int, groups: int) -> bool:
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (256, 256), generator=generator).to(torch.int8)
        weight = pack(codes, bits), torch.rand(256, groups, generator=generator).to(torch.bfloat16), None
        expected = reference(x, *weight, None, None, bits)
        return trusted(lambda: few(x, *weight, bits), lambda: plain(x, *weight, None, None, bits), expected, 5e-3)

    return frozenset(bits for bits, groups in ((4, 4), (8, 1)) if serves(bits, groups))


def _fits(columns: int, scale: Tensor, zeros: Tensor | None, bits: int) -> bool:
    rows, groups = scale.shape
    if columns % 16:
        return False
    return groups == 1 and zeros is None if bits == 8 else rows % 16 == 0 and _group(columns // groups) > 0


def _group(size: int) -> int:
    return next((group for group in GROUPS if size % group == 0), 0)


def _repack(words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = unpack(words, bits, columns).contiguous()
    if bits == 8:
        return codes, scale.to(torch.bfloat16).flatten()
    shift = torch.zeros_like(scale) if zeros is None else -scale * unpack_zeros(zeros, bits, len(words))
    size = columns // scale.shape[1]
    pairs = torch.stack((scale, shift), -1).to(torch.bfloat16)
    weight = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    return weight, pairs.repeat_interleave(size // _group(size), 1).transpose(0, 1).contiguous()
