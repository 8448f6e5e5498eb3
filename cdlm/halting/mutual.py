"""When a position is settled by what it says and how it got there: LESS's test, for a halting rule and a policy.

LESS (arXiv 2606.16908) was known here by its abstract and second-hand summaries alone, and no code of its authors was
found. Ours: `TOP`, the number of tokens that a divergence tells apart; what the persistence counts; and which of the
eligible positions a policy commits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cdlm.core.checks import check_number, check_whole


class Run(NamedTuple):
    """For how long each position has kept its most likely token."""

    tokens: Int[Tensor, "b n"]
    steps: Int[Tensor, "b n"]
    """This one included; 0 where a position is not open, so that one that is opened again begins anew."""

    @staticmethod
    def of(open_: Bool[Tensor, "b n"]) -> Run:
        """Of rows that enter."""
        nothing = torch.zeros_like(open_, dtype=torch.int64)
        return Run(nothing - 1, nothing)

    def after(self, tokens: Int[Tensor, "b n"], open_: Bool[Tensor, "b n"]) -> Run:
        """After one more step, at which these are the most likely tokens."""
        return Run(tokens, torch.where(open_, torch.where(tokens == self.tokens, self.steps + 1, 1), 0))


class Settled:
    """The test of LESS: a confident token, the same for some steps, and a distribution that hardly moves.

    Of a class with the fields that it reads.
    """

    confidence: float
    persistence: int
    nats: float

    def check_test(self) -> None:
        """Raise for settings out of their ranges."""
        name = type(self).__name__
        check_number(name, least=0.0, most=1.0, confidence=self.confidence)
        check_whole(name, persistence=self.persistence)
        check_number(name, least=0.0, infinite=True, nats=self.nats)

    def settled(
        self, confidence: Float[Tensor, "*s"], steps: Int[Tensor, "*s"], jsd: Float[Tensor, "*s"]
    ) -> Bool[Tensor, "*s"]:
        """Where all three hold.

        Args:
            confidence: probability of the most likely token.
            steps: for which it has been the same, this one included.
            jsd: divergence from the step before, infinite without one.
        """
        return (confidence >= self.confidence) & (steps >= self.persistence) & (jsd <= self.nats)


CONFIDENCES = (0.9999, 0.999, 0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3)
"""To sweep, from strict to loose."""


def leftmost_run(chosen: Bool[Tensor, "b n"], candidates: Bool[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """The first of the chosen candidates, and those that follow it until a candidate is not chosen."""
    begun = chosen.cumsum(1) > 0
    over = (candidates & ~chosen & begun).cumsum(1) > 0
    return chosen & ~over


def least(values: Shaped[Tensor, "b n"], over: Bool[Tensor, "b n"]) -> Shaped[Tensor, " b"]:
    """The least value of each row."""
    return values.masked_fill(~over, torch.iinfo(values.dtype).max).amin(1)
