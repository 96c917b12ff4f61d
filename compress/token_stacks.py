"""Blocks that hand on fewer tokens from block to block: which can, and the parts that let them."""

from __future__ import annotations

from collections.abc import Callable

from compress.attend import attend_through
from compress.errors import CompressError
from compress.nn.token_merge import MergeAfter, Sized, Tokens
from compress.roles import join
from compress.token_layout import patch_size
from compress.transforms.tokens.merge import after, stacks
from compress.view import Block, View


def chosen(view: View, name: str, places: tuple[int, ...] | None, default: Callable[[int], set[int]]) -> list[Block]:
    """The blocks at these places of every stack; where none are given, at those that `default` names for its length."""
    found = stacks(view).values()
    longest = max(map(len, found), default=0)
    if not longest:
        raise CompressError(f"{name}: the model has no blocks that follow each other")
    if wrong := [place for place in places or () if not 0 <= place < longest]:
        raise CompressError(f"{name}: blocks has {wrong[0]}, it must be from 0 to {longest - 1}")
    picked = [(blocks, default(len(blocks)) if places is None else places) for blocks in found]
    return [block for blocks, at in picked for place, block in enumerate(blocks) if place in at]


def shrinkable(view: View, blocks: list[Block]) -> dict[str, dict | str]:
    """For each of these blocks: the part after which its tokens may be fewer and the special ones, or why none may."""
    if view.library == "diffusers":
        return {block.path: "it belongs to a diffusion model, whose blocks hand on the full image" for block in blocks}
    found = after(view)
    return {block.path: found[block.path] for block in blocks}


def grid(view: View, block: Block) -> int | str:
    """The side of the patches whose grid this block's tokens are, or why they are none."""
    config = getattr(view.module(block.attentions[0]), "config", view.model.config)
    if getattr(config, "patch_size", None) is None:
        return "its tokens are no patches of an image"
    return patch_size(config)


def hand_on_fewer(
    view: View, edits: dict[str, dict], cores: Callable, hooks: Callable, state: type[Tokens] = Tokens
) -> None:
    """Let these blocks hand on fewer tokens, and the last of their stack all of them again.

    `cores(tokens, edit)` makes the attention cores of a block, the innermost first, and `hooks(tokens, edit)` what
    shrinks its tokens, where it has an edit.
    """
    attentions = {attention.path: attention for attention in view.attentions()}
    for blocks in stacks(view).values():
        if not any(block.path in edits for block in blocks):
            continue
        tokens = state()
        for block in blocks:
            module, edit = view.module(block.path), edits.get(block.path)
            for core in cores(tokens, edit):
                attend_through(view, attentions[block.attentions[0]], core)
            module.merge = part = MergeAfter(tokens, None) if edit is None else hooks(tokens, edit)
            if block is blocks[0]:
                module.register_forward_pre_hook(part.start)
            if edit is not None:
                view.module(join(block.path, edit["after"]) if edit["after"] else block.path).register_forward_hook(
                    part.shrink
                )
            if block is blocks[-1]:
                module.register_forward_hook(part.restore)


def weighing(edits: dict[str, dict]) -> Callable:
    """Makes the core that lets every token weigh as many as it stands for, where the edits ask for it."""
    return lambda tokens, edit: (Sized(tokens, next(iter(edits.values()))["proportional"]),)
