"""Where tokens lie: ids to vectors, probabilities to vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Module, ABC):
    """Vectors of one norm `rho` and dimension `dim`, one for each token."""

    rho: float
    dim: int

    @abstractmethod
    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]: ...

    @abstractmethod
    def table(self) -> Float[Tensor, "v d"]:
        """All vectors."""

    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        """The state of weighted tokens; of weights that are probabilities, the mean embedding."""
        return weights @ self.table()

    def dot(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        """The inner product of each state with every token's vector."""
        return z @ self.table().T

    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        """Mean embedding under softmax(logits)."""
        return self.mix(logits.softmax(-1))


class TokenEmbedding(Embedding):
    """A free table whose used rows all have one norm, by default rho = sqrt(d) (CDCD, section 3.2).

    Gradients flow through the normalisation. Without it, cross-entropy would make noise harmless by growing the rows.
    The small initial scale (CDCD: 0.001) sets how fast the directions learn, not how long the rows are.
    """

    def __init__(self, vocab: int, dim: int, init_std: float = 1e-3, rho: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, dim).mul_(init_std))
        self.dim, self.rho = dim, math.sqrt(dim) if rho is None else rho

    def table(self) -> Float[Tensor, "v d"]:
        return self.rho * F.normalize(self.weight, dim=-1)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.rho * F.normalize(F.embedding(tokens, self.weight), dim=-1)

    def expect(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        table = self.table()
        if logits.device.type != "cpu":
            return logits.softmax(-1) @ table
        # Row by row the softmax is still in the cache when it is multiplied, and never as large as the logits.
        return torch.stack([row.softmax(-1) @ table for row in logits])


class OutputPrior(nn.Module):
    """What a position's own noisy state says about its token in closed form: `z . e_w / t^2`, up to a constant.

    ln q(z | w) for embeddings of one norm, to be added to the logits (Plaid, arXiv 2305.18619, section 3.4; LangFlow,
    arXiv 2604.11748). Its weight grows from 0 to 1 over the first `warmup` optimiser steps; the count is kept with the
    weights.
    """

    def __init__(self, warmup: int = 0):
        super().__init__()
        self.warmup = warmup
        if warmup:
            self.steps: Tensor
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], embedding: Embedding
    ) -> Float[Tensor, "b n v"]:
        logits = embedding.dot(z / t.square().to(z.dtype)[:, None, None])
        return logits * (self.steps / self.warmup).clamp(max=1).to(z.dtype) if self.warmup else logits

    def after_step(self) -> None:
        """Called after each optimiser step."""
        if self.warmup:
            self.steps += 1
