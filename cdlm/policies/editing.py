"""Commit what is confident, and write over tokens of the block that the model would now choose otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cdlm.core.checks import check_number, check_whole
from cdlm.policies.policy import Choice, Policy, View, proposal
from cdlm.policies.quotas import best


@dataclass(frozen=True)
class Editing(Policy):
    """Commit every position above a probability, else the most confident one; replace committed tokens of the block
    whose best token is another one with a probability above another threshold (as LLaDA2.1 is decoded).

    A block that is full is passed over again until a pass edits nothing, `passes` times at most. A model that was not
    trained to correct itself mostly repeats what it sees at a committed position, and edits little.

    Args:
        tau: probability to commit at, exceeded; in [0, 1].
        edit: probability to replace at, exceeded; in [0, 1]. At 1 nothing is replaced.
        passes: over a block that is full, >= 0.
        block: positions of a block; by default one block.
    """

    tau: float = 0.95
    edit: float = 0.9
    passes: int = 16
    block: int | None = None

    def __post_init__(self) -> None:
        check_number("Editing", least=0.0, most=1.0, tau=self.tau, edit=self.edit)
        check_whole("Editing", least=0, passes=self.passes)
        check_whole("Editing", optional=True, block=self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(tau, **fixed) for tau in (0.999, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)]

    @property
    def masked_only(self) -> str:
        return "edit"

    @property
    def tokenwise(self) -> bool:
        return False

    @property
    def revises(self) -> bool:
        return True

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks + self.passes * blocks

    def start(self, tokens: Int[Tensor, "b n"], last: Int[Tensor, " b"]) -> Any:
        return torch.zeros_like(last)  # passes over the block since it is full

    def choose(self, view: View) -> Choice:
        statistics, plan = view.statistics, view.plan
        tokens, confidence = proposal(view)
        sure = view.candidates & (confidence > self.tau)
        alone = best(confidence, view.candidates, torch.ones_like(view.row))
        commit = torch.where(sure.any(1, keepdim=True), sure, alone)
        held, found = statistics.held, statistics.plane(statistics.best)
        assert held is not None
        own = statistics.target & ~statistics.open & (plan.block_of == plan.block[:, None])
        edits = own & (found != held) & (statistics.chance > self.edit)
        full = ~view.candidates.any(1)
        passes = torch.where(plan.inner == 0, 0, plan.own) + full
        fills = (commit == view.candidates).all(1)
        again = fills & (passes < self.passes) & (edits.any(1) | ~full)
        return Choice(commit | edits, torch.where(edits, found, tokens), passes, again=again)
