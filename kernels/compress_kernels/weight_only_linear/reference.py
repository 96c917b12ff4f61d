"""The packed layout of low-bit weights (that of compressed-tensors) and what weight_only_linear means, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [rows, columns] -> int32 words: offset binary, a dense little-endian bit stream along each row."""
    columns = codes.shape[1]
    values = F.pad(codes.to(torch.int32) + (1 << bits - 1), (0, -columns % 32)).unflatten(1, (-1, 32))
    words = values.new_zeros(*values.shape[:2], bits)  # 32 values fill exactly `bits` words
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        words[..., word] |= values[..., index] << shift
        if shift + bits > 32:
            words[..., word + 1] |= values[..., index] >> 32 - shift
    return words.flatten(1)[:, : -(-columns * bits // 32)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The int8 codes [rows, columns] of packed words."""
    if 8 % bits == 0:  # several times faster; words are little-endian here as everywhere torch runs
        parts = words.contiguous().view(torch.uint8)
        values = torch.stack([parts >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1)
        return values.flatten(1)[:, :columns].view(torch.int8) - (1 << bits - 1)
    words = F.pad(words, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))
    values = words.new_empty(*words.shape[:2], 32, dtype=torch.int8)
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        value = words[..., word] >> shift & (1 << min(bits, 32 - shift)) - 1
        if shift + bits > 32:
            value |= words[..., word + 1] << 32 - shift
        values[..., index] = (value & (1 << bits) - 1) - (1 << bits - 1)
    return values.flatten(1)[:, :columns]


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """int8 zero points [out, groups] -> int32 words, packed like codes but along the outputs."""
    return pack(zeros.t(), bits).t().contiguous()


def unpack_zeros(words: Tensor, bits: int, rows: int) -> Tensor:
    """The int8 zero points [out, groups] of packed words."""
    return unpack(words.t(), bits, rows).t()


def dequantize(
    words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight [out, in]: codes less the zero point of their group, times its scale [out, groups]."""
    codes = unpack(words, bits, columns).to(dtype).unflatten(1, (scale.shape[1], -1))
    if zeros is not None:
        codes -= unpack_zeros(zeros, bits, len(words)).to(dtype)[..., None]
    return (codes * scale.to(dtype)[..., None]).flatten(1)


def reference(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None, factor: Tensor | None, bits: int
) -> Tensor:
    """The layer in float64."""
    weight = dequantize(words, scale, zeros, bits, x.shape[-1], torch.float64)
    x = x.double() if factor is None else x.double() * factor.double()
    return F.linear(x, weight, None if bias is None else bias.double())
