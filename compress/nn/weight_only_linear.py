"""Linear layer with 2, 3, 4, 6 or 8 bit weights, one scale a group of inputs; activations stay as they come."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress_kernels.weight_only_linear import weight_only_linear
from compress_kernels.weight_only_linear.reference import dequantize, pack, pack_zeros


def quantize_groups(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [out, in], scales [out, groups] and int8 zero points of that shape or None; group 0 is the whole row.

    Scales are rounded to bf16, as which fast products read them, before the codes are chosen.
    """
    values = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1
    if symmetric:  # the value of largest magnitude gets the code that has no positive twin, so a scale may be negative
        scale = values.gather(-1, values.abs().argmax(-1, keepdim=True)) / least
    else:
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (most - least)
    scale = scale.to(torch.bfloat16).to(weight.dtype)
    scale = torch.where(scale == 0, 1, scale)
    codes = (values / scale.float()).round()
    if symmetric:
        return codes.clamp(least, most).to(torch.int8).flatten(1), scale.squeeze(-1), None
    zeros = (least - low / scale.float()).round().clamp(least, most)
    codes = (codes + zeros).clamp(least, most).to(torch.int8).flatten(1)
    return codes, scale.squeeze(-1), zeros.to(torch.int8).squeeze(-1)


class WeightOnlyLinear(nn.Module):
    """In the place of nn.Linear or transformers' Conv1D; tensors are laid out as compressed-tensors stores them."""

    def __init__(
        self, weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, bias: nn.Parameter | None,
        bits: int, in_features: int, input_factor: Tensor | None = None, transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bits = bits
        self.in_features, self.out_features = in_features, len(weight_packed)
        self.transposed = transposed  # was a Conv1D, so no format that only knows nn.Linear can hold this layer
        shape = torch.tensor([self.out_features, in_features], device=weight_packed.device)
        self.weight_packed = nn.Parameter(weight_packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.weight_zero_point = _frozen(weight_zero_point)
        self.weight_shape = nn.Parameter(shape, requires_grad=False)  # for other readers of the checkpoint
        self.bias = bias
        self.input_factor = _frozen(input_factor)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: nn.Parameter | None, bits: int,
        input_factor: Tensor | None = None, transposed: bool = False,
    ) -> WeightOnlyLinear:  # fmt: skip
        """From int8 codes [out, in] with scales and zero points [out, groups], all codes in -2^(bits-1)..2^(bits-1)-1.

        The layer is x * input_factor times (codes - zero_point) * scale.
        """
        zeros = None if zero_point is None else pack_zeros(zero_point, bits)
        return cls(pack(codes, bits), scale, zeros, bias, bits, codes.shape[1], input_factor, transposed)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int, group: int, symmetric: bool = True, input_factor: Tensor | None = None
    ) -> WeightOnlyLinear:
        """Round a layer's present weight, divided by `input_factor`; on the meta device only shapes."""
        transposed = not isinstance(linear, nn.Linear)
        weight = linear.weight.t() if transposed else linear.weight
        if input_factor is not None:
            weight = weight.float() / input_factor.float()
        codes, scale, zeros = quantize_groups(weight, bits, group, symmetric)
        return cls.from_codes(codes, scale.to(linear.weight.dtype), zeros, linear.bias, bits, input_factor, transposed)

    @property
    def weight(self) -> Tensor:
        """The weight that this layer multiplies `x * input_factor` with, [out, in]; models ask it for its dtype."""
        packed = self.weight_packed, self.weight_scale, self.weight_zero_point
        return dequantize(*packed, self.bits, self.in_features, self.weight_scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.weight_packed, self.weight_scale, self.weight_zero_point
        return weight_only_linear(x, *packed, self.bias, self.input_factor, self.bits)

    def extra_repr(self) -> str:
        group = self.in_features // self.weight_scale.shape[1]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, group={group}, symmetric={self.weight_zero_point is None}"


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
