"""Keys and values of the cache in 8, 4 or 2 bits while a decoder generates: long contexts in a fraction of the memory.

Keys are quantized a channel over `group` tokens, since their outliers sit in fixed channels, values a token over
`group` channels, both with a lowest value and a step (asymmetric). The first `sink` tokens, on which attention leans,
and the last `window` ones stay as they are; what one call brings it also sees unquantized, so a prompt is answered as
before and only what is generated after it reads the codes. Nothing is trained, no weight changes, the checkpoint is no
smaller. Plain `generate` uses it: each attention puts its own layer into the dynamic cache that it is handed. Bytes of
a cache of 2048 tokens stand in the report; with calibration data also what reading the codes costs, because perplexity
on whole texts never reads a cache and does not change.

When it hurts: each step makes the dense keys and values of one layer again, so a step is slower, not faster (1.3 to
1.5 times at 2048 tokens of SmolLM2-135M on a CPU), and short contexts only lose. Scales take memory too, more for
narrow heads. Of that model's perplexity 8 bits cost nothing, 4 bits half a percent, 2 bits 16 percent. Static caches
(and with them compiled generation), continuous batching and caches of windows or states are refused. Tokens can be
taken back (assisted generation) only as far as the window reaches.

Papers: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024; Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", ICLR 2024.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.kv_cache import CacheHook
from compress.transform import Field, Plan, Transform

if TYPE_CHECKING:
    from compress.view import View

NAMES = ("cache", "past_key_values", "layer_past")  # as models and attentions call the cache that they are handed
TOKENS = 2048  # of the cache whose bytes are told


class KvCache(Transform):
    """A decoder's cache of keys and values in few bits."""

    uses_data: ClassVar[bool] = True
    example: ClassVar[dict] = {"bits": 4, "group": 4, "window": 4, "sink": 1}

    bits: Literal[2, 4, 8] = Field(8, description="bits of a key's or value's entry")
    group: int = Field(32, ge=2, description="tokens (keys) or channels (values) that share a scale")
    window: int = Field(128, ge=0, description="last tokens that stay as they are")
    sink: int = Field(4, ge=0, description="first tokens that stay as they are")

    def plan(self, view: View) -> Plan:
        taken, refused = sites(view, self)
        if self.only and refused:
            path, reason = next(iter(refused.items()))
            raise CompressError(f"quantize.kv_cache cannot change {path}: {reason}")
        settings = self.model_dump(include={"bits", "group", "window", "sink"})
        notes = {"refused": refused}
        if taken:
            plain, ours = cache_bytes(view, taken, None), cache_bytes(view, taken, settings)
            notes["remarks"] = [f"a cache of {TOKENS} tokens takes {ours:,} bytes instead of {plain:,}"]
        return Plan({path: dict(settings) for path in taken}, notes=notes)

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        """Changes nothing; notes what it costs to read the codes instead of the keys and values."""
        plan.notes["remarks"].append(cost(view.model, hooks(view, plan), batches, **next(iter(plan.edits.values()))))
        return plan

    def apply(self, view: View, plan: Plan) -> None:
        for path, hook in hooks(view, plan).items():
            view.module(path).register_forward_pre_hook(hook, with_kwargs=True)


def sites(view: View, method: KvCache) -> tuple[list[str], dict[str, str]]:
    """The attentions whose part of the cache is taken, and why others are not."""
    name = type(view.model).__name__
    if view.library != "transformers" or not any(attention.causal for attention in view.attentions()):
        return [], {name: "it is no transformers decoder, which keeps a cache"}
    if view.model.config.is_encoder_decoder:
        return [], {name: "the cache of an encoder-decoder also holds the encoder's states"}
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=view.model.config.get_text_config(decoder=True)).layers
    taken, refused = [], {}
    for attention in view.attentions():
        module = view.module(attention.path)
        if not method.takes(attention.path) or not attention.causal:
            continue
        index = getattr(module, "layer_idx", None)
        if index is None or argument(module) is None:
            refused[attention.path] = "it takes no cache of the library's kind"
        elif type(layers[index]) is not DynamicLayer:
            refused[attention.path] = f"its part of the cache is a {type(layers[index]).__name__}"
        else:
            taken.append(attention.path)
    return taken, refused


def argument(module: nn.Module) -> tuple[str, int] | None:
    """Name and place of the argument in which an attention or a model is handed the cache."""
    names = list(inspect.signature(module.forward).parameters)
    return next(((name, names.index(name)) for name in NAMES if name in names), None)


def hooks(view: View, plan: Plan) -> dict[str, CacheHook]:
    """What puts quantized layers into the cache, for each attention."""
    return {path: CacheHook(*argument(view.module(path)), **edit) for path, edit in plan.edits.items()}


def cache_bytes(view: View, paths: list[str], settings: dict | None) -> int:
    """Bytes of a full cache of one text in these attentions, as it is or quantized."""
    total, size = 0, view.model.dtype.itemsize
    for attention in (view.attention(path) for path in paths):
        widths = attention.head_dim + attention.value_dim
        if settings is None:
            total += TOKENS * attention.kv_heads * widths * size
            continue
        bits, group = settings["bits"], settings["group"]
        packed = max(0, TOKENS - settings["sink"] - settings["window"]) // group * group
        groups = attention.value_dim // group if attention.value_dim % group == 0 else 1
        codes = packed * sum(-(-width * bits // 8) for width in (attention.head_dim, attention.value_dim))
        scales = 2 * size * (packed // group * attention.head_dim + packed * groups)
        total += attention.kv_heads * ((TOKENS - packed) * widths * size + codes + scales)
    return total


@torch.no_grad()
def cost(
    model: nn.Module, hooks: dict[str, CacheHook], batches: list[dict], group: int, window: int, sink: int, bits: int
) -> str:
    """How far the answers move when texts are read piece by piece, each piece from the cache of those before it."""
    start, moved, same, count = sink + window + group, 0.0, 0, 0
    for batch in batches if model.can_generate() else ():
        ids = batch.get("input_ids")
        if ids is None or ids.shape[1] <= start or not set(batch) <= {"input_ids", "attention_mask", "labels"}:
            continue
        mask = batch.get("attention_mask", torch.ones_like(ids))
        plain = model(input_ids=ids, attention_mask=mask).logits[:, start:].float().log_softmax(-1)
        read = by_pieces(model, hooks, ids, mask, group)[:, start:].float().log_softmax(-1)
        real = mask[:, start:].bool()
        moved += (plain.exp() * (plain - read)).sum(-1)[real].sum().item()
        same += int((plain.argmax(-1) == read.argmax(-1))[real].sum())
        count += int(real.sum())
    if not count:
        return f"what reading {bits}-bit codes costs was not measured: no calibration text of more than {start} tokens"
    return f"reading {bits}-bit codes: kl {moved / count:.2g}, top1 {same / count:.4g} on {count} calibration tokens"


def by_pieces(model: nn.Module, hooks: dict[str, CacheHook], ids: Tensor, mask: Tensor, step: int) -> Tensor:
    """The logits of texts read `step` tokens at a time with a quantized cache."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for path, hook in hooks.items():
        hook.install(cache, model.get_submodule(path).layer_idx)
    handed, pieces = {argument(model)[0]: cache}, range(0, ids.shape[1], step)
    return torch.cat([
        model(input_ids=ids[:, at : at + step], attention_mask=mask[:, : at + step], **handed).logits for at in pieces
    ], 1)  # fmt: skip
