"""Finds last blocks of which a model reads the class token only, by following their output through its forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compress.attend import refusal
from compress.example import example
from compress.stacks import stacks, tensors
from compress.transforms.heads.exact import read_class_token
from compress.trial import EXACT, WRONG, ask, randomized
from compress.view import Attention, View

BY_TOKEN = (F.layer_norm, F.rms_norm, F.dropout)  # what a class token alone can go through


def class_readers(view: View, attentions: list[Attention]) -> tuple[dict[str, dict], dict[str, str]]:
    """The edits of all such blocks, and why last blocks of other encoders stay."""
    edits, refused = {}, {}
    known = {attention.path: attention for attention in attentions}
    lasts = {stack[-1] for stack in stacks(view)}
    for block in view.blocks():
        if block.path not in lasts or not block.attentions or block.attentions[0] not in known:
            continue
        attention = known[block.attentions[0]]
        if attention.causal or attention.cross or view.library != "transformers":
            continue
        if len(block.attentions) > 1:
            refused[block.path] = f"it has {len(block.attentions)} attentions, it must have one"
        elif why := refusal(view, attention) or reads_more(view, block.path):
            refused[block.path] = why
        else:
            found = arranged(view, block.path, attention)
            (refused if isinstance(found, str) else edits)[block.path] = found
    return edits, refused


class Reading(TorchFunctionMode):
    """Follows the tokens that a block gave; `beyond` says what was done with other tokens than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, Tensor] = {}  # keeps them alive, so that no identity is used again
        self.beyond = ""

    def give(self, module, args, output) -> None:
        """Hook behind the block."""
        self.tokens |= {id(tensor): tensor for tensor in tensors(output)}

    def holds(self, value) -> bool:
        """Is one of these tokens in it?"""
        return any(id(leaf) in self.tokens for leaf in tree_leaves(value))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.tokens or not self.holds((args, kwargs)) or not tensors(result):
            return result
        if function in BY_TOKEN:
            self.tokens[id(result)] = result
        elif not (function is Tensor.__getitem__ and first_only(args[1])):
            self.beyond = getattr(function, "__name__", str(function))
        return result


def first_only(index) -> bool:
    """Does this index take the first token of every row and no other?"""
    return (
        isinstance(index, tuple)
        and len(index) > 1
        and index[0] == slice(None)
        and type(index[1]) is int
        and not index[1]
    )


@torch.no_grad()
def reads_more(view: View, block: str) -> str:
    """What a model reads of this block beside the first token; empty where nothing."""
    reading, model = Reading(), view.model
    hook = view.module(block).register_forward_hook(reading.give)
    try:
        with reading:
            output = model(**example(model))
    except WRONG as error:
        return f"what is read of it is not known: {str(error).splitlines()[0]}"
    finally:
        hook.remove()
    if not reading.tokens or reading.holds(dict(output) if hasattr(output, "keys") else output):
        return "the model hands out all its tokens"
    return f"the model reads all its tokens ({reading.beyond})" if reading.beyond else ""


def arranged(view: View, path: str, attention: Attention) -> dict | str:
    """The edit of a block that gives the same class token from that alone, or why there is none."""
    inside = len(attention.path) + 1
    edit = {"attention": attention.path[len(path) + 1 :]}
    if not (attention.k and attention.v):
        return "its keys and values come from one projection with the queries"
    edit |= {"keys": attention.k[inside:], "values": attention.v[inside:], "norm": ""}
    made, heard = {}, []
    with randomized(view, path) as block:
        hooks = [
            child.register_forward_hook(lambda module, args, output, name=name: made.update({name: output}))
            for name, child in block.named_modules()
            if name and not name.startswith(edit["attention"])
        ]
        hooks.append(view.module(attention.path).register_forward_pre_hook(lambda module, args: heard.extend(args)))
        try:
            before = ask(view, block, attention)[0]
            for hook in hooks:
                hook.remove()
            edit["norm"] = next((name for name, value in made.items() if heard and value is heard[0]), "")
            read_class_token(block, view.library, edit).asked = True
            after = ask(view, block, attention)[0]
        except WRONG as error:
            return f"it cannot be tried alone ({str(error).strip().splitlines()[0][:100]})"
    same = after.shape[1] == 1 and (after - before[:, :1]).norm() <= EXACT * before.norm()
    return edit if same else "its class token cannot be computed alone"
