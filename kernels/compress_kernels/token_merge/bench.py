"""`python -m compress_kernels.token_merge.bench`: a merge by our kernel against the same in torch.

Thread time of one thread, so run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import torch

from compress_kernels.native import reason
from compress_kernels.timing import paired
from compress_kernels.token_merge import token_merge
from compress_kernels.token_merge.reference import reference

SHAPES = ((1, 64, 384), (32, 64, 384), (1, 257, 384), (32, 257, 384), (1, 197, 768), (1, 577, 1024))


@torch.inference_mode()
def main() -> None:
    """A line per shape: microseconds in torch, and how many times faster the kernel is."""
    print(reason() or "the C kernel was built")
    print(f"{'batch, tokens, width':>22} {'torch us':>9}  ours")
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        fixed = torch.arange(shape[1])[None] < 1
        arguments = x, x, torch.ones(shape[:2]), fixed, None, None, shape[1] // 10, False, 0.5
        assert token_merge(*arguments).slot.equal(reference(*arguments).slot)
        times = paired({"torch": lambda a=arguments: reference(*a), "ours": lambda a=arguments: token_merge(*a)})
        base, own = times.values()
        print(f"{str(shape)[1:-1]:>22} {base * 1e6:9.0f}  {base / own:.2f}")


if __name__ == "__main__":
    main()
