"""A model seen by structure: its attentions, MLPs, layers and linears, and the exact surgery on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.blocks import MLP, Block, find_blocks, find_mlps
from compress.chain import chained
from compress.errors import CompressError, did_you_mean, one_of
from compress.outputs import relative_error, run
from compress.refusals import outer_tables
from compress.roles import is_linear
from compress.structure import Attention, find_attentions
from compress.surgery import keep_heads, keep_width, mask_heads, mask_width

if TYPE_CHECKING:
    from compress.resuming import Trainings

__all__ = ["MLP", "Attention", "Block", "View"]


class View:
    """What the methods may know about a model. Everything is recomputed from the module tree as it is now."""

    def __init__(self, model: nn.Module, trainings: Trainings | None = None) -> None:
        self.model = model
        self.trainings = trainings  # where they keep their state; None where there is no folder for it
        roots = {base.__module__.partition(".")[0] for base in type(model).__mro__}
        self.library = next((name for name in ("transformers", "diffusers") if name in roots), "torch")

    def attentions(self) -> list[Attention]:
        """All attention modules, in the order of the module tree."""
        return find_attentions(self.model)

    def mlps(self) -> list[MLP]:
        """All MLPs, in the order of the module tree."""
        return find_mlps(self.model, self.attentions())

    def blocks(self) -> list[Block]:
        """The layers that hold attention, in the order of the module tree."""
        attentions = self.attentions()
        return find_blocks(self.model, attentions, find_mlps(self.model, attentions))

    def linears(self) -> dict[str, nn.Module]:
        """All linear layers by path, without output heads that share their weight with an embedding."""
        modules = dict(self.model.named_modules())
        embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
        return {p: m for p, m in modules.items() if is_linear(m) and id(m.weight) not in embeddings}

    def module(self, path: str) -> nn.Module:
        """The module at this path."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            near = did_you_mean(path, dict(self.model.named_modules()))
            raise CompressError(f"{path}: no module of this model{near}") from None

    def attention(self, path: str) -> Attention:
        """The attention at this path."""
        found = {attention.path: attention for attention in self.attentions()}
        if path not in found:
            raise CompressError(f"{path}: no attention{did_you_mean(path, found)} (attentions: {one_of(found)})")
        return found[path]

    def replace(self, path: str, module: nn.Module) -> None:
        """Put another module at this path."""
        self.module(path)
        self.model.set_submodule(path, module)

    def keep_heads(self, attention: Attention, kv_groups: list[int], queries: list[int] | None = None) -> None:
        """Remove all heads but those of these groups (and of each group all queries but these)."""
        check_heads(attention, kv_groups, queries)
        keep_heads(self.model, attention, kv_groups, queries)

    def mask_heads(self, attention: Attention, kv_groups: list[int], queries: list[int] | None = None) -> None:
        """Make the output independent of the same heads, in the same shapes."""
        check_heads(attention, kv_groups, queries)
        mask_heads(self.model, attention, kv_groups, queries)

    def keep_width(self, mlp: MLP, channels: list[int]) -> None:
        """Remove all hidden channels but these."""
        check_width(mlp, channels)
        keep_width(self.model, mlp, channels)

    def mask_width(self, mlp: MLP, channels: list[int]) -> None:
        """Make the output independent of the same channels, in the same shapes."""
        check_width(mlp, channels)
        mask_width(self.model, mlp, channels)

    def check_exact(
        self, batch: dict[str, Tensor], attentions: dict[str, list[int]], mlps: dict[str, list[int]]
    ) -> dict[str, float]:
        """How far removing is from masking, for each path alone, on copies: relative error of the output."""
        known = {mlp.path: mlp for mlp in self.mlps()} if mlps else {}
        jobs = [
            (path, self.attention(path), keep, (self.mask_heads, self.keep_heads)) for path, keep in attentions.items()
        ]
        jobs += [(path, known[path], keep, (self.mask_width, self.keep_width)) for path, keep in mlps.items()]
        errors = {}
        for path, part, keep, (mask, remove) in jobs:
            with self.copied(part), torch.no_grad():
                mask(part, keep)
                masked = run(self.model, batch)
            with self.copied(part), torch.no_grad():
                remove(part, keep)
                try:
                    errors[path] = relative_error(run(self.model, batch), masked)
                except (RuntimeError, ValueError, TypeError, IndexError):  # the forward cannot work with what is left
                    errors[path] = math.inf
        return errors

    @contextmanager
    def copied(self, part: Attention | MLP) -> Iterator[None]:
        """Work on a copy of what surgery on this part touches, and put the original back."""
        path = scope(self.model, part)
        original, model = self.model.get_submodule(path), self.model
        try:
            if path:
                model.set_submodule(path, copy.deepcopy(original))
            else:
                self.model = copy.deepcopy(original)
            yield
        finally:
            if path:
                model.set_submodule(path, original)
            self.model = model


def scope(model: nn.Module, part: Attention | MLP) -> str:
    """The innermost module that holds everything surgery on this part changes."""
    if isinstance(part, MLP):
        paths = [part.path, part.down]
    else:
        tables = [owner for owner, _ in outer_tables(part.path, part.heads, dict(model.named_modules()))]
        paths = [part.path, *part.projections().values(), *chained(model, part), *tables]
    words = [path.split(".") for path in paths]
    same = 0
    while all(len(word) > same and word[same] == words[0][same] for word in words):
        same += 1
    return ".".join(words[0][:same])


def check_heads(attention: Attention, kv_groups: list[int], queries: list[int] | None) -> None:
    """Refuse what cannot be done exactly and indices that are not there."""
    if attention.refusal:
        raise CompressError(f"{attention.path}: heads cannot be removed, {attention.refusal}")
    check_indices(f"{attention.path}: kv_groups", kv_groups, attention.kv_heads)
    if queries is not None:
        check_indices(f"{attention.path}: queries", queries, attention.heads // attention.kv_heads)


def check_width(mlp: MLP, channels: list[int]) -> None:
    """The same for the channels of an MLP."""
    if mlp.refusal:
        raise CompressError(f"{mlp.path}: channels cannot be removed, {mlp.refusal}")
    check_indices(f"{mlp.path}: channels", channels, mlp.width)


def check_indices(where: str, indices: list[int], count: int) -> None:
    """Ascending, without repetition, inside the range and at least one."""
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= count:
        raise CompressError(f"{where} are {list(indices)}, they must be one or more ascending numbers below {count}")
