"""Where a factor per channel can move from a producer into the linear layers that read it, without a trace.

Three places: a norm and the layers that read its output, values and the output projection of an attention, the branch
of an MLP that is multiplied with the gate and the projection down. Candidates are found by structure and by following
tensors through one forward. Each is then proven: with factors that are powers of two, put on by hooks, the answers of
the model must stay the same to the last bit or two. So nothing is ever written to find out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compress.blocks import MLP
from compress.layout import fused_rows, interleaved_rows, ranges
from compress.outputs import relative_error, run
from compress.roles import is_conv1d, is_linear, parent_of, width_in, width_out
from compress.structure import Attention
from compress.view import View


@dataclass(frozen=True)
class Fold:
    """One such place: channels of the producer times a factor, the same inputs of all consumers divided by it."""

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "value", "up"]
    channels: int  # how many factors there are
    repeat: int = 1  # query heads that read the same value head
    size: int = 0  # channels of a head; 0: there are no heads
    rows: tuple[int, ...] = ()  # the producer's outputs that are read, in order; empty: all
    dim: int = -1  # of the producer's output that holds the channels
    offset: int = 0  # what the norm's forward adds to its weight (some store it less one)

    def spread(self, factor: Tensor, width: int) -> Tensor:
        """The factor of every input of a consumer of this width; inputs behind the heads have one."""
        heads = factor.view(-1, self.size or self.channels).repeat_interleave(self.repeat, 0).flatten()
        return torch.cat([heads, heads.new_ones(width - len(heads))])

    def narrow(self, values: Tensor) -> Tensor:
        """The largest of a consumer's values per input among those inputs that share a factor."""
        heads = values[: self.channels * self.repeat].view(-1, self.repeat, self.size or self.channels)
        return heads.amax(1).flatten()


def fold(view: View, place: Fold, factor: Tensor) -> None:
    """Multiply the producer's channels by a positive factor and divide the consumers' inputs by it, in place."""
    assert factor.shape == (place.channels,) and bool((factor > 0).all()), place
    producer = view.module(place.producer)
    wide = outputs_of(place, producer, factor)
    is_norm = place.kind == "norm"
    scale(producer.weight, wide, 0 if is_norm else outputs_dim(producer), place.offset)
    if getattr(producer, "bias", None) is not None:
        scale(producer.bias, wide, 0)
    for path in place.consumers:
        consumer = view.module(path)
        scale(consumer.weight, 1 / place.spread(factor.double(), width_in(consumer)), 1 - outputs_dim(consumer))


@torch.no_grad()
def scale(tensor: Tensor, factor: Tensor, dim: int, offset: int = 0) -> None:
    """Multiply a parameter along one dimension in double precision, in place."""
    shape = [-1 if at == dim else 1 for at in range(tensor.dim())]
    tensor.copy_((tensor.double() + offset) * factor.double().to(tensor.device).view(shape) - offset)


def outputs_of(place: Fold, producer: nn.Module, factor: Tensor) -> Tensor:
    """The factor of every output of the producer."""
    if not place.rows:
        return factor
    wide = factor.new_ones(width_out(producer))
    wide[list(place.rows)] = factor
    return wide


def outputs_dim(linear: nn.Module) -> int:
    """The dimension of a linear layer's weight that holds its outputs."""
    return 1 if is_conv1d(linear) else 0


