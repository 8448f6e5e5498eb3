"""Rules that read the state in embedding space: norms, angles, and how far an estimate is from a fixed point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdlm.core.checks import check_flag, check_number, check_whole
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory, Stateless
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


@dataclass(frozen=True)
class FixedPoint(Criterion):
    """Halt after `steps` >= 1 consecutive steps whose residual is below `delta` > 0.

    The residual is how far an estimate lies from the one that the prediction was shown: the mean over open positions of
    ||x0 - shown||^2 in squared embedding norms. Self-conditioning is a fixed-point iteration on the estimate, and this
    is its residual (arXiv 2607.00714). At the first levels an estimate knows nothing, and does not move either. With
    `relative`, `delta` < 1 is a share of the row's largest residual until now, so that no row halts before its estimate
    has moved. Without it, let the rule begin later (`FromStep`).

    A model without self-conditioning is shown nothing: there it is the change of
    the estimate since the step before. A row's first step has none with one pass a level, so that the earliest halt is
    at step `steps` + 1; with more `passes`, at step `steps`.
    """

    delta: float
    steps: int = 1
    relative: bool = False

    needs = frozenset({"residual"})

    def __post_init__(self) -> None:
        check_flag("FixedPoint", relative=self.relative)
        check_number("FixedPoint", above=0.0, below=1.0 if self.relative else math.inf, delta=self.delta)
        check_whole("FixedPoint", steps=self.steps)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        low = 1e-4 if fixed.get("relative") else 1e-6
        return [cls(delta, **fixed) for delta in geometric_thresholds(0.3, low, 25)[::-1]]

    def start(self, rows: NewRows) -> Memory:
        nothing = torch.zeros_like(rows.budget)
        return Near(nothing, nothing.float())

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        residual = state.residual
        largest = torch.maximum(memory.largest, torch.where(residual.isinf(), 0, residual))
        below = residual < (self.delta * largest if self.relative else self.delta)
        near = torch.where(below, memory.steps + 1, 0)
        return Near(near, largest), Decision(near >= self.steps, info={"residual": residual, "near_steps": near})


class Near(NamedTuple):
    """What `FixedPoint` remembers of each row.

    Args:
        steps: whose residual was small, in a row until now.
        largest: residual until now; 0 before the first.
    """

    steps: Int[Tensor, " b"]
    largest: Float[Tensor, " b"]
