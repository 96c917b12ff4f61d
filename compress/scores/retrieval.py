"""How surely a head finds what has to be copied: on random tokens that are repeated, the share of positions at which
it attends most to the token behind the earlier occurrence, which comes next.

Such heads carry the recall of long contexts, which text to calibrate on hardly shows. Only decoders have them; of a
group the best head counts. Made to protect heads (`protect`), it is a poor score by itself.

Papers: Wu, Wang, Xiao, Peng, Fu, "Retrieval Head Mechanistically Explains Long-Context Factuality", ICLR 2025; Olsson
et al., "In-context Learning and Induction Heads", 2022 (repeated random tokens).
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.parts import Part
from compress.scoring import Scores
from compress.view import Attention, View

LENGTH, SEQUENCES = 48, 8  # tokens before they are repeated, all different


def score(view: View, parts: list[Part], batches: list[dict]) -> Scores:
    """The share of hits of every unit's best head."""
    hits = copying(view, [part.owner for part in parts if isinstance(part.owner, Attention)])
    found = []
    for part in parts:
        heads = hits.get(part.path)
        units = torch.tensor(part.unit[:: part.owner.value_dim] if heads is not None else ())
        found += [heads[units == unit].max() if heads is not None else torch.zeros(()) for unit in range(part.count)]
    return Scores(torch.stack(found))


@torch.no_grad()
def copying(view: View, attentions: list[Attention]) -> dict[str, Tensor]:
    """The share of hits of every head, by the path of its attention."""
    config = getattr(view.model, "config", None)
    causal = {view.module(at.path): at.path for at in attentions if at.causal}
    if view.library != "transformers" or not causal or getattr(config, "is_encoder_decoder", False):
        raise CompressError("retrieval: only decoders have heads that retrieve; this model is none")
    low, chance = config.vocab_size // 8, torch.Generator().manual_seed(0)  # special tokens mostly come first
    drawn = torch.stack([
        low + torch.randperm(config.vocab_size - low, generator=chance)[:LENGTH] for _ in range(SEQUENCES)
    ])  # fmt: skip
    start = getattr(config, "bos_token_id", None)
    first = drawn.new_full((SEQUENCES, 1), start if isinstance(start, int) else 0)
    tokens = torch.cat((first, drawn, drawn), 1).to(next(view.model.parameters()).device)
    found: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple, output) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.dim() == 4:
            found[causal[module]] = share_of_hits(weights)

    before = config._attn_implementation
    with ExitStack() as stack:
        view.model.set_attn_implementation("eager")
        stack.callback(view.model.set_attn_implementation, before)
        for module in causal:
            stack.callback(module.register_forward_hook(hook).remove)
        view.model(input_ids=tokens, use_cache=False)
    if not found:
        raise CompressError("retrieval: the model's attentions do not show their weights")
    return found


def share_of_hits(weights: Tensor) -> Tensor:
    """Of attention weights [sequences, heads, tokens, tokens] the share of second copies that look where they must."""
    at = torch.arange(1 + LENGTH, 2 * LENGTH, device=weights.device)
    return (weights[:, :, at].argmax(-1) == at - LENGTH + 1).float().mean((0, 2)).cpu()
