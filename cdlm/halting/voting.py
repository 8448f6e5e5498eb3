"""Temporal self-consistency: every step of a run has a vote, and the answer with the most weight wins (arXiv
2508.09138).

A model may have had the right answer half-way and have lost it again. A vote costs no call and leaves the text as it
is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from cdlm.core.answers import PARSERS
from cdlm.core.checks import Settings, check_choice, check_number
from cdlm.core.trees import Columns

ReadAnswers = Callable[
    [Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"], Bool[np.ndarray, "b n"], str], Sequence[str | None]
]
"""(tokens, positions that are generated, positions that are no padding, name of a parser) -> the answer of each row,
None where its text has none."""

LARGEST_ALPHA = 500.0
"""Its exponential is a number, and so is the sum of many."""
ROUNDING = 1e-9
"""Of weights, as a share of their sum: more than float64 loses in it."""


@dataclass(frozen=True)
class Vote(Settings):
    """What step s = 0, 1, ... of T weighs: 1 if `fixed`, (s + 1) / T if `linear`, exp(alpha s / T) if `exponential`.

    T is the budget, the most steps that a sample may take; s counts over all blocks of a masked model.

    Args:
        weights: see above.
        alpha: of the exponential weights, from 0 to 500; 5 in the paper, 11 in one of its scripts.
        parser: what reads the answer of a text: "marked" (a number behind ####), "number" (the last one) or "boxed".
    """

    weights: Literal["fixed", "linear", "exponential"] = "exponential"
    alpha: float = 5.0
    parser: str = "marked"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_choice(name, ("fixed", "linear", "exponential"), weights=self.weights)
        check_number(name, least=0.0, most=LARGEST_ALPHA, alpha=self.alpha)
        check_choice(name, tuple(PARSERS), parser=self.parser)

    def weight(self, step: Int[np.ndarray, "*#b"], budget: Int[np.ndarray, "*#b"]) -> Float[np.ndarray, " ..."]:
        """What steps weigh in runs of these budgets."""
        if self.weights == "fixed":
            return np.ones(np.broadcast_shapes(step.shape, budget.shape))
        return (step + 1) / budget if self.weights == "linear" else np.exp(self.alpha * step / budget)

    def left(self, step: int, budget: int) -> float:
        """What all steps after this one weigh together."""
        return float(self.weight(np.arange(step + 1, budget), np.array(budget)).sum())

    def decided(self, votes: Mapping[str, float], step: int, budget: int) -> bool:
        """Whether no vote after this step can change which answer wins."""
        left = self.left(step, budget)
        # The sums are rounded: what is decided by less than that may be a tie, which an earlier answer wins.
        return lead(votes) > left + ROUNDING * (left + sum(votes.values()))


def winner(votes: Mapping[str, float]) -> str | None:
    """The answer with the largest weight, of equals the one that was seen first; None without any."""
    return max(votes, key=lambda answer: votes[answer], default=None)


def lead(votes: Mapping[str, float]) -> float:
    """Weight of the winner less that of the next; 0 without votes."""
    first, second = sorted([*votes.values(), 0.0, 0.0], reverse=True)[:2]
    return first - second


def semantic_entropy(votes: Mapping[str, float]) -> float:
    """Temporal semantic entropy, in nats: that of the shares of the answers; 0 if all agree, or there is none."""
    total = sum(votes.values())
    return sum((x / total * math.log(total / x) for x in votes.values() if x > 0), 0.0)


@dataclass(frozen=True, eq=False)
class Ballots(Columns):
    """The votes of rows so far."""

    votes: list[dict[str, float]]
    """Of each row the weight of every answer, in the order in which they were first seen."""

    @staticmethod
    def of(rows: int) -> Ballots:
        """Of rows that enter."""
        return Ballots([{} for _ in range(rows)])

    def cast(self, answers: Sequence[str | None], weights: Float[np.ndarray, " b"]) -> Ballots:
        """With one more step, whose votes weigh so much; a row without an answer has none."""
        rows = zip(self.votes, answers, weights.tolist(), strict=True)
        return Ballots(
            [
                votes if answer is None else {**votes, answer: votes.get(answer, 0.0) + weight}
                for votes, answer, weight in rows
            ]
        )
