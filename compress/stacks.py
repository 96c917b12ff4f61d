"""The blocks of a model as chains: their calls recorded, to be run again one block after the other.

Blocks count as a chain when replaying them gives what the model itself gives, which is tried out on the data.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from compress.emit import probe_inputs
from compress.outputs import inputs, relative_error
from compress.quick import quick_products
from compress.roles import parent_of
from compress.view import View


def stacks(view: View) -> list[list[str]]:
    """The blocks of the model, list by list."""
    found = defaultdict(list)
    for block in view.blocks():
        found[parent_of(block.path)].append(block.path)
    return list(found.values())


class From(NamedTuple):
    """Stands in a recorded call for a tensor that comes from elsewhere, so that no call keeps it."""

    first: bool  # an argument of the first block, or else what the block before gave
    index: int


class Call(NamedTuple):
    """The arguments of one call of a block; anything but tensors, numbers and their containers is left out."""

    args: tuple
    kwargs: dict[str, Any]

    def after(self, given: list[Tensor], first: list[Tensor]) -> Call:
        """The call with the block before having given these tensors and the first one having got those."""

        def fill(leaf):
            return (first if leaf.first else given)[leaf.index] if isinstance(leaf, From) else leaf

        return Call(*(tree_map(fill, part, is_leaf=is_marker) for part in self))


def is_marker(leaf: Any) -> bool:
    """Does it stand for a tensor?"""
    return isinstance(leaf, From)


@torch.no_grad()
@quick_products()
def answers(block: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that a block gives."""
    return tensors(block(*call.args, **call.kwargs))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class LastBlock(Exception):
    """Ends a forward where nothing behind is asked for."""


class Recorder:
    """Records the calls of a list of blocks, with what each takes from the one before it marked as such."""

    def __init__(self, model: nn.Module, stack: list[str], scale: float = 1) -> None:
        self.model, self.modules, self.scale = model, [model.get_submodule(path) for path in stack], scale
        self.calls: list[Call] = []
        self.given: list[Tensor] = []
        self.chained = True

    @torch.no_grad()
    @quick_products()
    def run(self, batch: dict) -> list[Call]:
        """The calls on one batch; `given` holds the answers of the last block."""
        self.calls, self.given = [], []
        hooks = [module.register_forward_pre_hook(self.before, with_kwargs=True) for module in self.modules]
        hooks += [module.register_forward_hook(self.behind) for module in self.modules]
        try:
            self.model(**inputs(batch))
        except LastBlock:
            return self.calls
        finally:
            for hook in hooks:
                hook.remove()
        self.chained = False  # it did not come to the last block
        return self.calls

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        index = len(self.calls)
        first = tensors(tuple(self.calls[0])) if index else []
        known = {id(tensor): From(True, at) for at, tensor in enumerate(first)}
        known |= {id(tensor): From(False, at) for at, tensor in enumerate(self.given)}
        call = Call(*(tree_map(lambda leaf: known.get(id(leaf), plain(leaf)), part) for part in (args, kwargs)))
        follows = index == 0 or any(is_marker(leaf) and not leaf.first for leaf in leaves(call))
        self.chained &= index < len(self.modules) and module is self.modules[index] and follows
        self.calls.append(call)

    def behind(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.scale != 1 and len(self.calls) == 1:
            output = scaled(output, self.scale)
        self.given = tensors(output)
        if module is self.modules[-1]:
            raise LastBlock
        return output


def leaves(call: Call) -> list:
    """What a call holds."""
    return tree_leaves(tuple(call), is_leaf=is_marker)


def plain(leaf: Any) -> Any:
    """Tensors and numbers; None for caches and other objects, which a second call would write into again."""
    return leaf if isinstance(leaf, Tensor | bool | int | float | str | torch.dtype) else None


def scaled(output: Any, scale: float) -> Any:
    """The same answer with all floating-point tensors multiplied."""
    return tree_map(lambda x: x * scale if isinstance(x, Tensor) and x.is_floating_point() else x, output)


def chain(model: nn.Module, stack: list[str], batches: list[dict]) -> list[list[Call]] | None:
    """The calls of the blocks on each batch; None where the blocks are no chain.

    The proof, on one example: after another answer of the first block, replaying the others gives what the model gives.
    """
    if not proven(model, stack, probe_inputs(model, batches[0])):
        return None
    recorder = Recorder(model, stack)
    calls = [recorder.run(batches[0])]
    later = calls[0][1:]
    if not any(isinstance(leaf, Tensor) for call in later for leaf in leaves(call)):
        start = Recorder(model, stack[:1])  # all else follows from the first call, so this one is enough
        calls += [start.run(batch) + later for batch in batches[1:]]
    else:
        calls += [recorder.run(batch) for batch in batches[1:]]
    alike = all(len(tensors(tuple(each[0]))) == len(tensors(tuple(calls[0][0]))) for each in calls)
    return calls if recorder.chained and alike else None


def proven(model: nn.Module, stack: list[str], batch: dict) -> bool:
    """Do the blocks, run one after the other, give what the model gives?"""
    probe, recorder = Recorder(model, stack, scale=1.25), Recorder(model, stack)
    probe.run(batch)
    if not probe.chained:
        return False
    calls, given = recorder.run(batch), []
    first = tensors(tuple(calls[0]))
    for index, (path, call) in enumerate(zip(stack, calls, strict=True)):
        given = answers(model.get_submodule(path), call.after(given, first))
        given = scaled(given, 1.25) if index == 0 else given
    return all(
        relative_error(got, wanted) <= 100 * torch.finfo(got.dtype).eps
        for got, wanted in zip(given, probe.given, strict=True)
        if got.is_floating_point()
    )
