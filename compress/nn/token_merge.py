"""Merging of similar tokens inside a forward: bipartite soft matching, the state of a stack, and where blocks call it.

Shapes: B batch, N tokens of the input, n tokens of now, r tokens that a merge takes away, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import CompressError

MILLION = 10**6  # shares are counted in millionths, so that integers and tensors round alike
MASKED = -1000.0  # an additive mask below this hides a key; learned position biases stay far above


@dataclass(frozen=True)
class Matching:
    """Which tokens stay and where each one goes: indices only."""

    kept: Tensor  # B,n-r: the tokens that stay, in their order
    gone: Tensor  # B,r: the tokens that go
    slot: Tensor  # B,n: the place among `kept` at which each token is found afterwards


@dataclass(frozen=True)
class Rule:
    """How much a merge takes away, and what it leaves alone."""

    ratio: float = 0.0  # share of the tokens present
    r: int | None = None  # a count instead
    first: int = 0  # class, distillation and register tokens
    last: bool = False  # the closing token of a text
    similarity: str = "cosine"

    def removes(self, tokens: int) -> int:
        """The tokens merged away out of so many: at most every second one that is not protected."""
        return max(0, min(self._wanted(tokens), (tokens - self.protected) // 2))

    def removes_rows(self, tokens: Tensor) -> Tensor:
        """`removes` for the lengths (B) of the rows of a padded batch."""
        wanted = self._wanted(tokens)
        wanted = torch.full_like(tokens, wanted) if isinstance(wanted, int) else wanted
        return torch.minimum(wanted, (tokens - self.protected) // 2).clamp(min=0)

    @property
    def protected(self) -> int:
        return self.first + int(self.last)

    def _wanted(self, tokens):
        return tokens * round(self.ratio * MILLION) // MILLION if self.r is None else self.r


def bystanders(rule: Rule, tokens: int, alive: Tensor | None, device) -> Tensor:
    """The tokens (1 or B,n) that take no part: the protected ones of each row, and padding."""
    if alive is None:
        position = torch.arange(tokens, device=device)[None]
        return (position < rule.first) | (position >= tokens - int(rule.last))
    rank = alive.cumsum(1)
    return ~alive | (rank <= rule.first) | (rank > rank[:, -1:] - int(rule.last))


def match(
    metric: Tensor,
    r: int,
    fixed: Tensor | None = None,
    alive: Tensor | None = None,
    rows: Tensor | None = None,
    similarity: str = "cosine",
) -> Matching:
    """Every second token proposes its most similar one among the others; the r strongest proposals are taken.

    In a padded batch (`alive` B,n) row i takes rows[i] of them; its other r - rows[i] tokens go from its padding.
    """
    score = _scores(metric, similarity)
    batch, tokens = metric.shape[:2]
    if fixed is not None:
        score = score.masked_fill(fixed[:, None, 1::2], -torch.inf)
    best, target = score.max(-1)
    if fixed is not None:
        best = best.masked_fill(fixed[:, ::2], -torch.inf)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    gone, target = chosen * 2, target.gather(1, chosen) * 2 + 1
    if alive is not None:
        turn = torch.arange(r, device=metric.device)[None] - rows[:, None]
        padding = alive.int().argsort(dim=-1, stable=True)[:, :r].gather(1, turn.clamp(min=0))
        gone, target = torch.where(turn < 0, gone, padding), torch.where(turn < 0, target, padding)
    index = torch.arange(tokens, device=metric.device).expand(batch, -1)
    stays = torch.ones_like(index, dtype=torch.bool).scatter(1, gone, False)
    place = (stays.cumsum(1) - 1).clamp(min=0)
    # Tokens that go are written to a spare last column.
    kept = index.new_zeros(batch, tokens - r + 1).scatter(1, place.masked_fill(~stays, tokens - r), index)[:, :-1]
    return Matching(kept, gone, place.scatter(1, gone, place.gather(1, target)))


def _scores(metric: Tensor, similarity: str) -> Tensor:
    """Similarity of every even with every odd token, in float32: half precision would tie the closest pairs."""
    metric = metric.to(wide(metric.dtype))
    if similarity == "cosine":
        metric = F.normalize(metric, dim=-1)
        return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    even, odd = metric[:, ::2], metric[:, 1::2]
    lengths = even.square().sum(-1)[:, :, None] + odd.square().sum(-1)[:, None]
    return torch.baddbmm(lengths, even, odd.transpose(1, 2), beta=-1, alpha=2)


def merge(x: Tensor, matching: Matching, size: Tensor) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of the tokens that went together, and the new sizes (float32); others stay to the bit."""
    kept, gone = matching.kept, matching.gone
    place = matching.slot.gather(1, gone)
    stays, goes = take(x, kept), take(x, gone).to(wide(x.dtype))
    before, moved = size.gather(1, kept), size.gather(1, gone)
    after = before.scatter_add(1, place, moved)
    # Padding has size 0 and may hold anything: it must add nothing, not 0 * nan.
    goes = torch.where(moved[..., None] > 0, goes * moved[..., None], 0)
    total = (stays * before[..., None]).scatter_add(1, place[..., None].expand_as(goes), goes)
    mean = total / after.clamp(min=1)[..., None]
    return torch.where((after != before)[..., None], mean.to(x.dtype), stays), after


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Copy every merged token to all the places it stands for."""
    return take(x, slot)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x B,n,D."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


@dataclass
class Tokens:
    """What became of the tokens in the forward that is running: one object that all blocks of a stack share."""

    alive: Tensor | None = None  # B,n: not padding; None where no mask came
    size: Tensor | None = None  # B,n, float32: how many original tokens each one stands for
    slot: Tensor | None = None  # B,N: where each original token is found now; None before the first merge
    origin: Tensor | None = None  # B,n: whose place in the input each token has

    def reset(self) -> None:
        """Forget everything, also what a forward that failed half-way left behind."""
        self.alive = self.size = self.slot = self.origin = None

    def see(self, mask: Tensor, batch: int) -> None:
        """Learn from an attention mask (B,H,N,N or broadcastable) which tokens are padding."""
        visible = mask if mask.dtype == torch.bool else mask > MASKED
        self.alive = visible.flatten(1, 2).any(1).expand(batch, -1)

    def merge(self, x: Tensor, rule: Rule) -> Tensor:
        """Merge the most similar tokens of x (B,n,D) and remember what went where."""
        batch, tokens = x.shape[:2]
        r = rule.removes(tokens)
        if r == 0:
            return x
        if self.slot is None:
            self.slot = self.origin = torch.arange(tokens, device=x.device).expand(batch, -1)
            ones = torch.ones(batch, tokens, device=x.device)
            self.size = ones if self.alive is None else self.alive.float()
        rows = None if self.alive is None else rule.removes_rows(self.alive.sum(1))
        fixed = bystanders(rule, tokens, self.alive, x.device)
        matching = match(x, r, fixed, self.alive, rows, rule.similarity)
        x, self.size = merge(x, matching, self.size)
        self.slot = matching.slot.gather(1, self.slot)
        self.origin = self.origin.gather(1, matching.kept)
        self.alive = None if self.alive is None else self.alive.gather(1, matching.kept)
        return x

    def unmerge(self, x: Tensor) -> Tensor:
        """Bring x back to the places of the input and forget."""
        out = x if self.slot is None else unmerge(x, self.slot)
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
        if tokens.slot is None:
            if mask is not None and tokens.alive is None:
                tokens.see(mask, query.shape[0])
        else:
            others = key.shape[2] - tokens.size.shape[1]
            mask = None if mask is None else self._left(mask, others)
            if self.proportional:
                # Fused kernels want the mask in the query's type; only the sum is rounded to it.
                mask = _weighed(mask, self._log_size(others)).to(query.dtype)
        return self.inner(module, query, key, value, mask, scale, causal, **kwargs)

    def extra_repr(self) -> str:
        return f"proportional={self.proportional}" + (f", text={self.text}" if self.text else "")

    def _log_size(self, others: int) -> Tensor:
        log_size = self.tokens.size.clamp(min=1).log()
        return F.pad(log_size, (others, 0) if self.text == "before" else (0, others))[:, None, None]

    def _left(self, mask: Tensor, others: int) -> Tensor:
        """The rows and columns of the mask that belong to the tokens that are left."""
        whole, origin = self.tokens.slot.shape[1], self.tokens.origin
        if mask.shape[-1] != whole or others:
            raise CompressError(
                f"tokens.merge: the attention mask is for {mask.shape[-1]} keys, it must be for all {whole} tokens "
                "(attn_implementation 'sdpa' or 'eager')"
            )
        mask = mask.expand(origin.shape[0], -1, -1, -1)
        if mask.shape[2] > 1:
            mask = mask.gather(2, origin[:, None, :, None].expand(-1, mask.shape[1], -1, whole))
        return mask.gather(3, origin[:, None, None].expand(-1, *mask.shape[1:3], -1))


def _weighed(mask: Tensor | None, log_size: Tensor) -> Tensor:
    """Mask and log size as one additive mask."""
    if mask is None:
        return log_size
    return torch.where(mask, log_size, -torch.inf) if mask.dtype == torch.bool else mask + log_size


class MergeAfter(nn.Module):
    """Hooks of a block that maps tokens to tokens: a fresh start, the merge at its end, all tokens back at the last."""

    def __init__(self, tokens: Tokens, rule: Rule | None):
        super().__init__()
        self.tokens, self.rule = tokens, rule

    def extra_repr(self) -> str:
        return "" if self.rule is None else str(self.rule)

    def start(self, block, args) -> None:
        if block.training and getattr(block, "gradient_checkpointing", False):
            raise CompressError("tokens.merge: gradient checkpointing would replay the blocks without their merges")
        self.tokens.reset()

    def shrink(self, block, args, output):
        return _on_first(output, lambda x: self.tokens.merge(x, self.rule))

    def restore(self, block, args, output):
        return _on_first(output, self.tokens.unmerge)


class MergeAround(nn.Module):
    """Hooks of an attention module that merge the tokens it reads and copy its answer back to all of them."""

    def __init__(self, tokens: Tokens, rule: Rule):
        super().__init__()
        self.tokens, self.rule = tokens, rule

    def extra_repr(self) -> str:
        return str(self.rule)

    def shrink(self, module, args, kwargs):
        self.tokens.reset()
        if args:
            return (self.tokens.merge(args[0], self.rule), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.tokens.merge(kwargs["hidden_states"], self.rule)}

    def restore(self, module, args, output):
        return _on_first(output, self.tokens.unmerge)


def _on_first(output, change):
    """Blocks answer with a tensor or with a tuple that begins with it."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
