"""int8_linear of torch's operators, on any device: to the bit what the C kernel computes."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from compress_kernels.int8_linear.reference import groups_of, quantize_rows
from compress_kernels.timing import trusted

# Legend: R rows (tokens), K input features, N output features
BLOCK = 256  # rows a thread: the sums of a block stay in the second-level cache
FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
EXACT = 512  # columns whose products of codes sum exactly in float32


def plain(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_factor: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation: int = 0,
    group: int = 0,
) -> Tensor:
    """Blocks of rows are quantized, multiplied exactly, and scaled; one group of inputs after the other."""
    x_RK = x.reshape(-1, x.shape[-1])
    out_RN = x.new_empty(len(x_RK), len(weight))
    activate = list(FUNCTIONS.values())[activation]
    scale_N, weights = weight_scale.float().flatten(), groups_of(weight, group)
    sums = [part.sum(1, dtype=torch.int32) for part in weights]
    step = max(1, BLOCK * torch.get_num_threads())
    for rows, out in zip(x_RK.split(step), out_RN.split(step), strict=True):
        values = rows.float() if input_factor is None else rows.float() * input_factor.float()
        result = 0
        for part, weight_part, sum_N in zip(groups_of(values, group), weights, sums, strict=True):
            codes, scale, zero = quantize_rows(part, input_scale, input_zero_point)
            total = _product((codes - 128).to(torch.int8), weight_part) + (128 - zero) * sum_N
            result = total.float().mul_(scale).add_(result)
        result.mul_(scale_N)
        out.copy_(activate(result if bias is None else result.add_(bias.float())))
    return out_RN.view(*x.shape[:-1], len(weight))


def _product(codes: Tensor, weight: Tensor) -> Tensor:
    """The exact int32 product of int8 matrices."""
    (rows, depth), width = codes.shape, len(weight)
    # On CUDA the operator asks for these sizes; on a CPU it is wrong on a weight with one column.
    fits = rows > 16 and depth % 8 == 0 and width % 8 == 0 if codes.is_cuda else depth > 1 and rows > 0
    if fits and integer_product(codes.device.type):
        return torch._int_mm(codes, weight.t())
    pieces = zip(codes.split(EXACT, 1), weight.split(EXACT, 1), strict=True)
    return sum((left.float() @ right.float().t()).to(torch.int32) for left, right in pieces)


@cache
def integer_product(device: str) -> bool:
    """Is torch's own int8 product right here, and no stand-in hundreds of times slower than float32?"""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-128, 128, (256, 256), generator=generator, dtype=torch.int8) for _ in range(2))
    left[0], left[1], right[0], right[1] = 127, -128, 127, -128
    expected = left.double() @ right.double().t()
    left, right = left.to(device), right.to(device)
    floats = left.float(), right.float().t()
    return trusted(lambda: torch._int_mm(left, right.t()).cpu(), lambda: floats[0] @ floats[1], expected, 0)
