"""Faster float32 products for what calibration looks at, where the last bits do not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quick_products() -> Iterator[None]:
    """Leave to multiply float32 by bfloat16 parts on a CPU with matrix units; for use as `with` or as a decorator.

    Others go on in float32, but by oneDNN, which is twice as fast as MKL on some.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
