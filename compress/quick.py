"""Faster float32 products for what calibration looks at, by another library where that is no less exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

EXACT = 1e-5  # relative error that products of float32 stay far below, and those of bfloat16 far above


@contextmanager
def quick_products() -> Iterator[None]:
    """Let oneDNN multiply float32 instead of MKL, twice as fast on some CPUs; for use as `with` or as a decorator.

    It is asked for by leave to multiply bfloat16 parts, which on a CPU with matrix units it takes: two digits are too
    few for sums that equations are solved from, so there everything stays as it is.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if exact() else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def exact() -> bool:
    """Are products with that leave as exact as without it on this machine?"""
    matmul = torch.backends.mkldnn.matmul
    before, x = matmul.fp32_precision, torch.linspace(-1, 1, 256**2).view(256, 256)
    matmul.fp32_precision = "bf16"
    try:
        found = x @ x
    finally:
        matmul.fp32_precision = before
    wanted = x.double() @ x.double()
    return bool((found - wanted).norm() < EXACT * wanted.norm())
