"""Two int8 linear layers with an activation between, as one operator: what is between them never leaves the cache."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from compress_kernels.int8_linear import KINDS, int8_linear
from compress_kernels.int8_mlp.source import SOURCES
from compress_kernels.native import build
from compress_kernels.timing import right

NAME = "compress::int8_mlp"
LAYER = "Tensor {0}, Tensor {0}_scale, Tensor? {0}_bias, Tensor? {0}_factor"
SCHEMA = f"(Tensor x, {LAYER.format('up')}, {LAYER.format('down')}, int activation, int group) -> Tensor"

Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # weight, its scale, bias, input factor


def int8_mlp(x: Tensor, up: Layer, down: Layer, activation: str, group: int = 0) -> Tensor:
    """`int8_linear` of what `int8_linear` with the activation makes of x, to the bit."""
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, *up, *down)):
        return int8_linear(int8_linear(x, *up, activation=activation, group=group), *down, group=group)
    return torch.ops.compress.int8_mlp.default(x.contiguous(), *up, *down, KINDS.index(activation), group)


def plain(x: Tensor, *rest: Tensor | None | int) -> Tensor:
    """One layer after the other, on any device."""
    up, down, (kind, group) = rest[:4], rest[4:8], rest[8:]
    linear = torch.ops.compress.int8_linear.default
    return linear(linear(x, *up, None, None, kind, group), *down, None, None, 0, group)


def _default(*arguments: Tensor | None | int) -> Tensor:
    """Runs until the C kernel is there, which then takes the calls on a CPU; for good where there is none."""
    if arguments[0].device.type == "cpu" and accelerated():
        return torch.ops.compress.int8_mlp.default(*arguments)
    return plain(*arguments)


@cache
def accelerated() -> bool:
    """Build the C kernel and put it in the operator's place, if it gives the same bits as two layers here."""
    library = build(*SOURCES)
    if library is None or library.install(b"int8_mlp_native"):
        return False
    generator = torch.Generator().manual_seed(0)

    def layer(depth: int, width: int) -> Layer:
        weight = torch.randint(-127, 128, (width, depth), generator=generator, dtype=torch.int8)
        return weight, torch.rand(width, 1, generator=generator) / 1000, torch.randn(width, generator=generator), None

    x = torch.randn(130, 100, generator=generator)
    arguments = x, *layer(100, 200), *layer(200, 70), KINDS.index("gelu"), 64
    expected = plain(*arguments)
    if not right(lambda: torch.ops.compress.int8_mlp_native(*arguments), expected, 0):
        return False
    return library.install(b"int8_mlp") == 0


def _fake(x, *rest):
    return x.new_empty(*x.shape[:-1], rest[4].shape[0])


# The same file may run twice, from the package and from the code beside a checkpoint; one of them defines.
if not hasattr(torch.ops.compress, "int8_mlp"):
    for suffix in ("", "_plain", "_native"):
        torch.library.define(NAME + suffix, SCHEMA)
    for suffix, function in (("", _default), ("_plain", plain)):
        torch.library.impl(NAME + suffix, "default", function)
        torch.library.register_fake(NAME + suffix, _fake)
