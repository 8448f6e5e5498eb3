"""Commit as LLaDA, and replace tokens that do not survive a change of what is around them (CORE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import MOST_STEPS, check_choice, check_number, check_whole
from cdlm.halting.signals import most_likely
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import LIGHT, Choice, View
from cdlm.policies.quotas import best, even

REMASK = 0x726D
"""Purpose of what is drawn to replace tokens at random."""


@dataclass(frozen=True)
class CORE(LLaDA):
    """LLaDA's sampler, which every few steps replaces brittle tokens (arXiv 2602.04096, as its code does it).

    A token is brittle if it becomes unlikely when other doubtful tokens are hidden. At the steps of a block that are
    multiples of `every`, from `begin` to `end` of its steps, the `candidates` committed tokens with the smallest margin
    p(1) - p(2) are masked together, which costs one more call. Of those whose best token is another one now, with a
    probability of `confidence` or more, the `replaced` with the largest -ln p of what they held take that token; at
    most as many as the step commits. What was given is never touched.

    Args:
        steps: over all blocks, a multiple of their number.
        pick: "brittle"; or as controls those of the smallest "margin", or "random" ones, at the same cost.
        protected: positions at the end of each block that are never replaced, which the paper does not mention.
        confidence: the paper does not mention it either; 0 takes any other token.
    """

    steps: int | None = 64
    every: int = 8
    begin: float = 0.25
    end: float = 0.75
    candidates: int = 32
    replaced: int = 1
    protected: int = 16
    confidence: float = 0.3
    pick: Literal["brittle", "margin", "random"] = "brittle"

    needs = LIGHT | {"top1", "top2"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("CORE", largest=MOST_STEPS, steps=self.steps)
        check_whole("CORE", every=self.every, candidates=self.candidates)
        check_whole("CORE", least=0, replaced=self.replaced, protected=self.protected)
        check_number("CORE", least=0.0, most=1.0, begin=self.begin, end=self.end, confidence=self.confidence)
        check_choice("CORE", ("brittle", "margin", "random"), pick=self.pick)

    @property
    def masked_only(self) -> str:
        return "every"

    @property
    def tokenwise(self) -> bool:
        return False

    @property
    def revises(self) -> bool:
        return True

    @property
    def draws(self) -> bool:
        return super().draws or self.pick == "random"

    def choose(self, view: View) -> Choice:
        choice = super().choose(view)
        rows = [row for row, steps in enumerate(view.steps) if self.looks(view.spent[row], steps)]
        return self._replacing(view, choice, rows) if rows else choice

    def looks(self, spent: int, steps: int) -> bool:
        """Whether it looks for brittle tokens after so many of the steps of a block."""
        early, late = int(self.begin * steps), int(self.end * steps)
        return self.replaced > 0 and spent % self.every == 0 and early <= spent < late

    def _replacing(self, view: View, choice: Choice, rows: list[int]) -> Choice:
        at, held, steps = torch.tensor(rows, device=view.row.device), view.statistics.held, view.plan.steps
        assert held is not None
        assert steps is not None
        assert view.call is not None
        assert view.constants is not None
        tokens, doubt = held[at], self._doubt(view)[at]
        doubtful = best(doubt, self._held(view)[at], torch.full_like(at, self.candidates))
        # The same number in each row, so that nothing has to be read; those that are not doubtful are passed over.
        place = doubtful.long().topk(min(self.candidates, doubtful.shape[1]), 1).indices
        first = torch.arange(len(rows), device=at.device)[:, None] * doubtful.shape[1]
        hidden = tokens.masked_fill(doubtful, view.constants.mask_id)
        logits = view.call(at, hidden, (first + place).flatten()).unflatten(0, place.shape)
        found, log_p, was = most_likely(logits), logits.log_softmax(-1), tokens.gather(1, place)
        loss = -(chance_of(log_p, was) + 1e-10).log()
        other = doubtful.gather(1, place) & (found != was) & (chance_of(log_p, found) >= self.confidence)
        quota = even(view.plan.masks, steps, view.plan.inner)[at].clamp(max=self.replaced)
        taken = best(loss if self.pick == "brittle" else doubt.gather(1, place), other, quota)
        commit, new = choice.commit.clone(), choice.tokens.clone()
        commit[at] = commit[at].scatter(1, place, taken | commit[at].gather(1, place))
        new[at] = new[at].scatter(1, place, torch.where(taken, found, new[at].gather(1, place)))
        calls = [0] * len(view.row)
        for row in rows:
            calls[row] = 1
        return choice._replace(commit=commit, tokens=new, calls=calls)

    def _held(self, view: View) -> Bool[Tensor, "b n"]:
        """Committed tokens of each row's block that may be replaced."""
        own = view.plan.block_of == view.plan.block[:, None]
        behind = own.long().flip(1).cumsum(1).flip(1)  # how many of the block stand here and behind
        return view.statistics.target & ~view.statistics.open & own & (behind > self.protected)

    def _doubt(self, view: View) -> Float[Tensor, "b n"]:
        """What is doubted first has the largest number."""
        if self.pick == "random":
            return view.draws.uniform(view.site, REMASK)
        second = (view.statistics.top[..., 1] - view.statistics.top[..., 0]).exp()
        return (second - 1) * view.statistics.chance


def chance_of(log_p: Float[Tensor, "b k v"], tokens: Int[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """The probabilities of these tokens."""
    return log_p.gather(-1, tokens[..., None]).squeeze(-1).exp()
