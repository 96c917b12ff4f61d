"""What stands in the place of a whole attention layer. B batch, N tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MASKED = -1000.0  # an additive mask below this hides a key; learned position biases stay far above


class Nothing(nn.Module):
    """Attention that adds nothing to the tokens; `pair` answers with weights of None beside."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, None]:
        out = self.answer(hidden_states, *args, **kwargs)
        return (out, None) if self.pair else out

    def answer(self, x_BND: Tensor, *args, **kwargs) -> Tensor:
        return torch.zeros_like(x_BND)


class StandIn(Nothing):
    """An affine map of each token, with `context` also of the mean of all tokens and of the first one.

    The first token, which others read the sequence from, gets a second map of these two.
    """

    def __init__(self, width: int, out: int, context: bool, pair: bool, like: Tensor) -> None:
        super().__init__(pair)
        kind = {"device": like.device, "dtype": like.dtype}
        self.token = nn.Linear(width, out, **kind)
        self.context = nn.Linear(2 * width, out, bias=False, **kind) if context else None
        self.first = nn.Linear(2 * width, out, **kind) if context else None

    def answer(self, x_BND: Tensor, attention_mask: Tensor | None = None, *args, **kwargs) -> Tensor:
        out = self.token(x_BND)
        if self.context is None:
            return out
        context_B1D = summary(x_BND, attention_mask)
        out = out + self.context(context_B1D)
        return torch.cat([out[:, :1] + self.first(context_B1D), out[:, 1:]], 1)


def summary(x_BND: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the tokens that the mask (B,N or B,H,N,N) does not hide, and the first token: B,1,2D."""
    if isinstance(mask, Tensor):
        seen = mask if mask.dtype == torch.bool or mask.dim() == 2 else mask > MASKED
        seen = (seen if mask.dim() == 2 else seen.flatten(1, 2).any(1)).to(x_BND.dtype)[..., None]
        mean = (x_BND * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    else:
        mean = x_BND.mean(1, keepdim=True)
    return torch.cat([mean.expand(len(x_BND), -1, -1), x_BND[:, :1]], -1)
