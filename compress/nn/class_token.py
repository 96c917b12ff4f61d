"""What runs in a last block of which only the class token is read. B batch, N tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ASKED = ("output_hidden_states", "output_attentions")  # for what every token has to be computed


class ClassToken(nn.Module):
    """A core, and the hooks around it, that let a block work on its class token with the keys and values of all.

    Only while the whole model runs, which was seen to read nothing else, and not in training.
    """

    closed = "it computes its class token only"  # a core over it would be given one key

    def __init__(self, norm: str, keys: str, values: str) -> None:
        super().__init__()
        self.norm, self.keys, self.values = norm, keys, values
        self.asked, self.tokens_BND = False, None
        # Saved, so that no format without room for it can take the model for an ordinary one.
        self.register_buffer("class_tokens", torch.ones(1, dtype=torch.uint8))

    def start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hook before the model: is the class token all that is wanted?"""
        wanted = [getattr(model.config, name, None) if kwargs.get(name) is None else kwargs[name] for name in ASKED]
        self.asked = not model.training and not any(wanted)

    def stop(self, model: nn.Module, args: tuple, output) -> None:
        """Hook after the model, also where it failed."""
        self.asked, self.tokens_BND = False, None

    def cut(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Hook before the block: keep all tokens for keys and values, hand on the first."""
        self.tokens_BND = None
        if not self.asked:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        self.tokens_BND = block.get_submodule(self.norm)(x) if self.norm else x
        return ((x[:, :1], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x[:, :1]})

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs) -> Tensor:
        if self.tokens_BND is not None:
            key, value = (
                module.get_submodule(name)(self.tokens_BND).unflatten(-1, (of_one.shape[1], -1)).transpose(1, 2)
                for name, of_one in ((self.keys, key), (self.values, value))
            )
            mask = None if mask is None else mask[:, :, :1]
        return self.inner(module, query, key, value, mask, scale, causal, **kwargs)

    def extra_repr(self) -> str:
        return f"norm={self.norm}"
