"""Linear layer with 4 or 8 bit weights, one scale a group of inputs; activations stay as they come."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress_kernels.weight_only_linear import weight_only_linear
from compress_kernels.weight_only_linear.reference import dequantize, pack


def quantize_groups(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, groups]; group 0 is the whole row.

    The value of largest magnitude gets the code -2^(bits-1), of which there is no positive twin, so a scale may be
    negative. It is rounded to bf16, as which the fast products read it, before the codes are chosen.
    """
    values = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    scale = (largest / -(1 << bits - 1)).to(torch.bfloat16).to(weight.dtype)
    scale = torch.where(scale == 0, 1, scale)
    codes = (values / scale.float()).round().clamp(-(1 << bits - 1), (1 << bits - 1) - 1)
    return codes.to(torch.int8).flatten(1), scale.squeeze(-1)


class WeightOnlyLinear(nn.Module):
    """In the place of nn.Linear or transformers' Conv1D; tensors are laid out as compressed-tensors stores them."""

    def __init__(
        self, weight_packed: Tensor, weight_scale: Tensor, weight_shape: Tensor, bias: nn.Parameter | None, bits: int,
        in_features: int, transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight_packed = nn.Parameter(weight_packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.weight_shape = nn.Parameter(weight_shape, requires_grad=False)  # for other readers of the checkpoint
        self.bias = bias
        self.bits = bits
        self.in_features, self.out_features = in_features, len(weight_packed)
        self.transposed = transposed  # was a Conv1D, so no format that only knows nn.Linear can hold this layer

    @classmethod
    def from_linear(cls, linear: nn.Module, bits: int, group: int) -> WeightOnlyLinear:
        """Quantize a layer's present weight; on the meta device only its shapes."""
        transposed = not isinstance(linear, nn.Linear)
        weight = linear.weight.t() if transposed else linear.weight
        codes, scale = quantize_groups(weight, bits, group)
        shape = torch.tensor(weight.shape, device=weight.device)
        return cls(pack(codes, bits), scale, shape, linear.bias, bits, weight.shape[1], transposed)

    @property
    def weight(self) -> Tensor:
        """The weight that this layer stands for, [out, in]; some models ask a layer's weight for its dtype."""
        return dequantize(self.weight_packed, self.weight_scale, self.bits, self.in_features, self.weight_scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return weight_only_linear(x, self.weight_packed, self.weight_scale, self.bias, self.bits)

    def extra_repr(self) -> str:
        group = self.in_features // self.weight_scale.shape[1]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, group={group}"
