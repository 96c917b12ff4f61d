"""The first checkpoint format that fits a result.

native: the result is an ordinary config of its model. compressed-tensors: beyond that only weights (and activations)
were quantized. compress-plan: anything else; the library rebuilds the structure through our quantizer.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from compress.compressed_tensors import caveat, obstacle
from compress.errors import CompressError
from compress.nn.fp8_linear import Fp8Linear
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear
from compress.transform import find
from compress.view import View


def choose_format(model: nn.Module, library: str, steps: list[dict], wanted: str) -> tuple[str, str]:
    """The format and why it was taken; CompressError when the user's wish cannot hold this model."""
    families = {step["use"].split(".")[0] for step in steps}
    odd = "layers are quantized" if families == {"quantize"} else "the structure is not an ordinary config"
    fits = {"compress-plan": f"{odd}, which no other format of this model can hold"}
    ordinary = library == "transformers" and families <= {"heads", "quantize"} and native_config(model) is not None
    plain = all(step["use"].startswith("heads.") or find(step["use"]).prepares for step in steps)
    reason = obstacle(model) if ordinary and not plain else ""
    if ordinary and plain:
        fits["native"] = "the result is an ordinary config of this model"
    elif reason:
        fits["compress-plan"] = reason
    elif ordinary:
        known = "beyond an ordinary config only layers were quantized, which vLLM reads too"
        fits["compressed-tensors"] = known + caveat(model)
        if not _is_decoder(model):
            fits["compress-plan"] = "only compress has fast kernels for this kind of model"
    if wanted != "auto":
        if wanted not in fits:
            why = f" ({reason})" if reason else ""
            raise CompressError(f"--format is {wanted}, this result fits only {', '.join(fits)}{why}")
        return wanted, "you asked for it"
    prefer = ["native", "compressed-tensors", "compress-plan"] if _is_decoder(model) else ["native", "compress-plan"]
    chosen = next(name for name in prefer if name in fits)
    return chosen, fits[chosen]


def native_config(model: nn.Module):
    """A config of this model's own class that gives exactly these shapes (before quantization), or None."""
    config, view = copy.deepcopy(model.config), View(model)
    attentions = view.attentions()
    shapes = {(attention.heads, attention.kv_heads, attention.head_dim) for attention in attentions}
    if len(shapes) == 1 and hasattr(config, "head_dim"):
        config.num_attention_heads, kv_heads, config.head_dim = shapes.pop()
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = kv_heads
    widths = {mlp.width for mlp in view.mlps()}
    if len(widths) == 1 and hasattr(config, "intermediate_size"):
        config.intermediate_size = widths.pop()
    try:
        with torch.device("meta"):
            empty = type(model)._from_config(config)
    except (ValueError, TypeError):
        return None
    return config if _dense_shapes(empty) == _dense_shapes(model) else None


def _dense_shapes(model: nn.Module) -> dict[str, tuple]:
    """The shapes of all tensors as they would be without quantization."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, (Int8Linear, WeightOnlyLinear, Fp8Linear, Int8Embedding)):
            for name in module.state_dict():
                if name != "bias":
                    del shapes[f"{path}.{name}"]
            sizes = (module.out_features, module.in_features) if hasattr(module, "in_features") else module.weight.shape
            shapes[f"{path}.weight"] = tuple(sizes)
    return shapes


def quantize_steps(steps: list[dict]) -> list[dict]:
    """The steps that a compressed-tensors checkpoint replays: what the others did stands in its config."""
    return [step for step in steps if step["use"].startswith("quantize.")]


def _is_decoder(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)()) and not model.config.is_encoder_decoder
