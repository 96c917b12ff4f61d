"""Heads that every token chooses for itself. B batch, H heads, N tokens, D size of a query, V of a value."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadMixture(nn.Module):
    """A core in which some heads are shared by all tokens and each token switches on `active` of the others.

    Both kinds get gates that average one: first the kinds are weighed against each other, then the heads of a kind. A
    head that is off writes what it writes on average. At first all gates are one: `sharpness`, by which the logits that
    choose also weigh, is zero.
    """

    def __init__(self, heads: int, dim: int, value_dim: int, shared: int, active: int, like: Tensor) -> None:
        super().__init__()
        self.active, routed = active, heads - shared
        # Shared heads first; saved as a tensor, since calibration finds it.
        self.register_buffer("order", torch.arange(heads, device=like.device))

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_zeros(shape), requires_grad=False)

        self.kind_weight, self.shared_weight = weight(2, heads * dim), weight(shared, heads * dim)
        self.routed_weight, self.routed_bias = weight(routed, heads * dim), weight(routed)
        self.sharpness, self.mean = weight(1), weight(heads, value_dim)

    def forward(self, module, query_BHND, key, value, mask, scale, causal, **kwargs) -> Tensor:
        out_BHNV = self.inner(module, query_BHND, key, value, mask, scale, causal, **kwargs)
        x_BNF = query_BHND.transpose(1, 2).flatten(2)
        logits, on = self.choice(x_BNF, self.active)
        both = self.weighed(x_BNF, logits, on), self.with_shared(on)
        gate_BHN1, on_BHN1 = (x.transpose(1, 2)[..., None] for x in both)
        return out_BHNV * gate_BHN1 + self.mean[:, None] * (1 - on_BHN1)

    def gates(self, x: Tensor) -> Tensor:
        """The gate of every head, 0 for those that are off."""
        return self.weighed(x, *self.choice(x, self.active))

    def weighed(self, x: Tensor, logits: Tensor, on: Tensor) -> Tensor:
        """The gates for this choice among the routed heads."""
        kinds = 2 * (x @ self.kind_weight.T).softmax(-1)
        shared = (x @ self.shared_weight.T).softmax(-1) * len(self.shared_weight) * kinds[..., :1]
        share = (self.sharpness * logits).softmax(-1) * on
        routed = share / share.sum(-1, keepdim=True) * self.active * kinds[..., 1:]
        return torch.cat([shared, routed], -1)[..., self.order.argsort()]

    def chosen(self, x: Tensor, active: int) -> Tensor:
        """1 for heads that are on when so many of the routed ones are, 0 for the others."""
        return self.with_shared(self.choice(x, active)[1])

    def with_shared(self, on: Tensor) -> Tensor:
        """A choice among the routed heads beside the shared ones, which are on, in the order of the heads."""
        shared = on.new_ones(*on.shape[:-1], len(self.shared_weight))
        return torch.cat([shared, on], -1)[..., self.order.argsort()]

    def choice(self, x: Tensor, active: int) -> tuple[Tensor, Tensor]:
        """The logits of the routed heads from the queries of all, and 1 for those of them that a token switches on."""
        logits = x @ self.routed_weight.T + self.routed_bias
        return logits, torch.zeros_like(logits).scatter(-1, logits.topk(active).indices, 1)

    def imbalance(self, query_BHND: Tensor) -> Tensor:
        """1 where all routed heads are chosen equally often, more the more some are preferred."""
        logits, on = self.choice(query_BHND.transpose(1, 2).flatten(2), self.active)
        liked, taken = logits.softmax(-1).flatten(0, -2).mean(0), on.flatten(0, -2).mean(0)
        return (liked * taken).sum() * len(liked) / self.active
