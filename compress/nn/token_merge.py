"""What runs in a model whose tokens are merged: the state of a stack, the attention core and the hooks of its blocks.

Shapes: B batch, N tokens of the input, n tokens of now, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.token_match import PRICE, Rule, bystanders, match, unmerge
from compress_kernels.token_merge import token_merge
from compress_kernels.token_merge.reference import Matching, Merged, merge, take, wide

LEAST = 1e-30  # a score of nothing, so that the others can always be weighed
MASKED = -1000.0  # an additive mask below this hides a key; learned position biases stay far above


@dataclass
class Tokens:
    """What became of the tokens in the forward that is running: one object that all blocks of a stack share."""

    alive: Tensor | None = None  # B,n: not padding; None where no mask came
    size: Tensor | None = None  # B,n, float32: how many original tokens each one stands for
    slot: Tensor | None = None  # B,N: where each original token is found now; None before the first merge
    origin: Tensor | None = None  # B,n: whose place in the input each token has
    keys: Tensor | None = None  # B,H,n,d of the last attention
    score: Tensor | None = None  # B,n, float32 at least: what the last attention makes of them, where it is asked
    last: Matching | Merged | None = None  # what went where, until the block that does so inside ends
    moved: Tensor | None = None  # B,n,D: and how far it took those that stay

    def reset(self) -> None:
        """Forget everything, also what a forward that failed half-way left behind."""
        self.alive = self.size = self.slot = self.origin = self.keys = self.score = self.last = self.moved = None

    def see(self, mask: Tensor, batch: int) -> None:
        """Learn from an attention mask (B,H,N,N or broadcastable) which tokens are padding."""
        visible = mask if mask.dtype == torch.bool else mask > MASKED
        self.alive = visible.flatten(1, 2).any(1).expand(batch, -1)

    def merge(self, x: Tensor, rule: Rule) -> Tensor:
        """Merge the most similar tokens of x (B,n,D) and remember what went where."""
        tokens = x.shape[1]
        r = rule.removes(tokens)
        if r == 0:
            return x
        self.begin(x)
        rows = None if self.alive is None else rule.removes_rows(self.alive.sum(1))
        fixed = bystanders(rule, tokens, self.alive, x.device)
        metric = self.compared(x, rule.metric)
        weight = None if rule.importance == "none" else self.weight()
        if rule.margin is None and rule.match == "bipartite":
            euclidean, price = rule.similarity == "euclidean", None if weight is None else weight.pow(PRICE)
            found = token_merge(x, metric, self.size, fixed, self.alive, rows, r, euclidean, rule.ward, price)
            x, self.size = found.x, found.size
        else:
            found = match(metric, r, fixed, self.alive, rows, self.size, rule, weight)
            x, self.size = merge(x, found, self.size)
        self.follow(found)
        return x

    def compared(self, x: Tensor, metric: str) -> Tensor:
        """What tells which tokens are alike: their features, the mean of their keys over the heads, or both whole."""
        if metric == "features":
            return x
        if metric == "keys":
            return self.keys.to(wide(x.dtype)).mean(1)
        parts = x, self.keys.transpose(1, 2).flatten(2)
        return torch.cat([F.normalize(part.to(wide(x.dtype)), dim=-1) for part in parts], -1)

    def weight(self) -> Tensor:
        """How important each token is by its score, by the original one; only how they compare counts."""
        score, self.score = self.score, None
        return (score / self.size.clamp(min=1)).clamp(min=LEAST)

    def begin(self, x: Tensor) -> None:
        """Before the first change: every token of x stands for itself, and padding for none."""
        if self.slot is None:
            batch, tokens = x.shape[:2]
            self.slot = self.origin = torch.arange(tokens, device=x.device).expand(batch, -1)
            ones = torch.ones(batch, tokens, device=x.device)
            self.size = ones if self.alive is None else self.alive.float()

    def follow(self, matching: Matching | Merged) -> None:
        """Remember what went where."""
        self.last = matching
        self.slot = matching.slot.gather(1, self.slot)
        self.origin = self.origin.gather(1, matching.kept)
        self.alive = None if self.alive is None else self.alive.gather(1, matching.kept)

    def settled(self, x: Tensor) -> Tensor:
        """The tokens that a block with all of them in its residual gives, as they are fewer since its MLP."""
        return x if self.moved is None else take(x, self.last.kept) + self.moved

    def places(self, patches: int) -> Tensor:
        """Which of so many patches, behind the leading tokens, each token that is left is or goes on as."""
        first = self.slot.shape[1] - patches
        return self.origin[:, first:] - first

    def unmerge(self, x: Tensor) -> Tensor:
        """Bring x back to the places of the input and forget; a class token alone is in its place."""
        out = x if self.slot is None or x.shape[1] < self.size.shape[1] else unmerge(x, self.slot)
        self.reset()
        return out


class Sized(nn.Module):
    """An attention core whose keys weigh as many tokens as they stand for (log size on the logits).

    It also brings masks that the model made for all its tokens to the ones that are left. In a joint attention
    `text` says on which side of the image's keys those of the other stream stand.
    """

    def __init__(self, tokens: Tokens, proportional: bool, text: str = ""):
        super().__init__()
        self.tokens, self.proportional, self.text = tokens, proportional, text

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        tokens = self.tokens
        tokens.keys = key
        if tokens.slot is None:
            if mask is not None and tokens.alive is None:
                tokens.see(mask, query.shape[0])
        else:
            others = key.shape[2] - tokens.size.shape[1]
            mask = None if mask is None else self._left(mask)
            if self.proportional and mask is None and query.is_cuda and query.dtype != torch.float32:
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                wide = carrying(query, key, value, self._log_size(others), scale)
                return self.inner(module, *wide, None, scale, causal, **kwargs)[..., : value.shape[-1]]
            if self.proportional:
                # Fused kernels want the mask in the query's type; only the sum is rounded to it.
                mask = _weighed(mask, self._log_size(others)).to(query.dtype)
        return self.inner(module, query, key, value, mask, scale, causal, **kwargs)

    def extra_repr(self) -> str:
        return f"proportional={self.proportional}" + (f", text={self.text}" if self.text else "")

    def _log_size(self, others: int) -> Tensor:
        log_size = self.tokens.size.clamp(min=1).log()
        if others:
            log_size = F.pad(log_size, (others, 0) if self.text == "before" else (0, others))
        return log_size[:, None, None]

    def _left(self, mask: Tensor) -> Tensor:
        """The rows and columns of the mask that belong to the tokens that are left."""
        whole, origin = self.tokens.slot.shape[1], self.tokens.origin
        if mask.shape[-1] != whole:
            raise CompressError(
                f"tokens: the attention mask is for {mask.shape[-1]} keys, it must be for all {whole} tokens "
                "(attn_implementation 'sdpa' or 'eager')"
            )
        mask = mask.expand(origin.shape[0], -1, -1, -1)
        if mask.shape[2] > 1:
            mask = mask.gather(2, origin[:, None, :, None].expand(-1, mask.shape[1], -1, whole))
        return mask.gather(3, origin[:, None, None].expand(-1, *mask.shape[1:3], -1))


def carrying(query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Queries, keys and values (B,H,n,d) whose products hold the log sizes (B,1,1,n) of the keys, so that no mask is
    needed, which would rule out flash kernels: two more channels, the second for what the first was rounded by.

    Widths become a multiple of 8 and alike, as such kernels want them; the answer has zeros behind the values.
    """
    width = max(query.shape[-1] + 2, value.shape[-1])
    width += -width % 8
    wanted = (log_size[:, :, 0, :, None] / scale).expand(*key.shape[:3], 1)
    high = wanted.to(key.dtype)
    ones = torch.ones_like(query[..., :1])
    query, key = torch.cat([query, ones, ones], -1), torch.cat([key, high, (wanted - high).to(key.dtype)], -1)
    return tuple(F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))


