"""Rules that read nothing of the prediction: only the step, or whether the row is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cdlm.core.checks import check_whole
from cdlm.core.types import Decision, StepState
from cdlm.halting.criterion import Criterion, Stateless


@dataclass(frozen=True)
class FixedSteps(Stateless):
    """Halt at the `steps`-th step (from 1), whatever is predicted: the control that adaptive rules have to beat."""

    steps: int

    def __post_init__(self) -> None:
        check_whole("FixedSteps", steps=self.steps)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        counts = {max(1, round(budget * share)) for share in np.linspace(0.98, 0.2, 27)}
        return [cls(steps, **fixed) for steps in sorted(counts, reverse=True)]

    def decide(self, state: StepState) -> Decision:
        return Decision(state.step + 1 >= self.steps)


@dataclass(frozen=True)
class Full(Stateless):
    """End a row when nothing in it may change any more, and never before. Every other rule does this too.

    On a masked model it skips the steps for which a schedule has nothing left, and gives the same tokens. On a
    continuous model a row is full only if a rule freezes its positions.
    """

    def decide(self, state: StepState) -> Decision:
        return Decision(torch.zeros_like(state.step, dtype=torch.bool))


@dataclass(frozen=True)
class Never(Full):
    """Never halt: the plain sampler with all its steps, also those in which nothing can change."""

    waits = True
