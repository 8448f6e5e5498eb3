"""Rules that read the state in embedding space: norms and angles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdlm.core.checks import check_number
from cdlm.core.types import Decision, StepState
from cdlm.halting.criterion import Criterion, Stateless
from cdlm.halting.rules.sweeps import geometric_thresholds, past_warmup


@dataclass(frozen=True)
class NormConvergence(Stateless):
    """Halt when the mean norm of x0 is within a share `delta` > 0 of the embedding norm: ||x0|| >= (1 - delta) rho.

    x0 averages embeddings of equal norm, so its norm reaches rho only when every position is decided. The earliest
    halt is at the first step.
    """

    delta: float

    needs = frozenset({"x0_norm"})

    def __post_init__(self) -> None:
        check_number("NormConvergence", above=0.0, delta=self.delta)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(delta, **fixed) for delta in geometric_thresholds(0.3, 1e-5, 25)[::-1]]

    def decide(self, state: StepState) -> Decision:
        return Decision(state.x0_norm >= 1 - self.delta, info={"x0_norm": state.x0_norm})


@dataclass(frozen=True)
class AngleConvergence(Stateless):
    """Halt when the score hardly turns any more: 1 - cos(score, score of the step before) <= `delta` > 0.

    Early steps, where every prediction is the average token, hardly turn either, so nothing halts in the first
    `warmup`, a share in [0, 1) of the budget. The first step has none before it: the earliest halt is at step 2, or at
    the first one past the warm-up.
    """

    delta: float
    warmup: float = 0.2

    needs = frozenset({"score_cosine"})

    def __post_init__(self) -> None:
        check_number("AngleConvergence", above=0.0, delta=self.delta)
        check_number("AngleConvergence", least=0.0, below=1.0, warmup=self.warmup)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(delta, **fixed) for delta in geometric_thresholds(1e-2, 1e-6, 25)[::-1]]

    def decide(self, state: StepState) -> Decision:
        turned = (1 - state.score_cosine <= self.delta) & past_warmup(self.warmup, state)
        return Decision(turned, info={"score_cosine": state.score_cosine})
