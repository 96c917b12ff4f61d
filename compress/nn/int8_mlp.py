"""Two int8 layers with an activation between, as one: what is between them stays in the processor's cache."""

from __future__ import annotations

from torch import Tensor, nn

from compress.nn.int8_linear import Int8Linear
from compress_kernels.int8_mlp import int8_mlp


class Int8Mlp(nn.Module):
    """In the place of the first layer, which holds the activation; the second one's place hands on what it is given."""

    def __init__(self, up: Int8Linear, down: Int8Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        up, down = ((m.weight, m.weight_scale, m.bias, m.input_factor) for m in (self.up, self.down))
        return int8_mlp(x, up, down, self.up.activation, self.up.group)
