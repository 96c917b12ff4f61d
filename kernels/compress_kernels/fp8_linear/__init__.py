"""Linear layer with e4m3 weights: torch's own product on a GPU that has one, elsewhere dequantized weights.

Only torch operations, so compiling and gradients need nothing of us.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compress_kernels.fp8_linear.reference import (
    dequantize_rows,
    dequantize_weight,
    quantize_rows,
    quantize_weight,
    reference,
)
from compress_kernels.timing import trusted

MULTIPLE = 16  # of both sizes of a weight, which torch's product insists on


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: int = 0, activations: bool = True
) -> Tensor:
    """x [..., in] times weight [out, in] with scales [1], [out, 1] or of blocks; the result has the dtype of x.

    `activations` quantizes x as well, a scale a token, with blocks a scale a token and block.
    """
    fits = activations and not block and all(size % MULTIPLE == 0 for size in weight.shape)
    if fits and x.device.type == "cuda" and not torch.is_grad_enabled() and has_product(x.device):
        return product(x, weight, weight_scale, bias)
    return emulated(x, weight, weight_scale, bias, block, activations)


def emulated(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: int, activations: bool
) -> Tensor:
    """The same values by a product in the dtype of x; gradients pass straight through the rounding."""
    if activations:
        rounded = dequantize_rows(*quantize_rows(x, block)).to(x.dtype)
        x = x + (rounded - x).detach() if x.requires_grad else rounded
    return F.linear(x, dequantize_weight(weight, weight_scale, block, x.dtype), bias)


def product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """torch's product of e4m3 codes, with a scale a token and a scale an output; it answers in bfloat16."""
    codes, scale = quantize_rows(x.flatten(0, -2), 0)
    scale_out = weight_scale.float().flatten().expand(len(weight))[None].contiguous()
    out = torch._scaled_mm(codes, weight.t(), scale, scale_out, out_dtype=torch.bfloat16)
    out = out.to(x.dtype).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


@cache
def has_product(device: torch.device) -> bool:
    """Does this GPU multiply e4m3 codes right and not slowly? Asked once a process."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 256, generator=generator).to(device, torch.bfloat16)
    weight, scale = quantize_weight(torch.randn(512, 256, generator=generator).to(device), "channel", 0)
    arguments = (x, weight, scale, None)
    expected = reference(*arguments, 0, True)
    return trusted(lambda: product(*arguments), lambda: emulated(*arguments, 0, True), expected, 5e-3)
