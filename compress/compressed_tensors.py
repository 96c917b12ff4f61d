"""The compressed-tensors form of a quantized transformers model, which transformers and vLLM load without compress.

Written without that package: our layers already hold their tensors as it stores them, so what is left to do is to tell
which layers are quantized how, and to give the tensors their names on disk.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.int8_embedding import Int8Embedding
from compress.nn.int8_linear import Int8Linear
from compress.nn.weight_only_linear import WeightOnlyLinear

VERSION = "0.15.0"  # of the format, the first that transformers 5 accepts


def write(model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """The tensors by their on-disk names and the quantization_config of a model with layers of ours and native ones."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    kinds = quantized(model)
    names = remove_tied_weights_from_state_dict(model.state_dict(), model)
    tensors = {name: alone(tensor) for name, tensor in revert_weight_conversion(model, names).items()}
    groups = [scheme(*kind) | {"targets": paths} for kind, paths in kinds.items()]
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


def packable(model: nn.Module) -> bool:
    """Can the format hold this model?"""
    try:
        return bool(quantized(model))
    except CompressError:
        return False


def quantized(model: nn.Module) -> dict[tuple, list[str]]:
    """(bits, group, are activations quantized) -> layers; CompressError for what the format cannot hold."""
    kinds = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, Int8Embedding) or getattr(module, "transposed", False):
            raise CompressError(f"{path}: compressed-tensors holds only linear layers that are torch's own")
        if isinstance(module, Int8Linear):
            kinds[8, 0, True].append(path)
        elif isinstance(module, WeightOnlyLinear):
            groups = module.weight_scale.shape[1]
            kinds[module.bits, module.in_features // groups if groups > 1 else 0, False].append(path)
    if not kinds:
        raise CompressError("compressed-tensors: the model has no quantized layer, it must have at least one")
    return kinds


def scheme(bits: int, group: int, activations: bool) -> dict:
    """A config group without its targets."""
    weights = arguments(bits, "group" if group else "channel", group=group or None)
    return {
        "format": "int-quantized" if activations else "pack-quantized",
        "weights": weights,
        "input_activations": arguments(8, "token", dynamic=True) if activations else None,
        "output_activations": None,
    }


def arguments(bits: int, strategy: str, group: int | None = None, dynamic: bool = False) -> dict:
    """How one kind of tensor is quantized."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
    }
