"""`python -m compress_kernels.weight_only_linear.bench`: weight_only_linear against dense layers and torch's products.

Thread time of one thread, so run with OMP_NUM_THREADS=1. Where "ours" falls behind "dequantized", `FEW` of source.py
belongs; where torch's packed product falls behind its dequantizing, `FEW` of cpu.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress_kernels.timing import paired
from compress_kernels.weight_only_linear import library, weight_only_linear
from compress_kernels.weight_only_linear.cpu import few, linear, plain
from compress_kernels.weight_only_linear.reference import pack, reference
from compress_kernels.weight_only_linear.source import FEW

SHAPES = ((576, 1536), (1536, 576), (768, 3072))
ROWS = (1, 2, 4, 16, 64, FEW, FEW + 1)


@torch.inference_mode()
def main() -> None:
    """A line per layer: microseconds of a dense float32 layer, then how many times faster the others are."""
    print(f"{'bits, group, in, out, rows':>28} {'fp32 us':>8}")
    for bits, group in ((4, 64), (4, 32), (3, 64), (8, 0)):
        for depth, width in SHAPES:
            for rows in ROWS:
                times = paired(contestants(rows, depth, width, bits, group or depth))
                base = times.pop("fp32")
                line = "  ".join(f"{name} {base / value:.2f}" for name, value in times.items())
                print(f"{f'{bits}, {group}, {depth}, {width}, {rows}':>28} {base * 1e6:8.0f}  {line}")


def contestants(rows: int, depth: int, width: int, bits: int, group: int) -> dict:
    """The ways to run this layer, each checked."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (width, depth), generator=generator).to(torch.int8)
    packed = pack(codes, bits), torch.rand(width, depth // group, generator=generator).bfloat16(), None
    rest = None, None, bits
    weight = torch.randn(width, depth, generator=generator)
    half, x_half = weight.bfloat16(), x.bfloat16()
    found = {
        "ours (bf16 in)": lambda: weight_only_linear(x_half, *packed, *rest),
        "(fp32 in)": lambda: weight_only_linear(x, *packed, *rest),
        "dequantized": lambda: linear(x_half, *packed, *rest, library()),
        "dequantized by torch": lambda: plain(x_half, *packed, *rest),
    }
    if bits in (4, 8):
        found["torch's packed"] = lambda: few(x_half, *packed, bits)
    expected = reference(x_half, *packed, *rest)
    for name, path in found.items():
        error = (path() - expected).norm() / expected.norm()
        assert error < 6e-3, f"{name} is off by {error:.1e}"
    return {"fp32": lambda: F.linear(x, weight), "bf16": lambda: F.linear(x_half, half), **found}


if __name__ == "__main__":
    main()
