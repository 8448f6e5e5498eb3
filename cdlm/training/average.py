"""The moving average of a system's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cdlm.continuous.system import EmbeddingDiffusion


class Average(nn.Module):
    """A second system whose weights trail those of the first; validation, samples and the exported model use it.

    After optimiser step k (one-based), average += (1 - d) (weights - average) with d = min(decay, (1 + k) / (10 + k)).
    The noise schedule is copied as it is, because it averages itself.
    """

    def __init__(self, system: EmbeddingDiffusion, decay: float):
        super().__init__()
        self.system = copy.deepcopy(system).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> Average:
        """Stays in evaluation mode."""
        return self

    @torch.no_grad()
    def update(self, system: EmbeddingDiffusion, step: int) -> None:
        """Follow `system` after its optimiser step `step` (one-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(_weights(self.system), _weights(system), step)
        self.system.schedule.load_state_dict(system.schedule.state_dict())


def _weights(system: EmbeddingDiffusion) -> list[Tensor]:
    return [p for name, p in system.named_parameters() if not name.startswith("schedule.")]
