"""Commit every position that is confident enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdlm.core.checks import check_number, check_whole
from cdlm.core.devices import refined
from cdlm.policies.policy import (
    Choice,
    Policy,
    View,
    proposal,
)
from cdlm.policies.quotas import best, ranked


@dataclass(frozen=True)
class Threshold(Policy):
    """Commit every position of the block with a probability of at least `tau`, and always the best (Fast-dLLM).

    arXiv 2505.22618, section 3.2. There is no schedule: a block takes the steps that it takes.

    Args:
        tau: least probability, in [0, 1].
        block: positions of a block; by default one block.
        calls: quirk: a block is left after so many steps, full or not (Fast-dLLM's dual cache since 2026).
    """

    spared = frozenset({"logsumexp"})

    tau: float = 0.9
    block: int | None = None
    calls: int | None = None

    def __post_init__(self) -> None:
        check_number("Threshold", least=0.0, most=1.0, tau=self.tau)
        check_whole("Threshold", optional=True, block=self.block, calls=self.calls)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        taus = (0.999, 0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        return [cls(tau, **fixed) for tau in taus]

    def schedule(self, blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        return None if self.calls is None else torch.full_like(blocks, self.calls)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks if self.calls is None else blocks * self.calls

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view, self.tau)
        count = (view.candidates & (confidence >= self.tau)).sum(1).clamp(min=view.least)
        return Choice(best(confidence, view.candidates, count), tokens)


@dataclass(frozen=True)
class FallingThreshold(Policy):
    """Commit every position whose probability is at least a threshold that falls with the noise that is left.

    It falls from `first` to `last`, linearly in the log of the level, between the levels `begin` and `end`, and stays
    the same outside. A row whose last positions never become sure then ends early on a continuous model, whose other
    calls would move these positions alone; on a masked one, its last positions are committed together.

    Args:
        first, last: least probabilities, in [0, 1].
        begin, end: levels, begin > end > 0: of a continuous model noise levels in embedding norms, of a masked one
            shares of the positions that are open.
        block: positions of a block; by default one block.
    """

    spared = frozenset({"logsumexp"})

    first: float = 0.95
    last: float = 0.0
    begin: float = 1.5
    end: float = 0.6
    block: int | None = None

    def __post_init__(self) -> None:
        check_number("FallingThreshold", least=0.0, most=1.0, first=self.first, last=self.last)
        check_number("FallingThreshold", above=0.0, end=self.end)
        check_number("FallingThreshold", above=self.end, begin=self.begin, hint="the level falls from begin to end")
        check_whole("FallingThreshold", optional=True, block=self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(first, **fixed) for first in (0.999, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)]

    def tau(self, level: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The threshold at these levels, float64."""
        way = (refined(level) / self.begin).log() / math.log(self.end / self.begin)
        return self.first + (self.last - self.first) * way.clamp(0, 1)

    def choose(self, view: View) -> Choice:
        tau = self.tau(view.level)
        tokens, confidence = proposal(view, tau)
        count = (view.candidates & (confidence >= tau[:, None])).sum(1).clamp(min=view.least)
        return Choice(best(confidence, view.candidates, count), tokens)


@dataclass(frozen=True)
class Factor(Policy):
    """Commit the best n positions of the block, for the largest n with (k + 1) (1 - p_k) <= f at each rank 2 to n.

    Fast-dLLM's factor rule (arXiv 2505.22618, theorem 1): as many as a greedy sequential decoder would agree with when
    f = 1. The best is always committed.

    Args:
        f: > 0; larger commits more.
        block: positions of a block; by default one block.
        last_rank: quirk: the first position that fails is committed too if it is the last one, as published.
    """

    f: float = 1.0
    block: int | None = None
    last_rank: bool = False

    def __post_init__(self) -> None:
        check_number("Factor", above=0.0, f=self.f)
        check_whole("Factor", optional=True, block=self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(f, **fixed) for f in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)]

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        p = confidence.gather(1, ranked(confidence, view.candidates))
        rank = torch.arange(1, p.shape[1] + 1, device=p.device)
        there = rank <= view.candidates.sum(1, keepdim=True)
        passes = there & ((p >= 1 - self.f / (rank + 1)) | (rank <= view.least))
        count = passes.cumprod(1).sum(1)
        if self.last_rank:
            count = count + (count == view.candidates.sum(1) - 1)
        return Choice(best(confidence, view.candidates, count), tokens)
