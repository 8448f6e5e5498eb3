"""The space of a learned table of vectors: what a frozen encoder's is compared with."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cdlm.continuous.embedding import TokenEmbedding


class LearnedSpace(nn.Module):
    """Tokens as rows of a table that is trained along. They do not depend on their context.

    Each row has the norm sqrt(dim), so its numbers have the size of those of an `EncoderSpace`, and an error of the
    flow cannot be made small by shrinking them.

    Args:
        dim: length of a vector.
        vocab: number of tokens.
    """

    def __init__(self, dim: int, vocab: int):
        super().__init__()
        self.dim = dim
        self.embedding = TokenEmbedding(vocab, dim)

    def forward(self, tokens: Int[Tensor, "b n"], seen: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Vectors; zero where `seen` is false."""
        return self.embedding(tokens).masked_fill(~seen[..., None], 0.0)
