"""The token table: ids to vectors, probabilities to vectors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class TokenEmbedding(nn.Module):
    """A free table whose used rows all have norm rho = sqrt(d) (CDCD, section 3.2).

    Gradients flow through the normalisation. Without it, cross-entropy would make noise harmless by growing the rows.
    The small initial scale (CDCD: 0.001) sets how fast the directions learn, not how long the rows are.
    """

    def __init__(self, vocab: int, dim: int, init_std: float = 1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, dim) * init_std)
        self.rho = math.sqrt(dim)

    def table(self) -> Float[Tensor, "v d"]:
        """All used rows."""
        return self.rho * F.normalize(self.weight, dim=-1)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.rho * F.normalize(F.embedding(tokens, self.weight), dim=-1)


def expected_embedding(logits: Float[Tensor, "b n v"], table: Float[Tensor, "v d"]) -> Float[Tensor, "b n d"]:
    """Mean embedding under softmax(logits)."""
    if logits.device.type != "cpu":
        return logits.softmax(-1) @ table
    # Row by row the softmax is still in the cache when it is multiplied, and never as large as the logits.
    return torch.stack([row.softmax(-1) @ table for row in logits])
