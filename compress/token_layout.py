"""What the tokens of a model are: which are special, what ties them to places, and where they may become fewer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import isqrt
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from compress.attend import attend_through
from compress.errors import CompressError
from compress.nn.token_merge import on_first, turned
from compress.nn.window import ImageSize
from compress.outputs import answer
from compress.roles import parent_of, width_in
from compress.structure import Attention
from compress.view import Block, View

LEADING = ("cls_token", "class_token", "class_embedding", "distillation_token", "register_tokens")
UNUSED = ("mask_token",)  # takes the place of patches, adds none
# Parts of the names under which an attention gets or makes positions, which belong to the full input.
POSITIONS = re.compile(
    "rotary|rope|freqs|position_embeddings|position_bias|relative_pos|relative_attention_bias|rel_pos|distance_emb|alibi"
)
WRONG = (AttributeError, CompressError, IndexError, RuntimeError, TypeError, ValueError)  # raised by a part tried alone


def positions(module: nn.Module, known: str = "") -> str:
    """Why a module needs the full grid: it gets or makes positions, beside those `known`, that merged tokens lose."""
    forwards = [type(module).forward] + ([type(module.processor).__call__] if hasattr(module, "processor") else [])
    names = [name for name, _ in module.named_children()]
    for forward in map(inspect.unwrap, forwards):
        names += [*inspect.signature(forward).parameters, *forward.__code__.co_names]
    hit = next((name for name in names if name != known and POSITIONS.search(name)), None)
    return f"its positions are those of the full input ({hit})" if hit else ""


@torch.no_grad()
def follows_rows(view: View, attention: Attention) -> bool:
    """Are an attention's only positions the rotary rows that it is given, one for each patch? Found by trying: where
    patches change places together with their rows, the answers must change places with them."""
    module = view.module(attention.path)
    if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
        return False
    module, generator = guinea_pig(module), torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width(view, attention), generator=generator).expand(2, -1, -1)
    rows = torch.randn(2, 4, attention.head_dim, generator=generator)
    order = torch.tensor([[2, 0, 3, 1], [1, 3, 2, 0]])
    moved = torch.cat([x[:, :1], x[0, 1:][order]], 1)
    try:
        plain, found = (
            module(x, position_embeddings=tuple(rows)),
            module(moved, position_embeddings=turned(rows, order)),
        )
    except WRONG:
        return False
    plain, found = plain[0], found[0]
    return torch.allclose(found[:, 1:], plain[0, 1:][order], atol=1e-5) and torch.allclose(found[:, 0], plain[:, 0])


def special_tokens(model: nn.Module, stack: str) -> dict | str:
    """The special tokens (leading ones, a text's last), by the parameters of the nearest embeddings; or why not."""
    for owner in above(model, stack):
        inner = set(model.get_submodule(stack).modules())
        outside = [module for module in owner.modules() if module not in inner]
        vocabulary = getattr(getattr(owner, "config", None), "vocab_size", None)
        image = any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in outside)
        text = any(isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary for module in outside)
        if image or text:
            break
    if image and text:
        return "its tokens are of several kinds"
    own = {name: tensor for module in outside for name, tensor in module.named_parameters(recurse=False)}
    unknown = [name for name in own if name.endswith(("_token", "_tokens")) and name not in LEADING + UNUSED]
    if unknown:
        return f"the place of its {unknown[0]} is not known"
    first = sum(own[name].shape[-2] if own[name].dim() > 1 else 1 for name in LEADING if name in own)
    return {"first": max(first, int(text)), "last": text}


def patch_size(config) -> int | str:
    """The side of an image's patches, or why there is none; without patches the feature map itself is the grid."""
    patch = getattr(config, "patch_size", None) or 1
    if isinstance(patch, int):
        return patch
    return patch[0] if len(set(patch)) == 1 else f"its patches are not square: {tuple(patch)}"


def watch(view: View, paths: list[str], size: ImageSize) -> list:
    """Let every module from the model down to these report the image that passes through it."""
    onward = {".".join(path.split(".")[:depth]) for path in paths for depth in range(path.count(".") + 2)}
    return [view.module(path).register_forward_pre_hook(size, with_kwargs=True) for path in sorted(onward)]


