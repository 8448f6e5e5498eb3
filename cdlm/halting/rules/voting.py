"""A rule that halts when the vote of the steps on the answer is decided."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from cdlm.core.devices import fine
from cdlm.core.errors import CdlmError
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory
from cdlm.halting.voting import Ballots, ReadAnswers, Vote, lead, semantic_entropy


class Polled(NamedTuple):
    """What is remembered of each row."""

    ballots: Ballots
    generated: Bool[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]


@dataclass(frozen=True)
class VoteDecided(Vote, Criterion):
    """Halt when the vote of the steps on the answer is decided: the lead of the first answer over the next exceeds what
    all steps that are left weigh together.

    The vote is that of temporal self-consistency (arXiv 2508.09138); to halt by it is ours. The winner of the full vote
    is then known, so the voted answer is that of the full run; the text is the one of this step, and need not have
    that answer. The earliest halt is when more than half of all weight is cast; where no step has an answer, there is
    none. Of a model that generates in blocks, each block has a vote of its own.

    Args:
        weights, alpha, parser: see `cdlm.halting.voting.Vote`.
    """

    weights: Literal["fixed", "linear", "exponential"] = "exponential"
    alpha: float = 5.0
    parser: str = "marked"
    _read: ReadAnswers | None = field(default=None, init=False, repr=False, compare=False)

    needs = frozenset({"tokens"})

    def reading(self, read: ReadAnswers) -> Criterion:
        bound = copy(self)
        object.__setattr__(bound, "_read", read)
        return bound

    def start(self, rows: NewRows) -> Memory:
        if self._read is None:
            raise CdlmError(f"{self!r} reads the answers of texts, and there is no tokenizer here: give the model one")
        return Polled(Ballots.of(len(rows.budget)), rows.open, rows.valid)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        assert self._read is not None
        tokens, generated, valid = (part.cpu().numpy() for part in (state.tokens, memory.generated, memory.valid))
        step, budget = state.step.cpu().numpy(), state.budget.cpu().numpy()
        answers = self._read(tokens, generated, valid, self.parser)
        ballots = memory.ballots.cast(answers, self.weight(step, budget))
        rows = list(zip(ballots.votes, step.tolist(), budget.tolist(), strict=True))
        halt = torch.tensor([self.decided(*row) for row in rows], dtype=torch.bool, device=state.open.device)
        leads = [lead(votes) / max(sum(votes.values()), np.finfo(float).tiny) for votes in ballots.votes]
        info = {"lead": leads, "semantic_entropy": [semantic_entropy(votes) for votes in ballots.votes]}
        device = state.open.device
        logged = {name: torch.tensor(values, dtype=fine(device), device=device) for name, values in info.items()}
        return memory._replace(ballots=ballots), Decision(halt, info=logged)
