"""The training of small helpers, such as a judge or an encoder: minutes on one core, no checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdlm.core.errors import CdlmError

Progress = Callable[[int, float], None]
"""Called with (step from 1, loss)."""
T = TypeVar("T")


def minimise(
    model: nn.Module,
    loss_of: Callable[[T], Float[Tensor, ""]],
    batches: Iterator[T],
    *,
    steps: int,
    lr: float,
    progress: Progress | None = None,
) -> int:
    """Train the parameters of a model by AdamW, one batch a step, with gradients of norm 1 at most.

    Args:
        loss_of: the loss of a batch.
        batches: `steps` are taken.
        lr: peak rate, after a linear warm-up and before a cosine down to a tenth.

    Returns:
        steps that were taken, fewer if the batches came to an end.

    Raises:
        CdlmError: a loss or its gradient is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    taken = 0
    for batch in islice(batches, steps):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not bool((loss.detach() + norm).isfinite()):
            raise CdlmError(
                f"the training diverged at step {taken + 1}: the loss or its gradient is no number; lower lr, which is"
                f" {lr:g}"
            )
        optimizer.step()
        schedule.step()
        taken += 1
        if progress is not None:
            progress(taken, loss.item())
    return taken


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, min(100, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
