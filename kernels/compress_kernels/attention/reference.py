"""What attention means, in float64, and torch's own path with the same arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor:
    """softmax(query key^T scale + mask) value in float64; a row whose keys are all masked gives zeros."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(groups, 1), value.double()
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(~ones_below(scores), -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(dead, 0) @ value.repeat_interleave(groups, 1)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """The same by torch, in the dtype of the query."""
    if causal and (mask is not None or query.shape[2] != key.shape[2]):
        below = ones_below(query.new_empty(1, 1, query.shape[2], key.shape[2]))
        if mask is None:
            mask = below
        else:
            mask = mask & below if mask.dtype == torch.bool else mask.masked_fill(~below, -torch.inf)
        causal = False
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        least = torch.finfo(query.dtype).min  # what lies below would become -inf, and a row of that zeros, not a mean
        mask = mask.to(query.dtype).masked_fill((mask < least) & mask.isfinite(), least)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def ones_below(scores: Tensor) -> Tensor:
    """Which keys each query may see, when the queries are the last of the keys."""
    queries, keys = scores.shape[-2:]
    return torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
