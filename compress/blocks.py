"""Finds the MLPs (up and down projections that fit) and the layers (list entries that hold attention) of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from compress.roles import is_linear, is_projection, join, parent_of, width_in, width_out
from compress.structure import Attention

DOWN = re.compile(
    r"fc2|fc_2|ffn_output|down_proj|w2|w3|wo|lin2|c_proj|dense_4h_to_h|linear2|linear_2|output_dense|ff_out|out_proj|"
    r"proj_out|fc_out|\d|dense|weights_out|linear_fc2|down|down_layer|linear_out|dense2|proj|fc3|output|wo_proj",
    re.I,
)


@dataclass(frozen=True)
class MLP:
    """One feed-forward module: projections up to `width` channels and one down."""

    path: str
    up: tuple[str, ...]
    down: str
    width: int
    fused_gate: bool  # one up projection holds gate and value
    refusal: str = ""


@dataclass(frozen=True)
class Block:
    """One layer of a stack, with what it holds in the order of the module tree."""

    path: str
    attentions: tuple[str, ...]
    mlps: tuple[str, ...]


def find_mlps(model: nn.Module, attentions: list[Attention]) -> list[MLP]:
    """Every MLP: the innermost module with one or two projections up and one that takes all of them down."""
    modules = dict(model.named_modules())
    heads = {path for attention in attentions for path in attention.projections().values()}
    inside = tuple(join(attention.path, "") for attention in attentions if attention.path)
    near: dict[str, list[str]] = {}  # the free projections below every module, cut where they are too many
    for path, module in modules.items():
        if not is_projection(module) or path in heads or path.startswith(inside):
            continue
        above = path
        while above:
            above = parent_of(above)
            near.setdefault(above, []).append(path)
    found, taken = [], set()
    for path in sorted(near, key=lambda path: -path.count(".") if path else 1):
        names = [name for name in near[path] if name not in taken]
        if len(names) == len(near[path]) and (mlp := read(path, names, modules)):
            found.append(mlp)
            taken.update(names)
    found += [mlp for path, module in modules.items() if (mlp := experts(path, module))]
    order = {path: i for i, path in enumerate(modules)}
    return sorted(found, key=lambda mlp: order[mlp.path])


def read(path: str, names: list[str], modules: dict[str, nn.Module]) -> MLP | None:
    """The MLP made of exactly these projections, if they fit."""
    if len(names) not in (2, 3):
        return None
    for down in reversed(names):
        ups = tuple(name for name in names if name != down)
        width, width_up = width_in(modules[down]), {width_out(modules[up]) for up in ups}
        fused = len(ups) == 1 and width_up == {2 * width}
        same_ends = all(width_in(modules[up]) == width_out(modules[down]) for up in ups)
        if DOWN.fullmatch(down.rpartition(".")[2]) and same_ends and (fused or width_up == {width}):
            return MLP(path, ups, down, width, fused, refusal(path, (*ups, down), width, modules))
    return None


def refusal(path: str, names: tuple[str, ...], width: int, modules: dict[str, nn.Module]) -> str:
    """Why channels cannot be removed exactly; empty where they can."""
    for name in names:
        if not is_linear(modules[name]):
            return f"{name} is a {type(modules[name]).__name__}, not a Linear"
    if width == width_out(modules[names[-1]]):  # norms of the input cannot be told from norms of the channels
        return ""
    for name, module in modules[path].named_modules():
        for own, tensor in module.named_parameters(recurse=False):
            if join(path, name) not in names and width in tensor.shape:
                return f"{join(join(path, name), own)} also works on the {width} channels"
    return ""


def experts(path: str, module: nn.Module) -> MLP | None:
    """A mixture's experts packed in 3-D parameters (`gate_up_proj`, `down_proj`)."""
    packed = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    up = next((name for name in ("gate_up_proj", "up_proj", "w1") if name in packed), None)
    down = next((name for name in ("down_proj", "w2") if name in packed), None)
    if not up or not down:
        return None
    (_, a, b), (_, c, d) = packed[up].shape, packed[down].shape
    width = min({c, d} - ({a, b} & {c, d}), default=0) or min(c, d)
    fused = up == "gate_up_proj"
    return MLP(path, (join(path, up),), join(path, down), width, fused, "its experts are packed in 3-D parameters")


def find_blocks(model: nn.Module, attentions: list[Attention], mlps: list[MLP]) -> list[Block]:
    """The innermost list entries that hold attention and MLP (or only attention where no entry above has an MLP)."""
    modules = dict(model.named_modules())
    lists = [path for path, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    entries = {join(path, name) for path in lists for name, _ in modules[path].named_children()}
    chosen = {entry for attention in attentions if (entry := block_of(attention.path, entries, mlps)) is not None}
    order = [path for path in modules if path in chosen]
    return [
        Block(path, tuple(below(path, [a.path for a in attentions])), tuple(below(path, [m.path for m in mlps])))
        for path in order
    ]


def block_of(path: str, entries: set[str], mlps: list[MLP]) -> str | None:
    """The list entry that is the layer of this attention."""
    chain = []
    while path:
        if path in entries:
            chain.append(path)
        path = parent_of(path)
    whole = [entry for entry in chain if below(entry, [mlp.path for mlp in mlps])]
    return next(iter(whole + chain), None)


def below(path: str, names: list[str]) -> list[str]:
    """Those of the names that are the module itself or lie below it."""
    return [name for name in names if name == path or name.startswith(path + ".")]
