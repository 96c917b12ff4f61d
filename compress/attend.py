"""Where a method puts its own attention: the softmax core of a host's attention module, between its projections.

transformers: one function registered in `AttentionInterface`, chosen per module by a view of its config. Anything else:
the module's own forward, run under a `TorchFunctionMode` that hands its `scaled_dot_product_attention` to the core.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError
from compress.surgery import ConfigView

if TYPE_CHECKING:
    from compress.view import Attention, View

NAME = "compress"  # of our function among the host's attention implementations
UNKNOWN = {"softcap", "s_aux", "cu_seq_lens_q", "cache"}  # arguments that change the scores, the sequence or the keys


class Softmax(nn.Module):
    """The core of the original model; every chain of cores ends in it."""

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        return softmax(query, key, value, mask, scale, causal, kwargs.get("dropout", 0.0))


def softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with grouped keys; to the bit what transformers' own sdpa function computes from the same arguments."""
    groups = query.shape[1] // key.shape[1]
    queries = query.shape[2]
    grouped = groups > 1 and mask is None and key.shape[-1] == value.shape[-1] <= 256
    if groups > 1 and not grouped:
        # One query: pack the group into the query axis, so that the cache is not copied `groups` times.
        if query.shape[2] == 1 and not torch.compiler.is_compiling():
            query = query.unflatten(1, (-1, groups)).squeeze(3)
            if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
                mask = mask.unflatten(1, (-1, groups)).squeeze(3)
        else:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.reshape(out.shape[0], -1, queries, value.shape[-1])


def refusal(view: View, attention: Attention) -> str:
    """Why the softmax of this module cannot be reached, or nothing."""
    module = view.module(attention.path)
    if closed := getattr(getattr(module, "attend", None), "closed", ""):
        return closed
    if view.library != "transformers":
        return ""
    code = inspect.unwrap(type(module).forward).__code__
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names or not hasattr(module, "config"):
        return "its forward computes attention by itself, not through transformers' attention interface"
    keywords = {name for const in code.co_consts if isinstance(const, tuple) for name in const}
    if unknown := sorted(keywords & {"softcap", "s_aux"}):
        return f"its scores are more than a softmax ({', '.join(unknown)})"
    return ""


def attend_through(view: View, attention: Attention, core: nn.Module) -> None:
    """Let `core` compute the softmax of this attention; a core that is there already becomes `core.inner`."""
    if why := refusal(view, attention):
        raise CompressError(f"{attention.path}: {why}")
    attend_module(view.module(attention.path), view.library, core)


def attend_within(module: nn.Module, core: nn.Module) -> None:
    """Let `core` compute the softmax under the outermost core of this module, which decides what keys it is given."""
    outer = module.attend
    core.inner, outer.inner = outer.inner, core


def attend_module(module: nn.Module, library: str, core: nn.Module) -> None:
    """The same for a module by itself, without asking whether it can be done."""
    present = getattr(module, "attend", None)
    core.inner = Softmax() if present is None else present
    module.attend = core
    if present is not None:
        return
    if library == "transformers":
        _register()
        module.config = ConfigView(module.config, {"_attn_implementation": NAME})
    else:
        # A partial of bound things, not a closure or diffusers' ModelHook: deepcopy binds it to the copy.
        module.forward = partial(_rerouted, module, module.forward)


def _register() -> None:
    """Make our function known to transformers; without the mask function padding would be dropped in silence."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, through_core)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def through_core(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: brings every mask format to one and asks the module's core."""
    if unknown := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise CompressError(f"{type(module).__name__}: {unknown[0]} is not known to a compressed attention")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise CompressError(
            "a compressed attention takes no flex block mask; set_attn_implementation('sdpa') or 'eager'"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = _full_mask(module, attention_mask, query.shape[2], key, causal, kwargs.pop("sliding_window", None))
    causal = bool(causal) and mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # prefill into an empty static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if position_bias is not None:
        mask, causal = _biased(position_bias[..., : key.shape[2]], mask, causal), False
    out = module.attend(module, query, key, value, mask, scaling, causal, **kwargs)
    return out.transpose(1, 2).contiguous(), None


def _full_mask(
    module, mask: Tensor | None, queries: int, key: Tensor, causal: bool, window: int | None
) -> Tensor | None:
    """The mask as sdpa wants it: a flash-style call gets the padding only, and the rest from other arguments."""
    keys, implementation = key.shape[2], module.config.shared._attn_implementation
    if mask is None and "flash" in (implementation or "") and causal and queries > 1 and (window or queries < keys):
        mask = key.new_ones(1, keys)
    if mask is None or mask.dim() == 4:
        return mask
    mask = mask[:, None, None, -keys:].bool()
    if causal:
        distance = _distance(queries, keys, key.device)
        mask = mask & (distance >= 0) & (distance < (window or keys))
    return mask.expand(-1, 1, queries, -1)


def _biased(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """A learned position bias and the mask as one additive mask."""
    if mask is None and causal:
        mask = _distance(bias.shape[-2], bias.shape[-1], bias.device) >= 0
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _distance(queries: int, keys: int, device) -> Tensor:
    """How far key j lies behind query i, when the queries are the last of the keys."""
    return torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]


class _Reroute(TorchFunctionMode):
    """Hands every scaled_dot_product_attention of a module's forward to its core."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.calls += 1
        return _sdpa_through_core(self.module, *args, **(kwargs or {}))


def _sdpa_through_core(
    module, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    extra = {"dropout": dropout_p} if dropout_p else {}
    return module.attend(module, query, key, value, attn_mask, scale, is_causal, **extra)


def _rerouted(module: nn.Module, forward, /, *args, **kwargs):
    """The module's forward with its softmax in the core's hands."""
    mode = _Reroute(module)
    with mode:
        out = forward(*args, **kwargs)
    if not mode.calls:
        raise CompressError(
            f"{type(module).__name__}: its attention did not call scaled_dot_product_attention, so the compressed one "
            "would be ignored; use the native attention backend and the default processor"
        )
    return out
