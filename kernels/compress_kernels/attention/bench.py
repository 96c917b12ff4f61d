"""`python -m compress_kernels.attention.bench`: our attention against torch's.

Thread time of one thread, so run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import torch

from compress_kernels.attention import attention
from compress_kernels.attention.reference import plain, reference
from compress_kernels.native import reason
from compress_kernels.timing import paired

# batch, heads, key heads, tokens, depth of a head
SHAPES = ((1, 12, 12, 128, 32), (32, 12, 12, 128, 32), (1, 6, 6, 257, 64), (1, 12, 12, 1024, 64), (1, 9, 3, 256, 64))


@torch.inference_mode()
def main() -> None:
    """A line per shape: microseconds of torch's attention in float32, then how many times faster the others are."""
    print(reason() or "the C kernel was built")
    print(f"{'batch, heads, keys, tokens, depth':>34} {'torch us':>9}  torch bf16  ours fp32  rounded    ours bf16")
    for shape in SHAPES:
        batch, heads, kv_heads, tokens, depth = shape
        generator = torch.Generator().manual_seed(0)
        sizes = ((tokens, heads, depth), (tokens, kv_heads, depth), (tokens, kv_heads, depth))
        full = [torch.randn(batch, *size, generator=generator).transpose(1, 2) for size in sizes]
        expected = reference(*full, None, None, False)
        error = (attention(*full) - expected).norm() / expected.norm()
        assert error < 2e-6, f"attention is off by {error:.1e}"
        times = paired(contestants(full, [tensor.bfloat16() for tensor in full]))
        base, *others = times.values()
        print(f"{str(shape)[1:-1]:>34} {base * 1e6:9.0f} " + "  ".join(f"{base / value:9.2f}" for value in others))


def contestants(full: list, half: list) -> dict:
    """The ways to compute this attention."""
    return {
        "torch": lambda: plain(*full, None, None, False),
        "torch bf16": lambda: plain(*half, None, None, False),
        "ours": lambda: attention(*full),
        "ours, products rounded": lambda: attention(*full, half=True),
        "ours bf16": lambda: attention(*half),
    }


if __name__ == "__main__":
    main()
