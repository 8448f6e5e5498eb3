"""What the rules share: thresholds to sweep, and checks of their settings."""

from __future__ import annotations

import math

import numpy as np
import torch

from cdlm.core.errors import CdlmError
from cdlm.core.types import StepState


def require_threshold(rule: str, name: str, value: float) -> None:
    """Raise unless `value` is a number; infinities are thresholds that nothing, or everything, reaches."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise CdlmError(f"{rule} needs a number {name}, got {value!r}")


def falling(high: float, low: float, count: int = 16) -> list[float]:
    """Thresholds in equal ratios, to three digits."""
    return [float(f"{x:.3g}") for x in np.geomspace(high, low, count)]


def step_counts(budget: int, high: float, low: float, count: int = 16) -> list[int]:
    """Whole numbers of steps from `high` to `low` shares of the budget, in equal ratios, falling."""
    return sorted({max(1, round(budget * share)) for share in falling(high, low, count)}, reverse=True)


def past(warmup: float, state: StepState) -> torch.Tensor:
    """Rows beyond the first `warmup`, a share of their budget."""
    return state.step >= (warmup * state.budget).floor()


def require_share(rule: str, name: str, value: float) -> None:
    """Raise unless `value` is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not 0 <= value < 1:
        raise CdlmError(f"{rule} needs a share 0 <= {name} < 1, got {value!r}")
