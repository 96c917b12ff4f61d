"""Bipartite merging of similar tokens as one operator: matching, the choice of pairs, and the means of what merges."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from compress_kernels.attention.cpu import Floats
from compress_kernels.attention.products_source import SOURCE as PRODUCTS
from compress_kernels.native import build
from compress_kernels.timing import right
from compress_kernels.token_merge.narrow_source import SOURCE as NARROW
from compress_kernels.token_merge.reference import Merged, reference
from compress_kernels.token_merge.source import SOURCE
from compress_kernels.wide_vectors import SOURCE as SHARED

NAME = "compress::token_merge"
SCHEMA = (
    "(Tensor x, Tensor metric, Tensor size, Tensor fixed, Tensor? alive, Tensor? rows, int r, bool euclidean, "
    "float ward, Tensor? price=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
CODES = (SHARED + PRODUCTS + SOURCE, NARROW + SOURCE)  # the first that this processor knows the instructions of
FLOATS = (torch.float32, torch.bfloat16)


class Call(ctypes.Structure):
    _fields_ = [
        *((name, Floats) for name in ("x", "metric")),
        *((name, ctypes.c_void_p) for name in ("out", "size", "sizes", "kept", "gone", "slot", "fixed")),
        ("fixed_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("alive", "rows")),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "width", "depth", "r")),
        ("euclidean", ctypes.c_int32),
        ("ward", ctypes.c_float),
        ("price", ctypes.c_void_p),
    ]


def token_merge(
    x: Tensor, metric: Tensor, size: Tensor, fixed: Tensor, alive: Tensor | None, rows: Tensor | None, r: int,
    euclidean: bool, ward: float, price: Tensor | None = None,
) -> Merged:  # fmt: skip
    """Merge r of the tokens x (B,n,D) into others by the likeness of `metric` (B,n,K): see `Merged`.

    `size` (B,n, float32) is how many each token stands for, `fixed` (1 or B,n) which take no part. Where there is
    padding, `alive` (B,n) says which tokens are none and `rows` (B) how many go of each row; the rest of r is padding.
    The cost of a pair is multiplied by the `price` (B,n) of both.
    """
    arguments = x, metric, size, fixed, alive, rows, r, euclidean, ward, price
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, metric)):
        return reference(*arguments)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return Merged(*torch.ops.compress.token_merge.default(*arguments))
    return Merged(*_forward(*arguments))


def _forward(x, metric, size, fixed, alive, rows, r, euclidean, ward, price=None) -> tuple[Tensor, ...]:
    arguments = x, metric, size, fixed, alive, rows, r, euclidean, ward, price
    known = x.dtype in FLOATS and metric.dtype in FLOATS and x.shape[1] > 1
    if known and x.is_cuda:
        return tuple(on_gpu()(*arguments))
    return tuple(on_cpu(*arguments) if known and x.device.type == "cpu" and accelerated() else reference(*arguments))


@cache
def on_gpu() -> Callable:
    """The Triton kernels, where Triton is installed."""
    try:
        from compress_kernels.token_merge.triton import merge
    except ImportError:
        return reference
    return merge


@cache
def library() -> ctypes.CDLL | None:
    """The C kernel as this processor can run it, or None where it cannot."""
    return build(*CODES)


@cache
def accelerated() -> bool:
    """Is there a C kernel, and does it give the same here?"""
    if library() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x, fixed = torch.randn(2, 33, 40, generator=generator), torch.zeros(1, 33, dtype=torch.bool)
    arguments = x, x, torch.ones(2, 33), fixed, None, None, 9, False, 0.5
    expected = reference(*arguments)[0]
    return right(lambda: on_cpu(*arguments)[0], expected, 1e-5)


def on_cpu(
    x: Tensor, metric: Tensor, size: Tensor, fixed: Tensor, alive: Tensor | None, rows: Tensor | None, r: int,
    euclidean: bool, ward: float, price: Tensor | None = None,
) -> Merged:  # fmt: skip
    """By the C kernel: a block of likenesses at a time, which stays in the cache."""
    (batch, tokens, width), depth = x.shape, metric.shape[2]
    x, metric, size, fixed = x.contiguous(), metric.contiguous(), size.float().contiguous(), fixed.contiguous()
    alive, rows = (None if tensor is None else tensor.contiguous() for tensor in (alive, rows))
    price = None if price is None else price.float().contiguous()
    found = Merged(
        x.new_empty(batch, tokens - r, width), size.new_empty(batch, tokens - r),
        *(torch.empty(batch, count, dtype=torch.int64) for count in (tokens - r, r, tokens)),
    )  # fmt: skip
    call = Call(
        *(Floats(tensor.data_ptr(), tensor.dtype == torch.bfloat16) for tensor in (x, metric)),
        found.x.data_ptr(), size.data_ptr(), found.size.data_ptr(),
        *(tensor.data_ptr() for tensor in (found.kept, found.gone, found.slot, fixed)),
        tokens if len(fixed) > 1 else 0, *(0 if tensor is None else tensor.data_ptr() for tensor in (alive, rows)),
        batch, tokens, width, depth, r, euclidean, ward, None if price is None else price.data_ptr(),
    )  # fmt: skip
    if library().token_merge(ctypes.byref(call)):
        raise MemoryError("token_merge found no memory for its scratch space")
    return found


def _like(x, metric, size, fixed, alive, rows, r, euclidean, ward, price=None) -> tuple[Tensor, ...]:
    batch, tokens, width = x.shape
    indices = (x.new_empty(batch, count, dtype=torch.int64) for count in (tokens - r, r, tokens))
    return x.new_empty(batch, tokens - r, width), size.new_empty(batch, tokens - r), *indices


# The same file may run twice, from the package and from the code beside a checkpoint; one of them defines.
if not hasattr(torch.ops.compress, "token_merge"):
    torch.library.define(NAME, SCHEMA)
    torch.library.impl(NAME, "default", _forward)
    torch.library.register_fake(NAME, _like)
