"""What a model is made of and what every method can do to it, from its config alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.emit import probe_inputs, tensor_bytes, weight_count
from compress.errors import CompressError
from compress.flops import count
from compress.source import adopt, open_source
from compress.transform import find, names
from compress.view import View


def inspect(model: str | nn.Module) -> dict[str, Any]:
    """Parts, sizes, and for each method the modules that it takes or why it does not."""
    source = adopt(model) if isinstance(model, nn.Module) else open_source(str(model), meta=True)
    source.model = source.untouched or source.model
    view = View(source.model)
    parts = {
        "name": source.name,
        "class": type(source.model).__name__,
        "library": source.library,
        "parameters": weight_count(source.model),
        "bytes": tensor_bytes(source.model),
        "blocks": [block.path for block in view.blocks()],
        "attentions": view.attentions(),
        "mlps": view.mlps(),
        "linears": len(view.linears()),
        "flops": None,
        "probe": {},
    }
    probe = probe_inputs(source.model, None)
    parts["probe"] = {name: list(value.shape) for name, value in probe.items() if isinstance(value, torch.Tensor)}
    parts["flops"] = count(source.model, probe)
    parts["methods"] = {name: verdict(name, view) for name in names()}
    return parts


def verdict(name: str, view: View) -> dict[str, Any]:
    """What one method would take with small options, and its refusals."""
    method = find(name)
    try:
        plan = method(**method.example).plan(view)
    except CompressError as error:
        return {"takes": 0, "refused": {"": str(error)}}
    return {"takes": len(plan.edits), "refused": plan.notes.get("refused", {})}
