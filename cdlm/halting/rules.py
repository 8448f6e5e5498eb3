"""Halting rules of the continuous literature, and of one masked model: all read the whole row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cdlm.errors import CdlmError
from cdlm.halting.criterion import Criterion, Memory, Stateless, require_count, require_number
from cdlm.types import Decision, Rows, StepState


def falling(high: float, low: float, count: int = 16) -> list[float]:
    """Thresholds in equal ratios, to three digits."""
    return [float(f"{x:.3g}") for x in np.geomspace(high, low, count)]


def step_counts(budget: int, high: float, low: float, count: int = 16) -> list[int]:
    """Whole numbers of steps from `high` to `low` shares of the budget, in equal ratios, falling."""
    return sorted({max(1, round(budget * share)) for share in falling(high, low, count)}, reverse=True)


@dataclass(frozen=True)
class Patience(Criterion):
    """Halt after `steps` >= 1 consecutive steps without a token switch (DDLM, arXiv 2305.10818).

    A switch is an open position whose argmax differs from the step before; a row's first step switches everywhere, so
    the earliest halt is at step `steps` + 1.
    """

    steps: int

    def __post_init__(self) -> None:
        require_count("Patience", "steps", self.steps)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(steps, **fixed) for steps in step_counts(budget, 0.4, 0.01)]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"switches"})

    def start(self, rows: Rows) -> Memory:
        return torch.zeros_like(rows.budget)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        quiet = torch.where(state.switches == 0, memory + 1, 0)
        return quiet, Decision(quiet >= self.steps, info={"quiet_steps": quiet})


@dataclass(frozen=True)
class Entropy(Stateless):
    """Halt when the mean entropy of the open positions falls below `nats` > 0 (DDLM, arXiv 2305.10818).

    The earliest halt is at the first step.
    """

    nats: float

    def __post_init__(self) -> None:
        require_number("Entropy", "nats", self.nats, above=0.0)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(nats, **fixed) for nats in falling(1.0, 1e-4, 25)[::-1]]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mean_entropy"})

    def decide(self, state: StepState) -> Decision:
        return Decision(state.mean_entropy < self.nats, info={"mean_entropy": state.mean_entropy})


@dataclass(frozen=True)
class KL(Stateless):
    """Halt when the mean over open positions of KL(p || p of the step before) falls below `nats` > 0 (DDLM).

    Early predictions are all the average token and hardly differ either, so nothing halts in the first `warmup`, a
    share in [0, 1) of the budget. The first step has none before it: the earliest halt is at step 2, or at the first
    one past the warm-up.
    """

    nats: float
    warmup: float = 0.2

    def __post_init__(self) -> None:
        require_number("KL", "nats", self.nats, above=0.0)
        require_share("KL", "warmup", self.warmup)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(nats, **fixed) for nats in falling(1e-2, 1e-8, 25)[::-1]]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mean_kl"})

    def decide(self, state: StepState) -> Decision:
        return Decision((state.mean_kl < self.nats) & past(self.warmup, state), info={"mean_kl": state.mean_kl})


@dataclass(frozen=True)
class NormConvergence(Stateless):
    """Halt when the mean norm of x0 is within a share `delta` > 0 of the embedding norm: ||x0|| >= (1 - delta) rho.

    x0 averages embeddings of equal norm, so its norm reaches rho only when every position is decided. The earliest
    halt is at the first step.
    """

    delta: float

    def __post_init__(self) -> None:
        require_number("NormConvergence", "delta", self.delta, above=0.0)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(delta, **fixed) for delta in falling(0.3, 1e-5, 25)[::-1]]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0_norm"})

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

    def __post_init__(self) -> None:
        require_number("AngleConvergence", "delta", self.delta, above=0.0)
        require_share("AngleConvergence", "warmup", self.warmup)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(delta, **fixed) for delta in falling(1e-2, 1e-6, 25)[::-1]]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"score_cosine"})

    def decide(self, state: StepState) -> Decision:
        turned = (1 - state.score_cosine <= self.delta) & past(self.warmup, state)
        return Decision(turned, info={"score_cosine": state.score_cosine})


@dataclass(frozen=True)
class StableAndConfident(Criterion):
    """Halt when no token switched for `stability_threshold` >= 0 steps and the mean entropy of the open positions is
    below `confidence_threshold` > 0 nats: the stopping rule of DiffusionGemma, with transformers' names and defaults.

    The earliest halt is at step `stability_threshold` + 1.
    """

    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def __post_init__(self) -> None:
        require_count("StableAndConfident", "stability_threshold", self.stability_threshold, least=0)
        require_number("StableAndConfident", "confidence_threshold", self.confidence_threshold, above=0.0)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(confidence_threshold=nats, **fixed) for nats in falling(1.0, 1e-4, 25)[::-1]]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"switches", "mean_entropy"})

    def start(self, rows: Rows) -> Memory:
        return torch.zeros_like(rows.budget)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        quiet = torch.where(state.switches == 0, memory + 1, 0)
        confident = state.mean_entropy < self.confidence_threshold
        halt = (quiet >= self.stability_threshold) & confident
        return quiet, Decision(halt, info={"quiet_steps": quiet, "mean_entropy": state.mean_entropy})


@dataclass(frozen=True)
class FixedSteps(Stateless):
    """Halt at the `steps`-th step (from 1), whatever the model says: the control every adaptive rule has to beat."""

    steps: int

    def __post_init__(self) -> None:
        require_count("FixedSteps", "steps", self.steps)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        counts = {max(1, round(budget * share)) for share in np.linspace(0.98, 0.2, 27)}
        return [cls(steps, **fixed) for steps in sorted(counts, reverse=True)]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def decide(self, state: StepState) -> Decision:
        return Decision(state.step + 1 >= self.steps)


@dataclass(frozen=True)
class Full(Stateless):
    """End when nothing may change any more, and otherwise never: the free rule that every other one includes.

    On a masked model it skips the steps for which a schedule has nothing left, and gives the same tokens. It costs no
    call to see that a row is full. On a continuous model only a rule that freezes can fill a row.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def decide(self, state: StepState) -> Decision:
        return Decision(torch.zeros_like(state.step, dtype=torch.bool))


@dataclass(frozen=True)
class Never(Full):
    """Never halt: the plain sampler with all its steps, also those in which nothing may change."""

    @property
    def waits(self) -> bool:
        return True


def past(warmup: float, state: StepState) -> torch.Tensor:
    """Rows beyond the first `warmup`, a share of their budget."""
    return state.step >= (warmup * state.budget).floor()


def require_share(rule: str, name: str, value: float) -> None:
    """Raise unless `value` is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not 0 <= value < 1:
        raise CdlmError(f"{rule} needs a share 0 <= {name} < 1, got {value!r}")
