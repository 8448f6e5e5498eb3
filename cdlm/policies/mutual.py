"""Commit positions that are confident, keep their token and hardly move (LESS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from cdlm.core.checks import check_choice, check_flag, check_whole
from cdlm.halting.mutual import CONFIDENCES, Run, Settled, leftmost_run
from cdlm.policies.policy import LIGHT, Choice, Policy, View, proposal
from cdlm.policies.quotas import best


@dataclass(frozen=True)
class Mutual(Settled, Policy):
    """Commit what is confident, keeps its most likely token and hardly moves, else the most confident (arXiv
    2606.16908, LESS).

    Built from second-hand sources: see `cdlm.halting.mutual`. Ours is what `frontier` says. Nothing is before a row's
    first step, so that it commits the most confident position alone.

    Args:
        confidence: least probability of the most likely token, in [0, 1]; 0 leaves it out.
        persistence: steps for which this token must have been the same, the present one included; 1 leaves it out.
        nats: largest Jensen-Shannon divergence from the step before, >= 0; above ln 2 it only asks for a step before,
            and infinity leaves it out.
        commit: "frontier" commits the first position that passes, from the left, and those behind it up to the first
            open one that does not; "parallel" all that pass.
        exempt_first: at a row's first step confidence alone decides.
        block: positions of a block; by default one block.
    """

    confidence: float = 0.75
    persistence: int = 2
    nats: float = 0.04
    commit: Literal["frontier", "parallel"] = "frontier"
    exempt_first: bool = False
    block: int | None = None

    needs = LIGHT | {"max_jsd"}

    def __post_init__(self) -> None:
        self.check_test()
        check_choice("Mutual", ("frontier", "parallel"), commit=self.commit)
        check_flag("Mutual", exempt_first=self.exempt_first)
        check_whole("Mutual", optional=True, block=self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(confidence, **fixed) for confidence in CONFIDENCES]

    @property
    def tokenwise(self) -> bool:
        return False

    def start(self, tokens: Int[Tensor, "b n"], last: Int[Tensor, " b"]) -> Any:
        return Run.of(torch.zeros_like(tokens, dtype=torch.bool))

    def choose(self, view: View) -> Choice:
        statistics = view.statistics
        run, sure = view.plan.own.after(statistics.tokens, statistics.open), statistics.chance
        passes = self.settled(sure, run.steps, statistics.jsd)
        if self.exempt_first:
            passes = passes | ((view.step == 0)[:, None] & (sure >= self.confidence))
        passes = passes & view.candidates
        if self.commit == "frontier":
            passes = leftmost_run(passes, view.candidates)
        alone = best(sure, view.candidates, torch.full_like(view.row, view.least))
        tokens, _ = proposal(view)
        return Choice(torch.where(passes.any(1, keepdim=True), passes, alone), tokens, run)
