"""Halting rules for continuous models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cdlm.halting.criterion import Criterion, Memory, Stateless, require_count, require_positive
from cdlm.types import Decision, Rows, StepState


@dataclass(frozen=True)
class Patience(Criterion):
    """Halt after `steps` >= 1 consecutive steps without a token switch (DDLM, arXiv 2305.10818).

    A switch is an open position whose argmax differs from the step before; a row's first step switches everywhere, so
    the earliest halt is at step `steps` + 1.
    """

    steps: int

    def __post_init__(self) -> None:
        require_count("Patience", "steps", self.steps)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"switches"})

    def start(self, rows: Rows) -> Memory:
        return torch.zeros_like(rows.budget)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        quiet = torch.where(state.switches == 0, memory + 1, 0)
        return quiet, Decision(quiet >= self.steps, {"quiet_steps": quiet})


@dataclass(frozen=True)
class NormConvergence(Stateless):
    """Halt when the mean norm of x0 is within a share `delta` > 0 of the embedding norm: ||x0|| >= (1 - delta) rho.

    x0 averages embeddings of equal norm, so its norm reaches rho only when every position is decided.
    """

    delta: float

    def __post_init__(self) -> None:
        require_positive("NormConvergence", "delta", self.delta)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0_norm"})

    def decide(self, state: StepState) -> Decision:
        return Decision(state.x0_norm >= 1 - self.delta, {"x0_norm": state.x0_norm})


@dataclass(frozen=True)
class AngleConvergence(Stateless):
    """Halt when the score hardly turns any more: 1 - cos(score, score of the step before) <= `delta` > 0.

    The first step has no step before it and never halts. Early steps, where every prediction is the average token,
    hardly turn either: combine with `AfterStep` or `For`.
    """

    delta: float

    def __post_init__(self) -> None:
        require_positive("AngleConvergence", "delta", self.delta)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"score_cosine"})

    def decide(self, state: StepState) -> Decision:
        return Decision(1 - state.score_cosine <= self.delta, {"score_cosine": state.score_cosine})


@dataclass(frozen=True)
class FixedSteps(Stateless):
    """Halt at the `steps`-th step (from 1), whatever the model says: the control every adaptive rule has to beat."""

    steps: int

    def __post_init__(self) -> None:
        require_count("FixedSteps", "steps", self.steps)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def decide(self, state: StepState) -> Decision:
        return Decision(state.step + 1 >= self.steps)


@dataclass(frozen=True)
class Never(Stateless):
    """Never halt: the plain sampler."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def decide(self, state: StepState) -> Decision:
        return Decision(torch.zeros_like(state.step, dtype=torch.bool))
