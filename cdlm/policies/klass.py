"""Commit positions that are confident and stable (KLASS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cdlm.core.checks import check_number, check_whole
from cdlm.policies.policy import LIGHT, Choice, Policy, View, proposal
from cdlm.policies.quotas import best


@dataclass(frozen=True)
class KLASS(Policy):
    """Commit what is confident and has been stable for two steps, else the most confident one (arXiv 2511.05664).

    Stable: KL(p || p of the step before) below `nats` at both. Nothing is before a row's first step.

    Args:
        confidence: least probability of the proposal, exceeded, in [0, 1].
        nats: >= 0.
        block: positions of a block; by default one block.
    """

    confidence: float = 0.6
    nats: float = 0.015
    block: int | None = None

    needs = LIGHT | {"mean_kl"}

    def __post_init__(self) -> None:
        check_number("KLASS", least=0.0, most=1.0, confidence=self.confidence)
        check_number("KLASS", least=0.0, infinite=True, nats=self.nats)
        check_whole("KLASS", optional=True, block=self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        confidence = float(fixed.pop("confidence", 0.6))
        return [cls(confidence, nats, **fixed) for nats in (1e-5, 1e-4, 1e-3, 0.005, 0.015, 0.05, 0.2, 1.0)]

    @property
    def tokenwise(self) -> bool:
        return False

    def start(self, tokens: Int[Tensor, "b n"], last: Int[Tensor, " b"]) -> Any:
        return torch.full(tokens.shape, torch.inf, device=tokens.device)

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        kl = view.statistics.kl.float()
        stable = (kl < self.nats) & (view.plan.own < self.nats)
        ready = view.candidates & stable & (confidence > self.confidence)
        alone = best(confidence, view.candidates, torch.full_like(view.row, view.least))
        return Choice(torch.where(ready.any(1, keepdim=True), ready, alone), tokens, kl)
