"""Rules that read the tokens: which of them switch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cdlm.core.checks import check_whole
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory
from cdlm.halting.rules.sweeps import geometric_steps


@dataclass(frozen=True)
class Patience(Criterion):
    """Halt after `steps` >= 1 consecutive steps without a token switch (DDLM, arXiv 2305.10818).

    A switch is an open position whose argmax differs from the step before; a row's first step switches everywhere, so
    the earliest halt is at step `steps` + 1. A row in which nothing is open, as where a policy edits a full block, is
    left to the policy.
    """

    steps: int

    needs = frozenset({"switches"})

    def __post_init__(self) -> None:
        check_whole("Patience", steps=self.steps)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(steps, **fixed) for steps in geometric_steps(budget, 0.4, 0.01)]

    def start(self, rows: NewRows) -> Memory:
        return torch.zeros_like(rows.budget)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        quiet = torch.where(state.switches == 0, memory + 1, 0)
        return quiet, Decision((quiet >= self.steps) & state.open.any(1), info={"quiet_steps": quiet})
