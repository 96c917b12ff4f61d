"""What the softmax of an attention gives, for cores that change it before the values are added up."""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> Tensor:
    """The weights [batch, heads, queries, keys] that scaled_dot_product_attention gives the values.

    A row that sees nothing is 0, as there.
    """
    scores = query @ per_query(key, query).transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def per_query(shared: Tensor, query: Tensor) -> Tensor:
    """Keys or values with a head for every head of the queries."""
    groups = query.shape[1] // shared.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(groups, 1)
