"""What the choices for linear layers weigh against a budget: stored bytes, bit operations, or time on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from compress.roles import width_in, width_out

KEEP = "keep"
SECONDS = 0.15  # that the choices for one shape are timed for, each
ROUNDS = 5
Settings = dict[str, dict | None]  # of one layer: choice -> settings of the quantized layer, None: as it is
Make = Callable[[nn.Module, dict], nn.Module]


def stored(layers: dict[str, nn.Module], choices: dict[str, Settings], make: Make) -> dict[str, dict[str, float]]:
    """Bytes of each layer's weight under each choice, with its scales and zero points; biases stay and are left out.

    Layers that share a weight have equal parts in its bytes.
    """
    sharing = Counter(id(module.weight) for module in layers.values())

    @cache
    def size(width: int, out: int, dtype: torch.dtype, settings: tuple | None) -> int:
        empty = nn.Linear(width, out, bias=False, device="meta", dtype=dtype)
        layer = empty if settings is None else make(empty, dict(settings))
        held = dict(layer.named_parameters(recurse=False))
        return sum(value.nbytes for name, value in held.items() if name != "weight_shape")

    return {
        path: {
            name: size(width_in(module), width_out(module), module.weight.dtype, settings and tuple(settings.items()))
            / sharing[id(module.weight)]
            for name, settings in choices[path].items()
        }
        for path, module in layers.items()
    }


def operations(
    layers: dict[str, nn.Module], choices: dict[str, Settings], rows: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Multiplications times bits of the weights times bits of the activations, in one forward."""

    def bits(module: nn.Module, settings: dict | None) -> int:
        own = 8 * module.weight.element_size()
        return own * own if settings is None else settings["bits"] * settings.get("activations", own)

    return {
        path: {
            name: float(rows[path] * module.weight.numel() * bits(module, settings))
            for name, settings in choices[path].items()
        }
        for path, module in layers.items()
    }


@torch.no_grad()
def seconds(
    layers: dict[str, nn.Module], choices: dict[str, Settings], rows: dict[str, int], make: Make
) -> dict[str, dict[str, float]]:
    """Time of each layer under each choice, taken once for each shape and number of rows through the real layers.

    All choices of a shape take turns, so that other work on the machine hits them alike.
    """
    from compress_kernels.timing import paired

    table, known = {}, {}
    for path, module in layers.items():
        key = (rows[path], tuple(module.weight.shape), module.weight.dtype, module.bias is None, str(choices[path]))
        if key not in known:
            x = torch.randn(rows[path], width_in(module), dtype=module.weight.dtype, device=module.weight.device)
            built = {name: make(module, settings) if settings else module for name, settings in choices[path].items()}
            calls = {name: partial(layer, x) for name, layer in built.items()}
            known[key] = paired(calls, rounds=ROUNDS, seconds=SECONDS)
        table[path] = known[key]
    return table
