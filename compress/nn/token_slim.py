"""Soft aggregation of tokens to a fixed number of them, learned, and the way back.

Shapes: B batch, n tokens of now, K tokens after it, S special ones, D width, R half the hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.nn.token_merge import MergeAfter, Tokens
from compress_kernels.token_merge.reference import wide


class Stage(NamedTuple):
    """One slimming: the tokens before it, what they became, and the share of each in each."""

    x_BnD: Tensor
    y_BKD: Tensor
    share_BnK: Tensor

    def back(self, y: Tensor) -> Tensor:
        """The tokens before it, moved as those that they became part of have moved since."""
        return self.x_BnD + self.share_BnK @ (y - self.y_BKD)


@dataclass
class Slimmed(Tokens):
    """Tokens and the slimmings they went through in the forward that is running."""

    special: int = 0
    stages: list[Stage] = field(default_factory=list)

    def reset(self) -> None:
        super().reset()
        self.stages = []

    def unmerge(self, x: Tensor) -> Tensor:
        """Bring x back to the places of the input and forget."""
        x = self.whole(x)
        self.reset()
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens of the input, from those of now."""
        special, y = x[:, : self.special], x[:, self.special :]
        for stage in reversed(self.stages):
            y = stage.back(y)
        return torch.cat([special, y], 1)


class SlimAfter(MergeAfter):
    """A module that mixes image tokens to `count` of them, with the hooks of its block.

    Its logits are an MLP of the normed tokens; a softmax over the tokens makes of them what each new token is made of.
    """

    def __init__(self, tokens: Slimmed, special: int, count: int, width: int, like: Tensor):
        super().__init__(tokens, None)
        self.special = special
        rank = min(count, width // 4)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_zeros(shape), requires_grad=False)

        self.inner, self.bias, self.outer = weight(2 * rank, width), weight(2 * rank), weight(count, 2 * rank)

    def extra_repr(self) -> str:
        return f"special={self.special}, count={len(self.outer)}"

    def logits(self, x: Tensor) -> Tensor:
        """How much each of the tokens (B,n,D) belongs to each of the new ones (B,n,K)."""
        return F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), self.inner, self.bias)), self.outer)

    def fewer(self, x: Tensor) -> Tensor:
        """The special tokens and the new ones."""
        special, x = x[:, : self.special], x[:, self.special :]
        if x.shape[1] <= len(self.outer):
            return torch.cat([special, x], 1)
        y, share = mixed(x, self.logits(x))
        self.tokens.special = self.special
        self.tokens.stages = [*self.tokens.stages, Stage(x, y, share)]
        return torch.cat([special, y], 1)


def mixed(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The new tokens (B,K,D), and the share (B,n,K) of each new one in what becomes of each old one."""
    logs = logits.to(wide(logits.dtype)).log_softmax(1)
    return logs.exp().to(x.dtype).transpose(1, 2) @ x, logs.softmax(2).to(x.dtype)
