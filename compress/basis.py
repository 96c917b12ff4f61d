"""Writes a residual stream or the value heads of an attention in another orthonormal basis: weights only, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.layout import fused_rows, interleaved_rows, ranges
from compress.roles import is_conv1d
from compress.stream import Stream, normalizes
from compress.structure import Attention

FLAT = 1e-3  # a gain this far below the largest cannot be divided by


def rotate_stream(model: nn.Module, stream: Stream, matrix: Tensor) -> None:
    """Let the stream x be x @ matrix everywhere; gains of norms and layer scales go into the linear layers first.

    Weights that a writer shares with a reader must have been untied before.
    """
    for name, paths in stream.gains.items():
        gain = model.get_parameter(name)
        for path in paths:
            scale_outputs(model.get_submodule(path), wide(gain))
        put(gain, torch.ones_like(gain))
    for norm in stream.norms:
        readers = [model.get_submodule(path) for path, read in stream.readers.items() if read == norm]
        unite(norm, model.get_submodule(norm), distinct(readers), matrix)
    for reader in distinct([model.get_submodule(path) for path in stream.readers]):
        multiply_inputs(reader, matrix)
    for writer in distinct([model.get_submodule(path) for path in stream.writers]):
        multiply_outputs(writer, matrix)
    for parameter in {id(p): p for p in map(model.get_parameter, stream.parameters)}.values():
        put(parameter, wide(parameter) @ matrix.to(parameter.device))


def rotate_values(model: nn.Module, attention: Attention, matrix: Tensor) -> None:
    """Let every value head v be v @ matrix, and the output projection undo it."""
    a, size = attention, len(matrix)
    rows = {"fused": fused_rows, "interleaved": interleaved_rows}.get(a.layout, fused_rows)
    starts = [head * size for head in range(a.kv_heads)]
    fused_starts = rows(a.heads if a.qkv else 0, a.kv_heads, a.head_dim, a.value_dim)[2]
    for path in filter(None, (a.v, a.added.get("v"), a.qkv or a.kv)):
        values = model.get_submodule(path)
        index = torch.tensor(ranges(starts if path in (a.v, a.added.get("v")) else fused_starts, size))
        weight = wide(weight_of(values))
        turn = matrix.to(weight.device)
        weight[index] = (turn.T @ weight[index].unflatten(0, (-1, size))).flatten(0, 1)
        put(values.weight, weight.T if is_conv1d(values) else weight)
        if values.bias is not None:
            bias = wide(values.bias)
            bias[index] = (bias[index].unflatten(0, (-1, size)) @ turn).flatten()
            put(values.bias, bias)
    for path in filter(None, (a.o, a.added.get("o"))):
        output = model.get_submodule(path)
        weight, width = wide(weight_of(output)), a.heads * size  # beyond it: a parallel block's other half
        weight[:, :width] = (weight[:, :width].unflatten(1, (-1, size)) @ matrix.to(weight.device)).flatten(1)
        put(output.weight, weight.T if is_conv1d(output) else weight)


def unite(path: str, norm: nn.Module, readers: list[nn.Module], matrix: Tensor) -> None:
    """Move a norm's gain, and its bias where all readers have one, into the readers."""
    if getattr(norm, "weight", None) is None:
        return
    one = normalizes(norm).neutral
    gain = wide(norm.weight) + (1 - one)
    bias = getattr(norm, "bias", None)
    if bias is not None and all(reader.bias is not None for reader in readers):
        for reader in readers:
            put(reader.bias, wide(reader.bias) + wide(weight_of(reader)) @ tiled(wide(bias), reader))
        put(bias, torch.zeros_like(bias))
    elif bias is not None and bias.any():
        if gain.abs().min() < FLAT * gain.abs().max():
            raise CompressError(f"{path} has gains near zero and a bias that its readers cannot take")
        put(bias, (wide(bias) / gain) @ matrix.to(bias.device))
    for reader in readers:
        weight = wide(weight_of(reader)) * tiled(gain, reader)
        put(reader.weight, weight.T if is_conv1d(reader) else weight)
    put(norm.weight, torch.full_like(norm.weight, one))


def tiled(vector: Tensor, reader: nn.Module) -> Tensor:
    """The vector once for each stream that the reader has side by side in its input."""
    return vector.repeat(weight_of(reader).shape[1] // len(vector))


def multiply_inputs(reader: nn.Module, matrix: Tensor) -> None:
    """The weight for inputs that are x @ matrix."""
    weight = wide(weight_of(reader))
    weight = (weight.unflatten(1, (-1, len(matrix))) @ matrix.to(weight.device)).flatten(1)
    put(reader.weight, weight.T if is_conv1d(reader) else weight)


def multiply_outputs(writer: nn.Module, matrix: Tensor) -> None:
    """The weight and bias for outputs that are y @ matrix; of an embedding the rows are the outputs."""
    turn = matrix.to(writer.weight.device)
    if isinstance(writer, nn.Embedding) or is_conv1d(writer):
        put(writer.weight, wide(writer.weight) @ turn)
    else:
        put(writer.weight, (turn.T @ wide(writer.weight).flatten(1)).view_as(writer.weight))
    if (bias := getattr(writer, "bias", None)) is not None:
        put(bias, wide(bias) @ turn)


def scale_outputs(writer: nn.Module, gain: Tensor) -> None:
    """The weight and bias for outputs that are y * gain."""
    columns = is_conv1d(writer) or isinstance(writer, nn.Embedding)
    put(writer.weight, wide(writer.weight) * (gain if columns else gain.view(-1, *[1] * (writer.weight.dim() - 1))))
    if (bias := getattr(writer, "bias", None)) is not None:
        put(bias, wide(bias) * gain)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as [out, in]."""
    return linear.weight.T if is_conv1d(linear) else linear.weight


def wide(tensor: Tensor) -> Tensor:
    """A float64 copy outside of autograd."""
    return tensor.detach().to(torch.float64, copy=True)


def distinct(modules: list[nn.Module]) -> list[nn.Module]:
    """One module for each weight."""
    return list({id(module.weight): module for module in modules}.values())


def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter these values in its own dtype."""
    parameter.data.copy_(value)
