"""Commit as many positions as their entropies allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from cdlm.core.checks import check_number, check_whole
from cdlm.policies.policy import LIGHT, Choice, Policy, View, proposal
from cdlm.policies.quotas import best, ranked


@dataclass(frozen=True)
class EntropyBound(Policy):
    """Commit the longest run of the most confident positions whose entropies, all but the largest, sum to `nats`.

    The bound of EB-Sampler (arXiv 2505.24857) on what positions that are committed together can tell of one another.

    Args:
        nats: >= 0; 0 commits one position a step (or several that are certain), infinity all of the block.
        block: positions of a block; by default one block.
    """

    nats: float = 0.001
    block: int | None = None

    needs = LIGHT | {"entropy"}

    def __post_init__(self) -> None:
        check_number("EntropyBound", least=0.0, infinite=True, nats=self.nats)
        check_whole("EntropyBound", optional=True, block=self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(nats, **fixed) for nats in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)]

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        bounded = entropy_bounded(view.statistics.entropy, confidence, view.candidates, self.nats, view.least)
        return Choice(bounded, tokens)


def entropy_bounded(
    entropy: Float[Tensor, "b q"],
    score: Float[Tensor, "b q"],
    candidates: Bool[Tensor, "b q"],
    nats: float,
    least: int = 1,
) -> Bool[Tensor, "b q"]:
    """The longest prefix of the candidates by falling score with sum H - max H <= nats, at least one; of none at least
    with sum H <= nats, as a single position is committed for its own entropy alone."""
    order = ranked(score, candidates)
    h = entropy.gather(1, order)
    cost = h.cumsum(1) - h.cummax(1).values * (least > 0)
    count = (candidates.gather(1, order) & (cost <= nats)).cumprod(1).sum(1)
    return best(score, candidates, count.clamp(min=least))
