"""A plan as it is kept in a checkpoint, and its replay on an empty model before the weights are loaded.

Plans are keyed by on-disk tensor names: libraries rename their modules from version to version, but have to go on
reading old tensor names. An edit of a module is anchored at its first parameter: the tensor's name on disk and how
many name parts lie between that parameter and the module.
"""

from __future__ import annotations

import copy

from torch import nn

from compress.errors import CompressError
from compress.transform import Plan, find
from compress.view import View

FORMAT = 1  # of the record in a checkpoint; a reader refuses newer ones


def record(model: nn.Module, use: str, plan: Plan) -> dict:
    """The JSON form of one step, taken before the step is applied."""
    renamings = _renamings(model, saving=True) if keeps_disk_names(model) else []
    edits = []
    for path, edit in plan.edits.items():
        back = [renaming.reverse_transform() for renaming in reversed(renamings)]  # some remember the names they saw
        edits.append({**_anchor(model, path, back), "edit": edit})
    return {"use": use, "edits": edits}


def replay(model: nn.Module, steps: list[dict], version: int = FORMAT) -> None:
    """Apply recorded steps to a freshly built model, usually on the meta device."""
    if version > FORMAT:
        raise CompressError(f"the checkpoint has record format {version}, this compress reads up to {FORMAT}: upgrade")
    renamings, prefix = _renamings(model, saving=False), getattr(model, "base_model_prefix", "") or ""
    for step in steps:
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        found = [(_path(names, prefix, entry, copy.deepcopy(renamings)), entry["edit"]) for entry in step["edits"]]
        plan = Plan({path: edit for path, edit in found if path is not None})
        if step["edits"] and not plan.edits:
            raise CompressError(f"step {step['use']} of the checkpoint fits no module of {type(model).__name__}")
        method = find(step["use"])
        method.apply(method.model_construct(), View(model), plan)


def keeps_disk_names(model: nn.Module) -> bool:
    """Can the library save under the old names, or would it have to split or join tensors that we changed?"""
    reversed_splits = [change.reverse_transform() for change in _conversions(model) if hasattr(change, "operations")]
    names = [name for name, _ in model.named_parameters()] if reversed_splits else []
    return not any(change.rename_source_key(name)[1] for change in reversed_splits for name in names)


def _anchor(model: nn.Module, path: str, renamings: list) -> dict:
    """The first parameter of a module by its name on disk, and how far above it the module is."""
    module = model.get_submodule(path)
    first = next((name for name, _ in module.named_parameters()), None)
    assert first is not None, f"{path} owns no parameter, so its edit cannot be found again"
    name = f"{path}.{first}" if path else first
    return {"tensor": _renamed(name, renamings), "up": first.count(".") + 1}


def _path(names: set[str], prefix: str, entry: dict, renamings: list) -> str | None:
    """The module of a recorded edit in this model; None for a part that this class of the family does not have."""
    name = _renamed(entry["tensor"], renamings)
    for candidate in (name, name.removeprefix(prefix + "."), f"{prefix}.{name}"):
        if candidate in names:
            return candidate.rsplit(".", entry["up"])[0]
    return None


def _renamed(name: str, renamings: list) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _conversions(model: nn.Module) -> list:
    """The library's changes of names and tensors between disk and memory, in the order of loading."""
    known = getattr(model, "_weight_conversions", None)
    if known is not None or not hasattr(getattr(model, "config", None), "model_type"):
        return known or []
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, add_legacy=False)


def _renamings(model: nn.Module, saving: bool) -> list:
    """Those of the changes that only rename."""
    from_scratch = getattr(model, "_weight_conversions", None) is None
    renamings = [change for change in _conversions(model) if not hasattr(change, "operations")]
    if saving and from_scratch:  # like transformers' own saving, which cannot know whether the prefix was there
        renamings = [renaming for renaming in renamings if not hasattr(renaming, "prefix_to_add")]
    return renamings
