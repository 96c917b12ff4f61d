"""Floating point operations of one forward, and the memory it needs; both also on the meta device, without weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from compress.outputs import inputs
from compress_kernels.packing import held


def count(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Multiplications and additions of all matrix products, convolutions and attentions of one forward.

    A quantized layer counts like the matrix product that it stands for, and a causal mask halves nothing.
    """
    with _forward(model, batch) as call, FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        model(**call)
    return counter.get_total_flops()


def memory(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Bytes of the weights with their packed forms, plus the most that the tensors of one forward held at a time.

    On CUDA the allocator tells the second part. Elsewhere every tensor is followed from the operation that made it to
    its end, so a second run gives the same figure; scratch space inside one operation is not seen.
    """
    weights = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    device = _device(model)
    with _forward(model, batch) as call:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(**call)
            return sum(weights.values()) + torch.cuda.max_memory_allocated(device) - before
        with Living() as living:
            model(**call)
    return sum(weights.values()) + held(model.parameters()) + living.peak


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that are still referred to."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def gone(_) -> None:
            self.bytes -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@contextmanager
def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[dict]:
    """The forward arguments where the model is; on meta nothing makes the model look at their values."""
    device, call, config = _device(model), inputs(batch), getattr(model, "config", None)
    padding = getattr(config, "pad_token_id", None)
    try:
        if device.type == "meta":
            call.pop("attention_mask", None)
            if padding is not None:  # some models look for padding where no mask is given
                config.pad_token_id = None
        with torch.no_grad():
            yield tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, call)
    finally:
        if padding is not None:
            config.pad_token_id = padding


def _linear(x, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(out_shape) * x[-1]


def _mlp(x_shape, up_shape, *args, out_shape=None, **kwargs) -> int:
    """Both of its products: [.., in], weight [between, in] and [.., out]."""
    return 2 * prod(x_shape[:-1]) * up_shape[0] * (up_shape[1] + out_shape[-1])


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _formulas() -> dict:
    """Formulas of the operations that torch leaves out: attention on a CPU, and quantized linear layers."""
    aten = torch.ops.aten
    formulas = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    for operation in (aten._int_mm, aten._weight_int8pack_mm, aten._weight_int4pack_mm):
        formulas[operation] = _linear
    # Our own, as far as the modules in use have registered them; torch.ops itself only knows what was called before.
    known = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    for name in {own.partition(".")[0] for space, _, own in known if space == "compress"}:
        if "linear" in name or "matmul" in name:
            formulas[getattr(torch.ops.compress, name)] = _linear
        elif "mlp" in name:
            formulas[getattr(torch.ops.compress, name)] = _mlp
        elif "attention" in name:
            formulas[getattr(torch.ops.compress, name)] = _attention
    return formulas
