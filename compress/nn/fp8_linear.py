"""Linear layer with e4m3 weights; activations are quantized to e4m3 a token at run time or stay as they come."""

from __future__ import annotations

from torch import Tensor, nn

from compress_kernels.fp8_linear import fp8_linear
from compress_kernels.fp8_linear.reference import dequantize_weight, quantize_weight


class Fp8Linear(nn.Module):
    """In the place of nn.Linear or transformers' Conv1D; tensors are laid out as compressed-tensors stores them."""

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: nn.Parameter | None, block: int = 0, activations: bool = True,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = bias
        self.block, self.activations = block, activations
        self.transposed = transposed  # was a Conv1D, so no format that only knows nn.Linear can hold this layer
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_linear(cls, linear: nn.Module, scales: str, block: int, activations: bool) -> Fp8Linear:
        """Round a layer's present weight; on the meta device only its shapes."""
        transposed = not isinstance(linear, nn.Linear)
        weight = linear.weight.detach().t().contiguous() if transposed else linear.weight.detach()
        return cls(*quantize_weight(weight, scales, block), linear.bias, block, activations, transposed)

    def dequantized(self) -> Tensor:
        """The weight that this layer stands for, [out, in]."""
        return dequantize_weight(self.weight, self.weight_scale, self.block, self.weight_scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.weight_scale, self.bias, self.block, self.activations)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, scales={list(self.weight_scale.shape)}, activations={self.activations}"
