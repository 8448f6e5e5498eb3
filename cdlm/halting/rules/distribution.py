"""Rules that read the predicted distribution: entropy and Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cdlm.core.checks import check_number, check_whole
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory, Stateless
from cdlm.halting.rules.sweeps import geometric_thresholds, past_warmup


@dataclass(frozen=True)
class Entropy(Stateless):
    """Halt when the mean entropy of the open positions falls below `nats` > 0 (DDLM, arXiv 2305.10818).

    The earliest halt is at the first step.
    """

    nats: float

    needs = frozenset({"mean_entropy"})

    def __post_init__(self) -> None:
        check_number("Entropy", above=0.0, nats=self.nats)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(nats, **fixed) for nats in geometric_thresholds(1.0, 1e-4, 25)[::-1]]

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

    needs = frozenset({"mean_kl"})

    def __post_init__(self) -> None:
        check_number("KL", above=0.0, nats=self.nats)
        check_number("KL", least=0.0, below=1.0, warmup=self.warmup)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(nats, **fixed) for nats in geometric_thresholds(1e-2, 1e-8, 25)[::-1]]

    def decide(self, state: StepState) -> Decision:
        return Decision((state.mean_kl < self.nats) & past_warmup(self.warmup, state), info={"mean_kl": state.mean_kl})


@dataclass(frozen=True)
class StableAndConfident(Criterion):
    """Halt when no token switched for `stability_threshold` >= 0 steps and the mean entropy of the open positions is
    below `confidence_threshold` > 0 nats: the stopping rule of DiffusionGemma, with transformers' names and defaults.

    The earliest halt is at step `stability_threshold` + 1.
    """

    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    needs = frozenset({"switches", "mean_entropy"})

    def __post_init__(self) -> None:
        check_whole("StableAndConfident", least=0, stability_threshold=self.stability_threshold)
        check_number("StableAndConfident", above=0.0, confidence_threshold=self.confidence_threshold)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(confidence_threshold=nats, **fixed) for nats in geometric_thresholds(1.0, 1e-4, 25)[::-1]]

    def start(self, rows: NewRows) -> Memory:
        return torch.zeros_like(rows.budget)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        quiet = torch.where(state.switches == 0, memory + 1, 0)
        confident = state.mean_entropy < self.confidence_threshold
        halt = (quiet >= self.stability_threshold) & confident
        return quiet, Decision(halt, info={"quiet_steps": quiet, "mean_entropy": state.mean_entropy})
