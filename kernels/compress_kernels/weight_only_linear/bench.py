"""`python -m compress_kernels.weight_only_linear.bench`: both paths of weight_only_linear against dense layers.

Thread time of one thread, so run with OMP_NUM_THREADS=1. Where the columns of the paths cross, `FEW` of cpu.py belongs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress_kernels.timing import paired
from compress_kernels.weight_only_linear.cpu import few, plain
from compress_kernels.weight_only_linear.reference import pack, reference

SHAPES = ((576, 1536), (768, 3072))
ROWS = (1, 8, 32, 64, 128, 512)


@torch.inference_mode()
def main() -> None:
    """A line per layer: microseconds of a dense float32 layer, then how many times faster the others are."""
    columns = ("bf16", "packed (bf16 in)", "(fp32 in)", "dequantized (bf16 in)", "(fp32 in)")
    print(f"{'bits, in, out, rows':>22} {'fp32 us':>9}  " + "  ".join(columns))
    for bits, groups in ((4, 64), (8, 0)):
        for depth, width in SHAPES:
            for rows in ROWS:
                times = paired(contestants(rows, depth, width, bits, groups or depth))
                base, *others = times.values()
                layer = f"{bits}, {depth}, {width}, {rows}"
                print(f"{layer:>22} {base * 1e6:9.0f} " + "  ".join(f"{base / value:10.2f}" for value in others))


def contestants(rows: int, depth: int, width: int, bits: int, group: int) -> dict:
    """The ways to run this layer, each checked."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (width, depth), generator=generator).to(torch.int8)
    packed = pack(codes, bits), torch.rand(width, depth // group, generator=generator).bfloat16(), None
    weight = torch.randn(width, depth, generator=generator)
    half, x_half = weight.bfloat16(), x.bfloat16()
    expected = reference(x, *packed, None, None, bits)
    for path in (few(x, *packed, bits), plain(x, *packed, None, None, bits)):
        error = (path - expected).norm() / expected.norm()
        assert error < 5e-3, f"weight_only_linear is off by {error:.1e}"
    return {
        "fp32": lambda: F.linear(x, weight),
        "bf16": lambda: F.linear(x_half, half),
        "packed": lambda: few(x_half, *packed, bits),
        "packed fp32": lambda: few(x, *packed, bits).float(),
        "dequantized": lambda: plain(x_half, *packed, None, None, bits),
        "dequantized fp32": lambda: plain(x, *packed, None, None, bits),
    }


if __name__ == "__main__":
    main()
