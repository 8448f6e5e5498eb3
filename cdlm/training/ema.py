"""The exponential moving average (EMA) of a system's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cdlm.models.system import System


class EMA(nn.Module):
    """A second system whose weights follow those of the first slowly; validation, samples and the saved model use it.

    After optimiser step k (one-based), ema += (1 - d) (weights - ema) with d = min(decay, (1 + k) / (10 + k)).
    A schedule of its own is copied as it is, because it averages itself, and so are counts and the like. Weights that
    are not trained, as beside an adapter, are shared.
    """

    def __init__(self, system: System, decay: float):
        super().__init__()
        frozen = {id(weight): weight for weight in system.parameters() if not weight.requires_grad}
        self.system = copy.deepcopy(system, frozen).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> EMA:
        """Stays in evaluation mode."""
        return self

    @torch.no_grad()
    def update(self, system: System, step: int) -> None:
        """Follow `system` after its optimiser step `step` (one-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.system.averaged_parameters(), system.averaged_parameters(), step)
        for mine, theirs in zip(self.system.buffers(), system.buffers(), strict=True):
            mine.copy_(theirs)
        if self.system.learned_schedule is not None and system.learned_schedule is not None:
            self.system.learned_schedule.load_state_dict(system.learned_schedule.state_dict())
