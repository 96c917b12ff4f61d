"""Embedding table with int8 rows and one scale a row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from compress.nn.int8_linear import quantize_rows


class Int8Embedding(nn.Module):
    """In the place of nn.Embedding; only the rows that are looked up are ever dequantized."""

    def __init__(self, weight: Tensor, weight_scale: Tensor, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Int8Embedding:
        """Quantize a table's present rows; on the meta device only its shapes."""
        return cls(*quantize_rows(embedding.weight), embedding.padding_idx)

    def forward(self, indices: Tensor) -> Tensor:
        scale = F.embedding(indices, self.weight_scale)
        return F.embedding(indices, self.weight).to(scale.dtype) * scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
