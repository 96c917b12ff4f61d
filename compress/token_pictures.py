"""Which patches of sample images were merged, block by block: their colours and groups, for the report's pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.outputs import run
from compress.roles import join

IMAGES = 2


@torch.no_grad()
def pictures(model: nn.Module, edits: dict[str, dict], batch: dict, patch: int) -> list[dict]:
    """Of the first images: the grid, the colour of every patch, and for every block of a model that merges by these
    edits the group that each patch belongs to behind it."""
    sample = {name: value[:IMAGES] for name, value in batch.items()}
    seen: dict[str, Tensor] = {}

    def listen(path: str):
        tokens = model.get_submodule(path).merge.tokens
        return lambda *_: seen.__setitem__(path, tokens.slot) if tokens.slot is not None else None

    hooks = []
    for path, edit in edits.items():
        part = edit.get("mlp") or edit["after"]
        hooks.append(model.get_submodule(join(path, part) if part else path).register_forward_hook(listen(path)))
    try:
        run(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for at, colours in enumerate(patches(sample["pixel_values"], patch)):
        height, width = colours.shape[:2]
        groups = {path: slot[at, edits[path]["rule"]["first"] :].tolist() for path, slot in seen.items()}
        groups = {path: places for path, places in groups.items() if len(places) == height * width}  # not of a text
        shades = ["{:02x}{:02x}{:02x}".format(*colour) for colour in colours.flatten(0, 1).tolist()]
        found += [{"width": width, "colours": shades, "groups": groups}] if groups else []
    return found


def patches(pixels: Tensor, size: int) -> Tensor:
    """The mean colour of every patch from 0 to 255, [images, rows, columns, 3]; one channel is grey."""
    means = F.avg_pool2d(pixels.float(), size)
    means = means.expand(-1, 3, -1, -1) if means.shape[1] == 1 else means[:, :3]
    low, high = (pick(means.flatten(1), dim=1).values[:, None, None, None] for pick in (torch.min, torch.max))
    return ((means - low) / (high - low).clamp_min(1e-6) * 255).round().int().movedim(1, -1)
