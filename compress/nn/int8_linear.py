"""Linear layer with int8 weights, one scale an output, and activations quantized to 8 bits at run time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress_kernels.int8_linear import int8_linear


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in -127..127 and one scale a row, rounded to the weight's dtype so that a cast cannot change it."""
    values = weight.detach().float()
    scale = (values.abs().amax(1, keepdim=True) / 127).to(weight.dtype)
    scale = torch.where(scale > 0, scale, 1)  # an all-zero row has codes 0 at any scale
    return (values / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """In the place of nn.Linear or transformers' Conv1D; the result has the dtype of the input.

    The input is quantized a token at a time, or with `input_scale` and `input_zero_point` (0..255, 128 where it is not
    given) all alike; with `group` so many of its channels at a time. `input_factor` multiplies the input's channels
    before; the weight is stored divided by it.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: nn.Parameter | None,
        input_factor: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        transposed: bool = False,
        activation: str = "none",
        group: int = 0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = bias
        if input_scale is not None:  # as compressed-tensors stores them
            input_scale = input_scale.reshape(1)
            if input_zero_point is not None:
                input_zero_point = (input_zero_point.reshape(1).to(torch.int32) - 128).to(torch.int8)
        fixed = {"input_factor": input_factor, "input_scale": input_scale, "input_zero_point": input_zero_point}
        for name, tensor in fixed.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.transposed = transposed  # was a Conv1D, so no format that only knows nn.Linear can hold this layer
        self.activation = activation  # of the output: none, relu, gelu, gelu_tanh, silu
        self.group = group  # input channels that share a range; 0: all
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        input_factor: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> Int8Linear:
        """Quantize a layer's present weight, divided by the factor; on the meta device only its shapes."""
        transposed = not isinstance(linear, nn.Linear)
        weight = linear.weight.t() if transposed else linear.weight
        weight = weight if input_factor is None else weight / input_factor.to(weight.dtype)
        return cls(*quantize_rows(weight), linear.bias, input_factor, input_scale, input_zero_point, transposed)

    def dequantized(self) -> Tensor:
        """The weight of the plain layer that this one stands for, [out, in]."""
        weight = self.weight.to(self.weight_scale.dtype) * self.weight_scale
        return weight if self.input_factor is None else weight * self.input_factor.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        zero_point = None if self.input_zero_point is None else self.input_zero_point.to(torch.int32) + 128
        fixed = self.input_factor, self.input_scale, zero_point
        return int8_linear(x, self.weight, self.weight_scale, self.bias, *fixed, self.activation, self.group)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
