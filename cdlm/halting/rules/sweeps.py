"""What the rules share: thresholds to sweep, and the warm-up in which nothing halts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from cdlm.core.types import StepState


def geometric_thresholds(high: float, low: float, count: int = 16) -> list[float]:
    """`count` thresholds from `high` to `low` in equal ratios, to three digits."""
    return [float(f"{x:.3g}") for x in np.geomspace(high, low, count)]


def geometric_steps(budget: int, high: float, low: float, count: int = 16) -> list[int]:
    """Whole numbers of steps, >= 1 and falling, from the share `high` of the budget to `low` in equal ratios."""
    return sorted({max(1, round(budget * share)) for share in geometric_thresholds(high, low, count)}, reverse=True)


def past_warmup(warmup: float, state: StepState) -> Bool[Tensor, " b"]:
    """Rows that have taken the first `warmup` of their steps, a share of their budget."""
    return state.step >= (warmup * state.budget).floor()
