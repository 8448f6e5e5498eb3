"""Halting rules of the continuous literature, and of one masked model: all read the whole row."""

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
    """Halt at the `steps`-th step (from 1), whatever the model says: the control every adaptive rule has to beat."""

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
    """End when nothing may change any more, and otherwise never: the free rule that every other one includes.

    On a masked model it skips the steps for which a schedule has nothing left, and gives the same tokens. It costs no
    call to see that a row is full. On a continuous model only a rule that freezes can fill a row.
    """

    def decide(self, state: StepState) -> Decision:
        return Decision(torch.zeros_like(state.step, dtype=torch.bool))


@dataclass(frozen=True)
class Never(Full):
    """Never halt: the plain sampler with all its steps, also those in which nothing may change."""

    waits = True
