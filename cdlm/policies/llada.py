"""The sampler of LLaDA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import MOST_STEPS, check_choice, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.rng import ORDER, Site
from cdlm.core.types import Constants
from cdlm.policies.policy import (
    Choice,
    Plan,
    Policy,
    View,
    check_blocks,
    proposal,
)
from cdlm.policies.quotas import best, even


@dataclass(frozen=True)
class LLaDA(Policy):
    """The sampler of LLaDA (arXiv 2502.09992): an even quota a step, the most confident first, block by block.

    Args:
        steps: over all blocks, a multiple of their number; None commits one position a step.
        block: positions of a block, a divisor of the length; by default one block.
        remasking: "low_confidence" ranks by the probability of the proposal, "random" draws the order.
        no_eos: the end-of-text token is never proposed (published as logits_eos_inf).
        eos_last: proposals of the ends of text and turn rank last (confidence_eos_eot_inf).
        eot_only: quirk: above temperature 0 eos_last holds for the end of a turn alone, as published.
        block_quota: quirk: quotas do not count what is open before the first block, which then stays open.
    """

    steps: int | None = None
    block: int | None = None
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    no_eos: bool = False
    eos_last: bool = False
    eot_only: bool = False
    block_quota: bool = False

    def __post_init__(self) -> None:
        check_whole("LLaDA", optional=True, largest=MOST_STEPS, steps=self.steps)
        check_whole("LLaDA", optional=True, block=self.block)
        check_choice("LLaDA", ("low_confidence", "random"), remasking=self.remasking)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(steps, **fixed) for steps in (64, 32, 16, 8, 4)]

    @property
    def masked_only(self) -> str:
        switches = ("no_eos", "eos_last", "eot_only", "block_quota")
        return next((name for name in switches if getattr(self, name)), "")

    @property
    def draws(self) -> bool:
        return self.remasking == "random"

    def suppressed(self, constants: Constants) -> tuple[int, ...]:
        return (_end(constants, "no_eos"),) if self.no_eos else ()

    def check(self, length: int, constants: Constants) -> None:
        self.check_layout(length)
        if self.eos_last:
            _end(constants, "eos_last")

    def check_layout(self, length: int) -> None:
        """Raise unless blocks and steps fit rows that generate `length` positions."""
        check_blocks("LLaDA", length, self.block, self.steps)

    def due(
        self, block_of: Int[Tensor, "b n"], block: Int[Tensor, " b"], open_: Bool[Tensor, "b n"]
    ) -> Int[Tensor, " b"]:
        if self.block_quota:
            return (open_ & (block_of == block[:, None])).sum(1)
        return super().due(block_of, block, open_)

    def schedule(self, blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        # One step a block at least: on a continuous model nobody checks that the blocks divide the steps.
        return None if self.steps is None else (self.steps // blocks).clamp(min=1)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks if self.steps is None else torch.full_like(masks, self.steps)

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        if self.remasking == "random":
            confidence = view.draws.uniform(view.site, ORDER)
        elif self.eos_last:
            confidence = self._without_ends(view, tokens)
        return Choice(best(confidence, view.candidates, self.quota(view.plan)), tokens)

    def quota(self, plan: Plan) -> Int[Tensor, " b"]:
        """Positions to commit at this step."""
        return torch.ones_like(plan.inner) if plan.steps is None else even(plan.masks, plan.steps, plan.inner)

    def _without_ends(self, view: View, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Probability of each proposal when there are no ends: 0 for them, and more for the others."""
        assert view.constants is not None
        ends = [view.constants.eos_id, view.constants.eot_id]
        held = ends[1:] if self.eot_only and view.temperature > 0 else ends
        without = [end for end in held if end is not None]

        def chance(logits: Tensor, site: Site, chosen: Tensor) -> tuple[Tensor, Tensor]:
            logits[:, without] = -torch.inf
            return chosen, logits.softmax(-1).gather(1, chosen[:, None]).squeeze(1)

        return view.of_candidates(chance, tokens)[1]


def _end(constants: Constants, switch: str) -> int:
    if constants.eos_id is None:
        raise CdlmError(f"LLaDA's {switch} needs a model with an end-of-text token: give eos_id")
    return constants.eos_id
