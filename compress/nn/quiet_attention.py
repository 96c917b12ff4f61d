"""Attention that can do nothing without huge activations: a softmax that reaches zero, and a gate on every head.

B batch, H heads, N queries, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.nn.probabilities import per_query, probabilities


def clip_softmax(share: Tensor, gamma: float | Tensor, zeta: float | Tensor) -> Tensor:
    """The shares stretched to gamma .. zeta and cut to 0 .. 1; no gradient where they were cut."""
    return ((zeta - gamma) * share + gamma).clamp(0, 1)


class ClippedSoftmax(nn.Module):
    """A core whose shares below about alpha / length are exactly zero; at alpha 0 and zeta 1 it is the softmax.

    Without a length that of each call counts. Both numbers are saved as a tensor, so that no format without room for
    it can take the model for an ordinary one.
    """

    def __init__(self, alpha: float, zeta: float, length: int | None, like: Tensor) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("alpha_zeta", like.new_tensor([alpha, zeta]))

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        share = probabilities(query, key, mask, scale, causal)
        alpha, zeta = self.alpha_zeta
        share = clip_softmax(share, -alpha / (self.length or key.shape[2]), zeta)
        return share @ per_query(value, query)


class GatedAttention(nn.Module):
    """A core that multiplies each head's output by a gate from 0 to 2, which reads the head's query; at first 1."""

    def __init__(self, heads: int, dim: int, like: Tensor) -> None:
        super().__init__()
        self.gate_weight = nn.Parameter(like.new_zeros(heads, dim), requires_grad=False)
        self.gate_bias = nn.Parameter(like.new_zeros(heads), requires_grad=False)

    def forward(self, module, query_BHND, key, value, mask, scale, causal, **kwargs) -> Tensor:
        logit_BHN = torch.einsum("bhnd,hd->bhn", query_BHND, self.gate_weight) + self.gate_bias[:, None]
        out = self.inner(module, query_BHND, key, value, mask, scale, causal, **kwargs)
        return out * (2 * logit_BHN.sigmoid())[..., None]
