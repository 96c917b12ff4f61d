"""From the model in memory to a proven folder: save, probe, seal, verify, report, card."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.card import card
from compress.checkpoint import seal, stored_dtypes
from compress.errors import CompressError
from compress.example import example
from compress.formats import choose_format
from compress.outputs import inputs
from compress.recipe import Emit, Recipe
from compress.report import Report
from compress.saving import auto_class, copy_companions, save
from compress.source import Source
from compress.verification import verify, write_probe
from compress.view import View

PACKING = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_factor")


def write(
    source: Source, folder: Path, steps: list[dict], batch: dict | None, options: Emit, facts: dict
) -> tuple[str, str]:
    """Write the checkpoint into `folder` without verifying it yet; returns the format and why it was taken."""
    model = source.model
    chosen, why = choose_format(model, source.library, steps, options.format)
    save(model, folder, chosen, steps, shard=options.shard, pipeline=source.pipeline)
    copy_companions(source.folder, folder)
    write_probe(model, probe_inputs(model, batch), folder)
    seal(folder, {"format": chosen, "library": source.library, "class": type(model).__name__,
                  "component": source.component, "steps": steps, **facts})  # fmt: skip
    return chosen, why


def prove(folder: Path) -> dict:
    """Verify the folder; one that does not give the answers of the model in memory is an error."""
    verified = verify(folder)
    if not verified["passed"]:
        raise CompressError(
            f"{folder}: reloaded in a fresh process it differs from the model in memory by {verified['error']:.2g}"
        )
    return verified


def probe_inputs(model: nn.Module, batch: dict | None, tokens: int = 32) -> dict:
    """One example of real data without its padding, cut short; without data a made-up one."""
    if batch is None:
        return example(model)
    whole = inputs(batch)
    rows = next(len(value) for value in whole.values() if isinstance(value, Tensor) and value.dim())
    mask = whole.get("attention_mask")
    row = int(mask.sum(1).argmax()) if mask is not None and mask.dim() == 2 else 0

    def cut(value):
        if not isinstance(value, Tensor) or not value.dim() or len(value) != rows:
            return value  # positions and the like have no row per example
        if value.dim() != 2 or value.is_floating_point():
            return value[row : row + 1]
        real = mask[row].bool() if mask is not None and mask.shape == value.shape else slice(None)
        return value[row : row + 1][:, real][:, :tokens]

    return tree_map(cut, whole)


def describe(report: Report, folder: Path, recipe: Recipe, source: Source) -> None:
    """Write the report and the card into the folder."""
    report.write(folder)
    loader = "DiffusionPipeline" if source.component else auto_class(source.model)
    data = recipe.validate_.data if recipe.validate_ else None
    facts = {"library": source.library, "loader": loader, "component": source.component, "dtype": told(source, folder)}
    text = card(report, recipe.source, **facts, license=_license(source), dataset=data)
    (folder / "README.md").write_text(text, encoding="utf-8")


def told(source: Source, folder: Path) -> str | None:
    """The dtype that a user must name, since diffusers by itself loads everything as float32."""
    stored = stored_dtypes(folder)
    if source.component:
        stored.pop("default")
    dtypes = set(stored.values()) if source.library == "diffusers" else set()
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 and torch.float32 not in dtypes else None


def _license(source: Source) -> str | None:
    """The licence that the original's card states; None where it cannot be read."""
    from huggingface_hub import ModelCard

    path = source.folder and source.folder / "README.md"
    try:
        return ModelCard.load(path).data.get("license") if path and path.exists() else None
    except (ValueError, yaml.YAMLError):
        return None


def bytes_by_block(source: Source) -> dict[str, tuple[float, float]]:
    """Bytes of every layer, and of the rest, before and after."""
    sides = [_by_block(source.original()), _by_block(source.model)]
    return {path: (sides[0][path], sides[1].get(path, 0)) for path in sides[0]}


def _by_block(model: nn.Module) -> dict[str, float]:
    paths = [block.path for block in View(model).blocks()]
    found = {path: float(tensor_bytes(model.get_submodule(path))) for path in paths}
    return found | {"rest": tensor_bytes(model) - sum(found.values())}


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers, shared ones once."""
    return sum(value.numel() * value.element_size() for value in unique_tensors(model))


def weight_count(model: nn.Module) -> int:
    """How many weights the model has: packed ones are counted unpacked, what belongs to their packing not at all."""
    total = sum(tensor.numel() for tensor in unique_tensors(model))
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        total -= sum(own[name].numel() for name in PACKING if name in own)
        if "weight_packed" in own:
            total += module.in_features * module.out_features
    return total


def unique_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and saved buffers, shared ones once."""
    found = {id(value): value for _, value in model.named_parameters()}
    saved = set(model.state_dict())
    found |= {id(value): value for name, value in model.named_buffers() if name in saved}
    return list(found.values())