@torch.no_grad()
def find_folds(view: View, batch: dict) -> list[Fold]:
    """All places that are exact on this batch, of which a single short example is enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several split their work by chance, which shows in the last bits
    try:
        norms, called = norm_folds(view, batch)
        rivals = [[place] for place in norms]
        rivals += [[place] for at in view.attentions() for place in value_folds(view, at)]
        rivals += [up_folds(view, mlp) for mlp in view.mlps()]
        usable = usable_modules(view)
        rivals = [[p for p in places if {p.producer, *p.consumers} <= usable & called] for places in rivals]
        reference, found = run(view.model, batch), []
        if not reference.isfinite().all():
            return []
        while rivals := [places for places in rivals if places]:
            first = sorted((places[0] for places in rivals), key=lambda place: (place.kind, place.producer))
            proven = prove(view, batch, first, reference)
            found += proven
            rivals = [places[1:] for places in rivals if places[0] not in proven]
        order = {path: at for at, (path, _) in enumerate(view.model.named_modules())}
        return sorted(found, key=lambda place: order[place.producer])
    finally:
        torch.set_num_threads(threads)


def usable_modules(view: View) -> set[str]:
    """Norms and linear layers that own their tensors alone and compute what such a layer computes."""
    modules = dict(view.model.named_modules())
    owners = Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False))
    return {
        path
        for path, module in modules.items()
        if not any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
        and (not is_linear(module) or is_conv1d(module) or type(module).forward is nn.Linear.forward)
    }


def value_folds(view: View, at: Attention) -> Iterator[Fold]:
    """Values into the output projection; every value head is read by the query heads of its group."""
    fused = at.qkv or at.kv
    producer, rows = at.v or fused, ()
    if not producer or not at.o or not all(is_linear(view.module(path)) for path in (producer, at.o)):
        return
    if fused and not at.v:
        starts = interleaved_rows if at.layout == "interleaved" else fused_rows
        rows = tuple(ranges(starts(at.heads if at.qkv else 0, at.kv_heads, at.head_dim, at.value_dim)[2], at.value_dim))
    channels, outputs = at.kv_heads * at.value_dim, width_out(view.module(producer))
    fits = max(rows) < outputs if rows else outputs == channels
    if channels and fits and width_in(view.module(at.o)) >= at.heads * at.value_dim:
        yield Fold(producer, (at.o,), "value", channels, at.heads // at.kv_heads, at.value_dim, rows)


def up_folds(view: View, mlp: MLP) -> list[Fold]:
    """The branches of an MLP into its projection down; which of two is the gate, the proof has to tell."""
    modules = dict(view.model.named_modules())
    if not all(path in modules and is_linear(modules[path]) for path in (*mlp.up, mlp.down)):  # or packed experts
        return []
    halves = [tuple(range(mlp.width, 2 * mlp.width)), tuple(range(mlp.width))] if mlp.fused_gate else [()]
    return [Fold(up, (mlp.down,), "up", mlp.width, rows=rows) for up in reversed(mlp.up) for rows in halves]


def norm_folds(view: View, batch: dict) -> tuple[list[Fold], set[str]]:
    """Norms whose output tensor is what linear layers read, and all modules that ran."""
    modules = dict(view.model.named_modules())
    norms = {path: m for path, m in modules.items() if is_norm(m)}
    calls, reads, called = {}, defaultdict(set), set()

    def hear(path, module, args, kwargs, output):
        called.add(path)
        if path in norms and isinstance(output, Tensor):
            calls[output.untyped_storage().data_ptr()] = (path, args, kwargs, output)  # kept, so no address comes twice
        elif is_linear(module) and args and isinstance(args[0], Tensor):
            source = calls.get(args[0].untyped_storage().data_ptr())
            reads[path].add(source and source[0])

    def listener(path):
        return lambda *heard: hear(path, *heard)

    hooks = [m.register_forward_hook(listener(path), with_kwargs=True) for path, m in modules.items()]
    try:
        run(view.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    folds = []
    for path, args, kwargs, output in {call[0]: call for call in calls.values()}.values():
        width = len(norms[path].weight)
        consumers = [p for p, sources in reads.items() if sources == {path} and width_in(modules[p]) == width]
        if consumers and not hidden_readers(modules, path, consumers, called):
            folds += norm_form(norms[path], args, kwargs, output, Fold(path, tuple(consumers), "norm", width))
    return folds, called


def is_norm(module: nn.Module) -> bool:
    """One vector as weight, perhaps another as bias, and nothing else."""
    own = dict(module.named_parameters())
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())


def hidden_readers(modules: dict[str, nn.Module], norm: str, consumers: list[str], called: set[str]) -> bool:
    """Is there a layer beside the consumers that did not run, like an expert, and may read the norm another time?"""
    scope = parent_of(norm)
    while scope and not all(path.startswith(scope + ".") for path in consumers):
        scope = parent_of(scope)
    width, prefix = width_in(modules[consumers[0]]), scope and scope + "."
    near = (path for path in modules if path.startswith(prefix) and path not in called)
    return any(is_linear(modules[path]) and width_in(modules[path]) == width for path in near)


class Alone(nn.Module):
    """A module without its hooks, such as those that merge tokens in front of it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module.forward(*args, **kwargs)


def norm_form(norm: nn.Module, args: tuple, kwargs: dict, output: Tensor, place: Fold) -> Iterator[Fold]:
    """The fold with the dimension and the offset under which scaling the norm's tensors scales its output."""
    factor = powers_of_two(place.channels, output)
    for dim in (-1, 1):
        if output.shape[dim] != place.channels:
            continue
        for offset in (0, 1):
            scaled = {f"module.{name}": p.detach() * factor for name, p in norm.named_parameters()}
            scaled["module.weight"] = scaled["module.weight"] + offset * (factor - 1)
            got = torch.func.functional_call(Alone(norm), scaled, args, kwargs)
            if relative_error(got, output * along(factor, output, dim)) <= torch.finfo(output.dtype).eps:
                yield Fold(**{**vars(place), "dim": dim, "offset": offset})
                return


def along(factor: Tensor, output: Tensor, dim: int) -> Tensor:
    """The factor in a shape that multiplies this dimension of the output."""
    return factor.to(output).view([-1 if at == dim % output.dim() else 1 for at in range(output.dim())])


def powers_of_two(count: int, like: Tensor) -> Tensor:
    """Factors whose products are exact, so that a fold changes no bit of the answers."""
    drawn = torch.randint(-2, 3, (count,), generator=torch.Generator().manual_seed(count))
    return (2.0**drawn).to(like)


def prove(view: View, batch: dict, places: list[Fold], reference: Tensor) -> list[Fold]:
    """Those of the places that change nothing: all at once, else one half after the other."""
    if not places:
        return []
    with folded(view, places):
        got = run(view.model, batch)
    if got.shape == reference.shape and relative_error(got, reference) <= torch.finfo(reference.dtype).eps:
        return places
    half = len(places) // 2
    return prove(view, batch, places[:half], reference) + prove(view, batch, places[half:], reference) if half else []


@contextmanager
def folded(view: View, places: list[Fold]) -> Iterator[None]:
    """The model as it would answer with these folds, by hooks on the tensors that flow."""
    hooks = []
    for place in places:
        producer = view.module(place.producer)
        factor = powers_of_two(place.channels, producer.weight)
        wide = outputs_of(place, producer, factor)
        hooks.append(producer.register_forward_hook(lambda _, args, y, f=wide, dim=place.dim: y * along(f, y, dim)))
        for path in place.consumers:
            consumer = view.module(path)
            narrow = 1 / place.spread(factor, width_in(consumer))
            hooks.append(consumer.register_forward_pre_hook(lambda _, args, f=narrow: (args[0] * f, *args[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
