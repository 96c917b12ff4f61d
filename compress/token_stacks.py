"""Blocks that hand on fewer tokens from block to block: which can, and the parts that let them."""

from __future__ import annotations

from collections.abc import Callable

from compress.attend import attend_through, attend_within
from compress.attend import refusal as attend_refusal
from compress.errors import CompressError
from compress.nn.class_token import ClassToken
from compress.nn.token_merge import MergeAfter, Sized, Tokens
from compress.nn.token_prune import Score
from compress.roles import join, parent_of
from compress.token_layout import above, follows_rows, merge_point, patch_size, positions, special_tokens
from compress.view import Attention, Block, View

WINDOWS = ("window_size", "shift_size")


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


def shrinkable(view: View, blocks: list[Block], inside: bool = True) -> dict[str, dict | str]:
    """For each of these blocks: where its tokens may become fewer and which are special, or why none may."""
    found = places(view, inside)
    return {block.path: found[block.path] for block in blocks}


def displaced(view: View, found: dict) -> str:
    """Why tokens that no longer stand for places of one image cannot go through this stack, or nothing."""
    if "rotary" in found:
        return "its rotary positions are those of the tokens of one image"
    if any(reads_class_token(view, attention) for attention in view.attentions()):
        return "its last block computes its class token only, which heads.exact leaves out with class_token: false"
    return ""


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
            attention = attentions[block.attentions[0]]
            for core in cores(tokens, edit):
                if reads_class_token(view, attention):
                    attend_within(view.module(attention.path), core)
                else:
                    attend_through(view, attention, core)
            module.merge = part = MergeAfter(tokens, None) if edit is None else hooks(tokens, edit)
            if any(one.get("rotary") for one in edits.values()):
                view.module(attention.path).register_forward_pre_hook(part.turn, with_kwargs=True)
            if block is blocks[0]:
                module.register_forward_pre_hook(part.start)
            if edit is not None and edit.get("mlp"):
                view.module(join(block.path, edit["before"])).register_forward_pre_hook(part.enter)
                view.module(join(block.path, edit["mlp"])).register_forward_hook(part.leave)
                module.register_forward_hook(part.settle)
            elif edit is not None:
                view.module(join(block.path, edit["after"]) if edit["after"] else block.path).register_forward_hook(
                    part.shrink
                )
            if block is blocks[-1]:
                module.register_forward_hook(part.restore)


def weighing(edits: dict[str, dict]) -> Callable:
    """Makes the core that lets every token weigh as many as it stands for, where the edits ask for it."""
    return lambda tokens, edit: (Sized(tokens, next(iter(edits.values()))["proportional"]),)


def scoring(edits: dict[str, dict]) -> Callable:
    """Makes that core, and before it one that scores the tokens where an edit names a `score`."""
    sized = weighing(edits)

    def cores(tokens, edit):
        scored = () if edit is None or "score" not in edit else (Score(tokens, edit["score"]),)
        return (*scored, *sized(tokens, edit))

    return cores


def stacks(view: View) -> dict[str, list[Block]]:
    """The blocks that follow each other, by the path of the list that holds them."""
    found = {}
    for block in view.blocks():
        found.setdefault(parent_of(block.path), []).append(block)
    return found


def places(view: View, inside: bool = True) -> dict[str, dict | str]:
    """For every block: what a merge in it must know, or why there can be none; `inside`, the block's residual may still
    hold all tokens while its MLP reads fewer."""
    attentions = {attention.path: attention for attention in view.attentions()}
    found = {}
    for stack, blocks in stacks(view).items():
        own = [[attentions[path] for path in block.attentions] for block in blocks]
        rotary = rotates(view, blocks, sum(own, []))
        whys = [refusal(view, *both, rotary) for both in zip(blocks, own, strict=True)]
        why = next(filter(None, whys), "") or stack_refusal(view, stack, blocks)
        special = "" if why else special_tokens(view.model, stack)
        why = why or (special if isinstance(special, str) else "")
        alone = not why and reads_class_token(view, attentions[blocks[-1].attentions[0]])
        if alone and not special["first"]:
            why = "the place of its class token, which is all that its last block computes, is not known"
        point = {"after": ""} if why else merge_point(view, blocks[0], attentions[blocks[0].attentions[0]], inside)
        settings = point | {"rule": special} | ({"rotary": True} if rotary else {})
        found |= {block.path: why or settings for block in blocks}
        if point == {"after": ""} or alone:
            found[blocks[-1].path] = why or "it is the last of its stack, where a merge would save nothing"
    return found


def reads_class_token(view: View, attention: Attention) -> bool:
    """Does this attention answer for the class token only (heads.exact), with the keys of all tokens that come?"""
    return isinstance(getattr(view.module(attention.path), "attend", None), ClassToken)


def rotates(view: View, blocks: list[Block], attentions: list[Attention]) -> bool:
    """Are rotary rows, which can go with the tokens, all the positions that the blocks of this stack know?"""
    if len({type(view.module(attention.path)) for attention in attentions}) != 1:
        return False
    others = [positions(view.module(block.path), "position_embeddings") for block in blocks]
    return not any(others) and follows_rows(view, attentions[0])


def refusal(view: View, block: Block, attentions: list[Attention], rotary: bool) -> str:
    """Why this block cannot work on merged tokens, or nothing."""
    if view.library == "diffusers":
        return "a diffusion model's blocks hand on the full image; tokens.merge_unmerge merges around their attentions"
    if view.library != "transformers":
        return "its model is not of transformers"
    if len(attentions) != 1:
        return f"it has {len(attentions)} attentions, it must have one"
    if attentions[0].cross:
        return "its keys come from another sequence"
    if attentions[0].causal:
        return "it is causal: merged tokens would mix positions and let early ones see late ones"
    modules = view.module(block.path), view.module(attentions[0].path)
    if any(hasattr(module, name) for module in modules for name in WINDOWS):
        return "it attends within windows of the full grid; tokens.merge_unmerge merges inside them"
    why = "" if rotary else next(filter(None, map(positions, modules)), "")
    return why or ("" if reads_class_token(view, attentions[0]) else attend_refusal(view, attentions[0]))


def stack_refusal(view: View, stack: str, blocks: list[Block]) -> str:
    """Why a stack cannot hand merged tokens from block to block, or nothing."""
    if len(blocks) != len(list(view.module(stack).children())):
        return f"{stack} also holds layers without attention"
    if any(hasattr(view.module(block.path), "merge") for block in blocks):
        return "it merges tokens already"
    if any(hasattr(module, "out_features") for module in above(view.model, stack)):
        return "its model is a backbone that hands out the tokens between its blocks"
    return ""