def above(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that hold this one, the nearest first."""
    found = []
    while path:
        path = parent_of(path)
        found.append(model.get_submodule(path))
    return found


class Record(nn.Module):
    """A core that remembers the keys and the mask it is given, and answers with the values."""

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs):
        self.key, self.mask = key, mask
        return value


@torch.no_grad()
def merge_point(view: View, block: Block, attention: Attention, inside: bool) -> dict[str, str]:
    """Where in a block its tokens may become fewer, so that its MLP is spared too, found by trying: after the attention
    with its residual if that is a module of its own, else around the MLP and the norm in front of it; or at its end."""
    part = parent_of(attention.path)[len(block.path) + 1 :]
    # In float64: random weights make numbers in the thousands, whose differences float32 does not tell.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width(view, attention), generator=generator, dtype=torch.float64)
    call = partial(tokens_alone, x=x, rows=torch.ones(2, 3, attention.head_dim, dtype=torch.float64))
    if part and shrinks(guinea_pig(view.module(block.path)).double(), part, call):
        return {"after": part}
    if not inside or len(block.mlps) != 1 or block.mlps[0] == block.path:
        return {"after": ""}
    mlp = block.mlps[0][len(block.path) + 1 :]
    before = spares(guinea_pig(view.module(block.path)).double(), mlp, call)
    return {"before": before, "mlp": mlp} if before else {"after": ""}


def shrinks(block: nn.Module, part: str, call: Callable) -> bool:
    """Does a block give one token less where this part of it does?"""
    block.get_submodule(part).register_forward_hook(lambda _, args, output: on_first(output, lambda x: x[:, 1:]))
    try:
        return call(block).shape[1] == 3
    except WRONG:
        return False


def spares(block: nn.Module, mlp: str, call: Callable) -> str:
    """The part in front of a block's MLP that reads its residual, where a token that is left out there and given what
    the MLP says of another leaves the block with that added, and the others as ever; or nothing."""
    seen, given = {}, {}

    def look(name: str) -> Callable:
        return lambda part, args, output: seen.update({id(output): (name, args, output)})

    hooks = [part.register_forward_hook(look(name)) for name, part in block.named_modules() if name]
    hooks.append(block.get_submodule(mlp).register_forward_pre_hook(lambda part, args: given.update(x=args[0])))
    try:
        whole = call(block)
        before, (residual, *_), _ = seen[id(given["x"])]
        for hook in hooks:
            hook.remove()
        block.get_submodule(before).register_forward_pre_hook(lambda part, args: (args[0][:, 1:], *args[1:]))
        block.get_submodule(mlp).register_forward_hook(lambda part, args, y: torch.cat([y[:, :1], y], 1))
        found = call(block)
    except (*WRONG, KeyError):
        return ""
    wanted = torch.cat([residual[:, :1] + (whole - residual)[:, 1:2], whole[:, 1:]], 1)
    same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    return before if same else ""


def tokens_alone(block: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """What a block makes of a class token and three patches with these rotary rows, without masks and all else."""
    known = inspect.signature(block.forward).parameters
    needed = [each for each in known.values() if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    others = {each.name: None for each in needed[1:]}
    others |= {"position_embeddings": tuple(rows)} if "position_embeddings" in known else {}
    return answer(block(x, **others))


def guinea_pig(module: nn.Module) -> nn.Module:
    """A copy of a module, possibly on meta, with random weights and buffers of zeros."""
    module = deepcopy(module).to_empty(device="cpu").float().eval()
    for index, parameter in enumerate(module.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    for buffer in module.buffers():
        buffer.zero_()
    return module


def width(view: View, attention: Attention) -> int:
    """Of the tokens that an attention reads."""
    linears = attention.projections()
    return width_in(view.module(linears.get("q") or linears["qkv"]))


@torch.no_grad()
def text_side(view: View, attention: Attention) -> tuple[str, str]:
    """On which side of the image's keys the text's are ("" for no text), found by trying; or why that is not known."""
    linears = attention.projections()
    module, record = guinea_pig(view.module(attention.path)), Record()
    tokens = {"hidden_states": torch.ones(1, 2, width(view, attention))}
    if attention.added:
        tokens["encoder_hidden_states"] = -torch.ones(1, 3, width_in(view.module(linears["added.k"])))
    alone = SimpleNamespace(library=view.library, module=lambda path: module)
    attend_through(alone, attention, record)
    try:
        module(**tokens)
    except WRONG as error:
        return "", f"its attention does not work on plain tokens ({error})"
    keys = record.key[0].transpose(0, 1).flatten(1)  # N, HD
    same = [bool(torch.equal(key, keys[0])) for key in keys]
    sides = {(1, 1): "", (1, 1, 0, 0, 0): "after", (1, 1, 1, 0, 0): "before"}
    side = sides.get(tuple(map(int, same)))
    return ("", "its keys are not one for each token") if side is None else (side, "")


@torch.no_grad()
def window_side(view: View, attention: Attention) -> int | str:
    """The side of the square windows that an attention reads one by one with positions of its own, found by trying:
    the same ones come as a mask of a whole window however many tokens there are; or why there is none."""
    module, record = guinea_pig(view.module(attention.path)), Record()
    attend_through(SimpleNamespace(library=view.library, module=lambda path: module), attention, record)
    masks, x = [], torch.ones(4, 2, width(view, attention))
    try:
        for tokens in (x[:, :1], x):
            module(tokens)
            masks.append(record.mask)
        whole = masks[0].shape[-1]
        beside = torch.full((2, whole, whole), -1.0)
        module(torch.ones(4, whole, x.shape[2]), beside)
    except WRONG as error:
        return f"its attention does not work on the tokens of a window ({error})"
    side = isqrt(whole)
    same = torch.equal(*masks) and torch.equal(record.mask, (masks[0] - 1).expand_as(record.mask))
    return side if same and side**2 == whole > 1 else "its windows are not square, or their positions not known"
