"""Finds the residual streams of a model: what writes into each, which norms and linear layers read it.

An empty copy runs once with autograd on, and its graph is walked back: from the input of every norm to the modules and
parameters that are added up there, from the input of every linear layer to the norms it reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.example import example
from compress.layout import OBSTACLES
from compress.roles import is_linear, join, width_in, width_out

# Steps of the graph that keep every channel what it was, for each token or added up over tokens.
KEEPS = {
    "Add", "Sub", "Neg", "View", "Reshape", "UnsafeView", "Transpose", "Permute", "Expand", "Slice", "Select",
    "Index", "Cat", "Stack", "Clone", "ToCopy", "Unsqueeze", "Squeeze", "Roll", "ConstantPadNd", "Split",
    "SplitWithSizes", "Unbind", "Alias", "Mean", "Sum", "T", "Repeat", "Identity", "AsStrided", "IndexSelect",
    "UpsampleBicubic2D", "UpsampleBilinear2D", "Swapaxes", "Movedim", "Flatten", "Unfold", "Flip",
}  # fmt: skip


@dataclass
class Stream:
    """One residual stream: everything that a change of its basis has to change."""

    width: int
    norms: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)  # linear layers, embeddings and convolutions
    parameters: list[str] = field(default_factory=list)  # added to the stream as they are
    gains: dict[str, list[str]] = field(default_factory=dict)  # per-channel factor -> the writers it multiplies
    readers: dict[str, str] = field(default_factory=dict)  # linear layer -> norm it reads, "" for the bare stream
    refusal: str = ""


@dataclass
class Roots:
    """Where a tensor comes from."""

    norms: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    gains: dict[str, set[str]] = field(default_factory=dict)
    obstacles: set[str] = field(default_factory=set)

    def sources(self) -> set[str]:
        return self.writers | self.parameters


def find_streams(model: nn.Module) -> list[Stream]:
    """The residual streams that norms with linear readers see, each whole or with the reason why it cannot be."""
    empty = emptied(model)
    kinds = {path: norm for path, module in empty.named_modules() if (norm := normalizes(module))}
    seen = Seen(empty, kinds)
    groups = joined({norm: roots for norm, roots in seen.norms.items() if roots.sources() or roots.norms}, seen.first)
    streams = [stream_of(group, seen, empty) for group in groups]
    return [stream for stream in streams if stream]


def emptied(model: nn.Module) -> nn.Module:
    """A copy on the meta device whose weights all want gradients; no memory is taken for them."""
    memo = {}
    for parameter in model.parameters():
        wants = parameter.is_floating_point()
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=wants)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    empty = copy.deepcopy(model, memo).eval()
    if getattr(getattr(empty, "config", None), "pad_token_id", None) is not None:
        empty.config.pad_token_id = None  # else some models look for padding, which has no values here
    return empty


class Norm(NamedTuple):
    """What a norm over the last dimension does."""

    neutral: float  # the weight with which it does not scale
    subtracts: bool  # the mean
    single: bool  # rounds to float32, whatever it is given


def normalizes(module: nn.Module) -> Norm | None:
    """What this norm does, seen on numbers; None for any other module."""
    own = dict(module.named_parameters(recurse=False))
    sizes = {tuple(tensor.shape) for tensor in own.values()} or {getattr(module, "normalized_shape", ())}
    plain = len(sizes) == 1 and len(shape := sizes.pop()) == 1 and shape[0] > 2
    if next(module.children(), None) or not own.keys() <= {"weight", "bias"} or not plain:
        return None
    if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase) or is_linear(module):
        return None
    probe = copy.deepcopy(module).to_empty(device="cpu").double()
    x = 1000 * torch.randn(4, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1000
    centred = x - x.mean(-1, keepdim=True)
    for weight in (1.0, 0.0):
        with torch.no_grad():
            for name, tensor in probe.named_parameters():
                tensor.fill_(weight if name == "weight" else 0.0)
            try:
                out = probe(x)
            except (RuntimeError, TypeError, ValueError, IndexError):  # it takes other inputs, so it is no norm
                return None
        for value, subtracts in ((x, False), (centred, True)):
            exact = value / value.square().mean(-1, keepdim=True).sqrt()
            if isinstance(out, Tensor) and out.shape == x.shape and (error := (out - exact).abs().max()) < 1e-3:
                return Norm(weight, subtracts, bool(error > 1e-9))
    return None


class Seen:
    """What one forward of an empty model showed: the roots of the inputs of its norms and linear layers."""

    def __init__(self, empty: nn.Module, kinds: dict[str, tuple]) -> None:
        self.names = {id(parameter): name for name, parameter in empty.named_parameters()}
        self.first: dict[str, str] = {}  # module -> the first with the same weight
        owners: dict[int, str] = {}
        for path, module in empty.named_modules():
            if isinstance(weight := getattr(module, "weight", None), Tensor):
                self.first[path] = owners.setdefault(id(weight), path)
        self.kinds, self.made, self.alive = kinds, {}, []
        self.norms: dict[str, Roots] = {}
        self.linears: dict[str, Roots] = {}
        hooks = [module.register_forward_hook(self.hook(path, module)) for path, module in empty.named_modules()]
        try:
            with torch.enable_grad():
                empty(**example(empty))
        except OBSTACLES as error:  # such as a hook that makes tensors of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CompressError(f"an empty copy of the model cannot be followed: {reason}") from error
        finally:
            for hook in hooks:
                hook.remove()

    def hook(self, path: str, module: nn.Module):
        writes = is_linear(module) or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)

        def keep(_, args, output) -> None:
            if path in self.kinds:
                merge(self.norms.setdefault(path, Roots()), self.roots(args[0] if args else None))
            elif is_linear(module):
                merge(self.linears.setdefault(path, Roots()), self.roots(args[0] if args else None))
            if (path in self.kinds or writes) and isinstance(output, Tensor) and output.grad_fn is not None:
                self.made[output.grad_fn] = path
                self.alive.append(output)  # a node that is freed may leave its identity to another

        return keep

    def roots(self, tensor: Tensor | None) -> Roots:
        """Walk back from this tensor."""
        found = Roots()
        if not isinstance(tensor, Tensor) or tensor.grad_fn is None:
            return found
        todo, done = [tensor.grad_fn], set()
        while todo:
            node = todo.pop()
            if node in done:
                continue
            done.add(node)
            if (path := self.made.get(node)) is not None:
                (found.norms if path in self.kinds else found.writers).add(path)
            elif hasattr(node, "variable"):
                found.parameters.add(self.names.get(id(node.variable), "?"))
            elif node.name().rstrip("0123456789").removesuffix("Backward") in KEEPS:
                todo += parents(node)
            else:
                todo += self.scaled(node, found)
        return found

    def scaled(self, node, found: Roots) -> list:
        """What a product or quotient scales: by constants, or by a parameter for each channel (LayerScale)."""
        kind, above = node.name().rstrip("0123456789").removesuffix("Backward"), parents(node)
        if kind in ("Mul", "Div") and len(above) == 1:
            return above
        leaves = [parent for parent in above if hasattr(parent, "variable")]
        if kind == "Mul" and len(above) == 2 and len(leaves) == 1 and leaves[0].variable.dim() == 1:
            inner, name = next(p for p in above if p is not leaves[0]), self.names.get(id(leaves[0].variable), "?")
            if (path := self.made.get(inner)) is not None and path not in self.kinds:
                found.gains.setdefault(name, set()).add(path)
                found.writers.add(path)
                return []
        found.obstacles.add("a product of two activations" if kind == "Mul" else f"the operation {kind}")
        return []


def parents(node) -> list:
    return [parent for parent, _ in node.next_functions if parent is not None]


def merge(into: Roots, other: Roots) -> None:
    """A module that is called again has the roots of all calls."""
    for name in ("norms", "writers", "parameters", "obstacles"):
        getattr(into, name).update(getattr(other, name))
    for name, paths in other.gains.items():
        into.gains.setdefault(name, set()).update(paths)


def joined(norms: dict[str, Roots], first: dict[str, str]) -> Iterator[dict[str, Roots]]:
    """The norms in groups that share a source, directly, through others or through a tied weight."""
    left = {
        norm: {norm} | {first.get(path, path) for path in roots.sources() | roots.norms}
        for norm, roots in norms.items()
    }
    while left:
        group, known = set(), set(next(iter(left.values())))
        while more := {norm for norm, sources in left.items() if sources & known}:
            group |= more
            known = known.union(*(left.pop(norm) for norm in more))
        yield {norm: roots for norm, roots in norms.items() if norm in group}


def stream_of(group: dict[str, Roots], seen: Seen, empty: nn.Module) -> Stream | None:
    """The stream that these norms see; None where it is no sum and no linear layer reads it."""
    roots = Roots()
    for one in group.values():
        merge(roots, one)
    width = width_of(empty.get_submodule(next(iter(group))))
    stream = Stream(width, list(group), sorted(roots.writers), with_siblings(roots.parameters, width, empty))
    stream.gains = {name: sorted(paths) for name, paths in roots.gains.items()}
    trouble = [f"{what} writes into it" for what in (*sorted(roots.norms), *sorted(roots.obstacles))]
    for path, one in seen.linears.items():
        read, bare = one.norms & group.keys(), one.sources() & roots.sources()
        if not read and not bare:
            continue
        stream.readers[path] = next(iter(read), "")
        if one.obstacles or len(one.norms) + bool(one.sources()) != 1 or not one.sources() <= roots.sources():
            trouble.append(f"{path} reads it together with something else")
    if not stream.readers and not roots.obstacles and all(len(one.sources() | one.norms) < 2 for one in group.values()):
        return None
    trouble += [f"{norm} is read by more than linear layers" for norm in group if norm not in stream.readers.values()]
    trouble += odd_widths(stream, empty)
    stream.refusal = "; ".join(trouble[:2])
    return stream


def with_siblings(names: set[str], width: int, empty: nn.Module) -> list[str]:
    """With the parameters beside them that this input did not need, such as a mask token."""
    owners = {name.rpartition(".")[0] for name in names - {"?"}}
    beside = {
        join(owner, name)
        for owner in owners
        for name, tensor in empty.get_submodule(owner).named_parameters(recurse=False)
        if tensor.shape and tensor.shape[-1] == width
    }
    return sorted(names | beside)


def odd_widths(stream: Stream, empty: nn.Module) -> Iterator[str]:
    """What does not fit the width of the stream."""
    for path in (*stream.norms, *stream.writers):
        if (width := width_of(empty.get_submodule(path))) != stream.width:
            yield f"{path} is {width} wide, not {stream.width}"
    for path in stream.readers:
        if width_in(empty.get_submodule(path)) % stream.width:
            yield f"{path} reads {width_in(empty.get_submodule(path))} channels, not {stream.width}"
    for name in stream.parameters:
        if name == "?" or empty.get_parameter(name).shape[-1:] != (stream.width,):
            yield f"{name} does not end in channels"


def width_of(module: nn.Module) -> int:
    """How many channels a norm, linear layer, embedding or convolution gives."""
    if is_linear(module):
        return width_out(module)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    sizes = [*(tensor.shape for tensor in module.parameters(recurse=False)), getattr(module, "normalized_shape", (0,))]
    return sizes[0][0]
