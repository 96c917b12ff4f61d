"""The compressed-tensors form of a quantized transformers model, which transformers and vLLM load without compress.

Written without that package: our layers already hold their tensors as it stores them, so what is left to do is to tell
which layers are quantized how, and to give the tensors their names on disk.
"""

from __future__ import annotations

import json
from collections import defaultdict

from torch import Tensor, nn

from compress.attend import Softmax
from compress.errors import CompressError
from compress.nn.fp8_linear import Fp8Linear
from compress.nn.fused_attention import FusedAttention
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear

VERSION = "0.15.0"  # of the format, the first that transformers 5 accepts
KNOWN = (Int8Linear, WeightOnlyLinear, Fp8Linear, FusedAttention, Softmax)  # other readers have a softmax of their own


def write(model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """The tensors by their on-disk names and the quantization_config of a model with layers of ours and native ones."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    schemes = quantized(model)
    names = remove_tied_weights_from_state_dict(model.state_dict(), model)
    tensors = {name: alone(tensor) for name, tensor in revert_weight_conversion(model, names).items()}
    groups = [json.loads(scheme) | {"targets": paths} for scheme, paths in schemes.items()]
    if len(groups) == 1:
        groups[0]["targets"] = ["Linear"]
    formats = {group["format"] for group in groups}
    return tensors, {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [path for path, module in model.named_modules() if isinstance(module, nn.Linear)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: the experts of a layer are views of one."""
    return tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.contiguous().clone()


def obstacle(model: nn.Module) -> str:
    """Why the format cannot hold this model, or nothing."""
    try:
        quantized(model)
    except CompressError as error:
        return str(error)
    return ""


def caveat(model: nn.Module) -> str:
    """What transformers without compress cannot do with the checkpoint, or nothing: it packs no zero points itself."""
    if not any(getattr(module, "weight_zero_point", None) is not None for module in model.modules()):
        return ""
    if len(quantized(model)) == 1:
        return "; for its zero points transformers alone needs CompressedTensorsConfig(dequantize=True)"
    return "; transformers alone cannot load zero points in layers of several kinds"


def quantized(model: nn.Module) -> dict[str, list[str]]:
    """The layers of each scheme (as JSON); CompressError for what the format cannot hold."""
    schemes = defaultdict(list)
    for path, module in model.named_modules():
        if reason := misfit(module):
            raise CompressError(f"compressed-tensors cannot hold {path}: {reason}")
        if (found := scheme(module)) is not None:
            schemes[json.dumps(found)].append(path)
    if not schemes:
        raise CompressError("compressed-tensors: the model has no quantized layer, it must have at least one")
    return schemes


def misfit(module: nn.Module) -> str:
    """Why the format cannot hold this module, or nothing."""
    if isinstance(module, Int8Embedding):
        return "an embedding table, also one that is tied to the output head, must stay as it is there"
    if getattr(module, "transposed", False):
        return "it was no torch linear layer"
    if getattr(module, "input_factor", None) is not None:
        return "its inputs are multiplied by a factor of its own (smooth: fold makes none)"
    if getattr(module, "group", 0) and isinstance(module, Int8Linear):
        return "groups of its inputs have ranges of their own (group: 0 makes none)"
    own = type(module).__module__.startswith("compress.") and not isinstance(module, KNOWN)
    if own or module._forward_pre_hooks or module._forward_hooks:
        return "code of ours is part of it, which no other reader runs"
    return ""


def scheme(module: nn.Module) -> dict | None:
    """The config group of a layer of ours, without its targets; None for any other."""
    if isinstance(module, WeightOnlyLinear):
        groups = module.weight_scale.shape[1]
        size = module.in_features // groups if groups > 1 else None
        symmetric = module.weight_zero_point is None
        weights = arguments(module.bits, "int", "group" if size else "channel", symmetric=symmetric, group_size=size)
        return group("pack-quantized", weights, None)
    if isinstance(module, Int8Linear):
        return group("int-quantized", arguments(8, "int", "channel"), ranges(module))
    if isinstance(module, Fp8Linear):
        weights, inputs = fp8(module)
        return group("float-quantized", weights, inputs if module.activations else None)
    return None


def ranges(module: Int8Linear) -> dict:
    """How the activations of this layer are quantized."""
    if module.input_scale is None:
        return arguments(8, "int", "token", symmetric=False, dynamic=True)
    return arguments(8, "int", "tensor", symmetric=module.input_zero_point is None)


def fp8(module: Fp8Linear) -> tuple[dict, dict]:
    """How weights and activations of this layer share their scales."""
    if module.block:
        weights = arguments(8, "float", "block", block_structure=[module.block, module.block])
        return weights, arguments(8, "float", "group", dynamic=True, group_size=module.block)
    strategy = "channel" if module.weight_scale.dim() == 2 else "tensor"
    return arguments(8, "float", strategy), arguments(8, "float", "token", dynamic=True)


def group(format: str, weights: dict, inputs: dict | None) -> dict:
    """A config group without its targets."""
    return {"format": format, "weights": weights, "input_activations": inputs, "output_activations": None}


def arguments(
    bits: int, type: str, strategy: str, *, symmetric: bool = True, dynamic: bool = False, **sizes: int | list | None
) -> dict:
    """How one kind of tensor is quantized."""
    kind = {"num_bits": bits, "type": type, "strategy": strategy, "symmetric": symmetric, "dynamic": dynamic}
    return kind | {"group_size": None} | sizes
