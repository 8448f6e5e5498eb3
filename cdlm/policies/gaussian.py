"""LLaDA's sampler with the blocks and quotas of EDIT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cdlm.core.checks import MOST_STEPS, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Plan, check_blocks
from cdlm.policies.quotas import gaussian


@dataclass(frozen=True)
class Gaussian(LLaDA):
    """LLaDA's sampler with a bell over the steps of a block in place of an even quota, and a first block of its own
    (EDIT, arXiv 2512.00670).

    The bell has its top after 1 / center of the steps and a width of 1 / std of them, so that most of a block is
    committed early and its last steps may have nothing left: `Full()`, and every rule, leaves a block that is full.

    Args:
        center, std: of the bell, > 0.
        first_center, first_std: of the first block.
        first: positions of the first block; by default as of the others.
        first_steps: its steps; by default, of equal blocks, an even share.
    """

    center: float = 4.0
    std: float = 4.0
    first_center: float = 4.0
    first_std: float = 5.0
    first: int | None = None
    first_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Gaussian", above=0.0, center=self.center, std=self.std)
        check_number("Gaussian", above=0.0, first_center=self.first_center, first_std=self.first_std)
        check_whole("Gaussian", optional=True, first=self.first)
        check_whole("Gaussian", optional=True, largest=MOST_STEPS, first_steps=self.first_steps)
        if self.steps is None:
            raise CdlmError("Gaussian needs a number of steps, over all blocks: half the positions, as published")
        if self.first_steps is None and self.first is not None:
            raise CdlmError("Gaussian needs first_steps beside first: a block of its own size has its own steps")
        if self.first_steps is not None and (self.block is None or self.first_steps >= self.steps):
            raise CdlmError(
                f"Gaussian needs first_steps, got {self.first_steps}, to be below steps, {self.steps}, and a block for"
                " those that follow"
            )

    def check_layout(self, length: int) -> None:
        if self.first_steps is None or self.block is None:
            return check_blocks("Gaussian", length, self.block, self.steps)
        first = self.block if self.first is None else self.first
        if length <= first:
            raise CdlmError(f"Gaussian needs a length beyond its first block, which is {first}, got {length}")
        check_blocks("Gaussian behind its first block", length - first, self.block, self._all - self.first_steps)

    @property
    def _all(self) -> int:
        assert self.steps is not None
        return self.steps

    def layout(self, offset: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        if self.first is None or self.block is None:
            return super().layout(offset)
        behind = 1 + torch.div(offset - self.first, self.block, rounding_mode="floor")
        return torch.where(offset < 0, -1, behind.clamp(min=0))

    def schedule(self, blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        each = torch.div(self._all, blocks, rounding_mode="floor").clamp(min=1)
        return each if self.first_steps is None else torch.full_like(blocks, self.first_steps)

    def steps_of(self, plan: Plan, block: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        first = self.schedule(plan.last + 1)
        if self.first_steps is None:
            return first
        others = torch.div(self._all - first, plan.last.clamp(min=1), rounding_mode="floor").clamp(min=1)
        return torch.where(block == 0, first, others)

    def quota(self, plan: Plan) -> Int[Tensor, " b"]:
        assert plan.steps is not None
        quotas = self._quotas(plan.masks, plan.steps, plan.block == 0)
        return quotas.gather(1, plan.inner.clamp(max=quotas.shape[1] - 1)[:, None]).squeeze(1)

    def idles(self, masks: Int[Tensor, " b"], steps: Int[Tensor, " b"], block: int) -> Bool[Tensor, " b"]:
        quotas = self._quotas(masks, steps, torch.full_like(masks, block == 0).bool())
        return quotas.gather(1, steps[:, None] - 1).squeeze(1) == 0

    def _quotas(self, masks: Tensor, steps: Tensor, first: Bool[Tensor, " b"]) -> Int[Tensor, "b s"]:
        center = torch.where(first, self.first_center, self.center)
        std = torch.where(first, self.first_std, self.std)
        return gaussian(masks, steps, center, std, self._all)
