"""int8_linear on a CPU: oneDNN's u8 x s8 product for many rows, `_int_mm` for a single one.

Two traps set the shape of this file. oneDNN runs s8 activations on a reference kernel, hundreds of times slower than u8
with zero point 128. And Inductor's freezing rewrites a visible `_int_mm` into exactly that, hence the opaque operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compress_kernels.int8_linear.reference import quantize_rows, reference
from compress_kernels.packing import packed
from compress_kernels.timing import trusted

# Legend: R rows (tokens), K input features, N output features
BLOCK = 256  # rows a thread: the float accumulator of a block stays in the second-level cache
DEEPEST = 65536  # 255 * 127 * K stays below 2^31


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The fastest path that this machine runs right."""
    x_RK = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.float()
    out_RN = _path(x_RK, paths())(x_RK, weight, weight_scale.float().flatten(), bias)
    return out_RN.to(x.dtype).view(*x.shape[:-1], len(weight))


def _path(x_RK: Tensor, allowed: frozenset):
    rows, depth = x_RK.shape
    if rows == 1 and 1 < depth <= DEEPEST and single in allowed:
        return single
    return blocks if rows > 0 and depth <= DEEPEST and blocks in allowed else plain


@cache
def paths() -> frozenset:
    """The fast paths that agree with the reference here; asked once a process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 256, generator=generator)
    x[0], x[1], x[2] = 1, -1, 0  # all codes at their limits, and none
    weight = torch.randint(-127, 128, (256, 256), generator=generator).to(torch.int8)
    weight[0], weight[1] = 127, -127
    scale, bias = torch.rand(256, generator=generator), torch.randn(256, generator=generator)

    def right(path: Callable, rows: Tensor) -> bool:
        expected = reference(rows, weight, scale, bias)
        return trusted(lambda: path(rows, weight, scale, bias), lambda: F.linear(rows, weight.float()), expected, 1e-5)

    return frozenset(path for path, rows in ((single, x[:1]), (blocks, x)) if right(path, rows))


def single(x_RK: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """One row: `_int_mm` reads the weight as it is stored, without a packed copy."""
    codes, row_scale = _codes(x_RK.float())
    return _scaled(torch._int_mm(codes, weight.t()).float(), scale_N * row_scale, bias_N)


def blocks(x_RK: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """Many rows: u8 codes around 128 times prepacked weights, in blocks that stay in the cache."""
    weights, zeros = packed(weight, lambda: _prepack(weight))
    out = x_RK.new_empty(len(x_RK), len(weight))
    for x, y in zip(*(tensor.split(BLOCK * torch.get_num_threads()) for tensor in (x_RK, out)), strict=True):
        codes, row_scale = _codes(x.float())
        unsigned = codes.view(torch.uint8).bitwise_xor_(128)  # + 128; a cast to uint8 is not vectorised
        product = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, weights, scale_N, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        _scaled(product, row_scale, bias_N, out=y)
    return out


def plain(x_RK: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """Any machine: the codes multiplied as floats."""
    codes, row_scale = quantize_rows(x_RK)
    return _scaled((codes.float() @ weight.float().t()).mul_(scale_N), row_scale, bias_N)


def _prepack(weight: Tensor) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    return torch.ops.onednn.qlinear_prepack(weight.detach().contiguous(), None), zeros


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in place; an all-zero row gets any codes, its scale of 0 removes them."""
    scale = x.abs().amax(-1, keepdim=True).div_(127.5)
    return (x / scale).round_().clamp_(max=127).to(torch.int8), scale


def _scaled(product: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mul(product, scale, out=out) if bias is None else torch.addcmul(bias, product, scale, out=out)
