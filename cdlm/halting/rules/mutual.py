"""A rule that reads confidence, persistence and drift together (LESS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory
from cdlm.halting.mutual import Run, Settled, least
from cdlm.halting.rules.sweeps import geometric_thresholds


@dataclass(frozen=True)
class Mutual(Settled, Criterion):
    """Halt when every open position is confident, keeps its token and hardly moves (after LESS, arXiv 2606.16908).

    LESS commits single positions so, which the policy of the same name does; that a row halts when all of them pass the
    test is ours. Built from second-hand sources: see `cdlm.halting.mutual`. The first step has none before it: the
    earliest halt is at step 2, or at the first with `persistence=1` and infinite `nats`.

    Args:
        confidence: least probability of the most likely token, in [0, 1]; 0 leaves it out.
        persistence: steps for which this token must have been the same, the present one included; 1 leaves it out.
        nats: largest Jensen-Shannon divergence from the step before, >= 0; above ln 2 it only asks for a step before,
            and infinity leaves it out.
    """

    confidence: float = 0.75
    persistence: int = 2
    nats: float = 0.04

    needs = frozenset({"tokens", "min_confidence", "max_jsd"})

    def __post_init__(self) -> None:
        self.check_test()

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(round(1 - x, 6), **fixed) for x in geometric_thresholds(1e-5, 0.99, 25)]

    def start(self, rows: NewRows) -> Memory:
        return Run.of(rows.open)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        memory = memory.after(state.tokens, state.open)
        kept = least(memory.steps, state.open)
        info = {"min_confidence": state.min_confidence, "max_jsd": state.max_jsd, "kept_steps": kept}
        passes = self.settled(state.min_confidence, kept, state.max_jsd)
        # A policy that revises goes over rows in which nothing is open: of none there is nothing to say.
        return memory, Decision(passes & state.open.any(1), info=info)
