"""The bound that masked models are trained with: what is masked, and what its recovery costs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.devices import refined
from cdlm.core.types import Batch
from cdlm.models.system import Loss

EPS = 1e-3
"""Least share of masked tokens: t = (1 - EPS) u + EPS, so that 1 / t stays bounded (MDLM and LLaDA alike)."""


def shares(u: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The share of tokens that is masked at u."""
    return (1 - EPS) * refined(u) + EPS


def hidden_of(batch: Batch, t: Float[Tensor, " b"]) -> Bool[Tensor, "b n"]:
    """Positions to generate, each masked with probability t of its row."""
    coin = torch.rand(batch.tokens.shape, generator=batch.generator, device=batch.tokens.device)
    return batch.target & (coin < t.float()[:, None])


def bound(
    nats: Float[Tensor, " b"], hidden: Int[Tensor, " b"], t: Float[Tensor, " b"], batch: Batch, flat: bool
) -> Loss:
    """The negative evidence lower bound over the positions to generate (MDLM, eq. 10; LLaDA, eq. 3).

    Args:
        nats: cross-entropy of what is masked, summed over each row.
        hidden: how many positions that is.
        flat: what is differentiated is the mean over masked positions in place of the bound.
    """
    count = batch.target.sum(1)
    each = nats / t.to(nats.dtype)
    total = nats.sum() / hidden.sum().clamp(min=1) if flat else each.sum() / count.sum()
    return Loss(total, (each / count).detach(), t, count)
