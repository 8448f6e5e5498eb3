"""The loss at each noise level on held-out text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from cdlm.core.rng import generator
from cdlm.core.types import Batch, MaskingFn
from cdlm.models.system import System
from cdlm.training.module import VALIDATION

BUCKETS = 10


@torch.no_grad()
def losses_by_level(
    system: System,
    batches: Iterable[Batch],
    masking: MaskingFn,
    seed: int,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "2 buckets"]:
    """Summed nats and number of generated tokens in ten buckets of equal u, float64.

    Row i of the validation text belongs to bucket i % 10 and has the level of its middle, u = (i % 10 + 0.5) / 10.
    Masks and noise depend on the seed and the place of a row alone, so two calls differ by the weights only.
    """
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=device)
    row = 0
    for index, batch in enumerate(batches):
        noise = generator(seed, VALIDATION, index, device=device)
        bucket = torch.arange(row, row + len(batch), device=device) % BUCKETS
        loss = system(batch.to(device).masked(masking, noise, (bucket.double() + 0.5) / BUCKETS))
        sums.index_add_(1, bucket, torch.stack([loss.nats.double() * loss.count, loss.count.double()]))
        row += len(batch)
    return sums


def validation_metrics(sums: Float[Tensor, "2 buckets"]) -> dict[str, float]:
    """`nats_u0` (least noise) to `nats_u9` in nats per token, and their mean `valid_nats`; none for empty buckets."""
    nats = {f"nats_u{i}": (total / count).item() for i, (total, count) in enumerate(sums.T) if count > 0}
    return {"valid_nats": sum(nats.values()) / len(nats), **nats} if nats else {}