def _weighed(mask: Tensor | None, log_size: Tensor) -> Tensor:
    """Mask and log size as one additive mask."""
    if mask is None:
        return log_size
    return torch.where(mask, log_size, -torch.inf) if mask.dtype == torch.bool else mask + log_size


class MergeAfter(nn.Module):
    """Hooks of the blocks of a stack: a fresh start at the first, a merge in each, all tokens back after the last.

    Where a block's own residual holds all tokens, the merge has three hooks: the MLP reads fewer, what it says of each
    is copied to all that it stands for, and the block's answer is brought to the fewer.
    """

    def __init__(self, tokens: Tokens, rule: Rule | None):
        super().__init__()
        self.tokens, self.rule = tokens, rule

    def extra_repr(self) -> str:
        return "" if self.rule is None else str(self.rule)

    def start(self, block, args) -> None:
        if block.training and getattr(block, "gradient_checkpointing", False):
            raise CompressError("tokens: gradient checkpointing would replay the blocks with all their tokens")
        self.tokens.reset()

    def fewer(self, x: Tensor) -> Tensor:
        """The tokens that go on."""
        return self.tokens.merge(x, self.rule)

    def shrink(self, block, args, output):
        return on_first(output, self.fewer)

    def enter(self, part, args):
        tokens, x = self.tokens, args[0]
        tokens.last = tokens.moved = None
        fewer = self.fewer(x)
        if tokens.last is not None:
            tokens.moved = fewer - take(x, tokens.last.kept)
        return (fewer, *args[1:])

    def leave(self, mlp, args, output):
        return output if self.tokens.moved is None else take(output, self.tokens.last.slot)

    def settle(self, block, args, output):
        output = on_first(output, self.tokens.settled)
        self.tokens.last = self.tokens.moved = None
        return output

    def turn(self, attention, args, kwargs):
        """Hook in front of an attention with rotary positions: every token has the row of the place it stayed at."""
        if self.tokens.slot is None:
            return None
        rows = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": turned(rows, self.tokens.places(rows[0].shape[-2]))}

    def restore(self, block, args, output):
        return on_first(output, self.tokens.unmerge)


def turned(rows: tuple[Tensor, ...], places: Tensor) -> tuple[Tensor, ...]:
    """The rotary rows (P,d each) of the patches at these places (B,n), for all heads."""
    return tuple(row[places][:, None] for row in rows)


def on_first(output, change):
    """Blocks answer with a tensor or with a tuple that begins with it."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
