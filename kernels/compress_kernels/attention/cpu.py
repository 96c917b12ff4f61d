"""Attention on a CPU: our own AVX-512 kernel where it can be built, else torch's.

torch's flash kernel reaches some 90 GFLOP/s a core for short sequences, this one twice that: the scores of a block of
queries stay in the second-level cache, both products run on full registers, and the output needs no transposition.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compress_kernels.attention.products_source import SOURCE as PRODUCTS
from compress_kernels.attention.reference import plain
from compress_kernels.attention.source import SOURCE
from compress_kernels.native import build
from compress_kernels.wide_vectors import SOURCE as SHARED

CODE = SHARED + PRODUCTS + SOURCE  # one string, so that looking the library up at each call does not hash it anew
LONGEST = 4096  # keys; the scores of a block of queries leave the second-level cache beyond


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


class Floats(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("half", ctypes.c_int64)]


class Call(ctypes.Structure):
    _fields_ = [
        *((name, Floats) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("mask", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "depth", "value_depth")),
        *((name, Strides) for name in ("q", "k", "v", "m")),
        ("m_column", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("mask_kind", "causal", "half")),
        ("scale", ctypes.c_float),
    ]


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool, half: bool
) -> Tensor:
    """softmax(query key^T scale + mask) value, [batch, heads, queries, depth]; grouped keys; masked rows give zeros."""
    library = build(CODE) if suits(query, key, value, mask) else None
    if library is None:
        return plain(query, key, value, mask, scale, causal)
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    (batch, heads, queries, depth), (kv_heads, keys) = query.shape, key.shape[1:3]
    out = query.new_empty(batch, queries, heads, value.shape[-1])
    kind, steps = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if kind == 1 else mask.float()
        mask = mask.expand(batch, heads, queries, keys)
        if mask.stride(-1) > 1:
            mask = mask.contiguous()
        steps = mask.stride()
    call = Call(
        *(Floats(tensor.data_ptr(), tensor.dtype == torch.bfloat16) for tensor in (query, key, value)),
        0 if mask is None else mask.data_ptr(), out.data_ptr(),
        batch, heads, heads // kv_heads, queries, keys, depth, value.shape[-1],
        *(Strides(*tensor.stride()[:3]) for tensor in (query, key, value)), Strides(*steps[:3]), steps[3],
        kind, causal, (half or query.dtype == torch.bfloat16) and library.takes_half(),
        depth**-0.5 if scale is None else scale,
    )  # fmt: skip
    if library.attention(ctypes.byref(call)):
        raise MemoryError("attention found no memory for its scratch space")
    return out.transpose(1, 2)


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Is this a case that the C kernel takes, and takes faster?"""
    same = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.bfloat16)
    sizes = query.dim() == 4 and 0 < key.shape[2] <= LONGEST and query.numel() > 0
    return same and sizes and value.shape[-1] > 0 and (mask is None or mask.dim() == 4)
