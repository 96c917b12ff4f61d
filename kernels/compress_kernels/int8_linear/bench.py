"""`python -m compress_kernels.int8_linear.bench`: int8_linear against the stock ways to run a linear layer on a CPU.

Thread time of one thread, so run with OMP_NUM_THREADS=1. A path that disagrees with the reference is not timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress_kernels import native
from compress_kernels.int8_linear import accelerated, int8_linear, plain
from compress_kernels.int8_linear.reference import reference
from compress_kernels.timing import paired

SHAPES = ((384, 384), (384, 1536), (1536, 384), (576, 1536), (768, 3072))
ROWS = (1, 32, 128, 1576)


@torch.inference_mode()
def main() -> None:
    """A line per shape: microseconds of eager float32, then how many times faster the others are."""
    print("C kernel" if accelerated() else f"no C kernel: {native.reason()}")
    for depth, width in SHAPES:
        for rows in ROWS:
            times = paired(contestants(rows, depth, width))
            base = times.pop("fp32")
            figures = "  ".join(f"{name} {base / value:5.2f}" for name, value in times.items())
            print(f"{f'{depth}, {width}, {rows}':>16} {base * 1e6:8.0f} us  {figures}", flush=True)


def contestants(rows: int, depth: int, width: int) -> dict:
    """The ways to run this layer, each checked."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator)
    codes = torch.randint(-127, 128, (width, depth), generator=generator).to(torch.int8)
    scale, bias = torch.rand(width, 1, generator=generator) * 4e-4, torch.randn(width, generator=generator)
    weight, half, half_bias = codes * scale, (codes * scale).bfloat16(), bias.bfloat16()
    linear, dynamic = torch.ops.mkldnn._linear_pointwise, torch.ops.quantized.linear_dynamic
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = reorder(weight, rows)
    per_channel = torch.quantize_per_channel(weight, scale.flatten(), torch.zeros(width), 0, torch.qint8)
    stock = torch.ops.quantized.linear_prepack(per_channel, bias)
    x_half = x.bfloat16()
    expected = reference(x, codes, scale, bias)
    for path in (int8_linear(x, codes, scale, bias), plain(x, codes, scale, bias, None, None, None)):
        error = (path - expected).norm() / expected.norm()
        assert error < 1e-5, f"int8_linear is off by {error:.1e}"
    found = {
        "fp32": lambda: F.linear(x, weight, bias),
        "fp32 packed": lambda: linear(x, packed, bias, "none", [], ""),
        "torch.ao dynamic": lambda: dynamic(x, stock, True),
        "int8 of torch's": lambda: plain(x, codes, scale, bias, None, None, None),
        "int8": lambda: int8_linear(x, codes, scale, bias),
        "int8 (bf16)": lambda: int8_linear(x_half, codes, scale, half_bias),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed_half = reorder(half, rows)
        found["bf16 packed"] = lambda: linear(x_half, packed_half, half_bias, "none", [], "")
    return found


if __name__ == "__main__":
    main()
