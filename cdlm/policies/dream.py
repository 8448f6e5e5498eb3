"""The samplers of Dream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdlm.core.checks import MOST_STEPS, check_choice, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.rng import ORDER, Site
from cdlm.core.types import Constants
from cdlm.policies.policy import (
    Choice,
    Policy,
    View,
    check_blocks,
    proposal,
)
from cdlm.policies.quotas import best, falling, transfer_share, transfer_shares

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True)
class Dream(Policy):
    """The sampler of Dream (arXiv 2508.15487): a falling quota, ranked by one of four confidences, on one canvas.

    Args:
        steps: of the whole canvas, or over all blocks; None commits one position a step.
        alg: "origin" commits each position with the schedule's probability; "maskgit_plus" ranks by the probability of
            the proposal, "topk_margin" by the distance of the two best, "entropy" by minus the entropy, all of the
            tempered and filtered distribution.
        alg_temp: positions are drawn from softmax(confidence / alg_temp) instead of taking the best; None or 0 is off.
        eps: the end of the grid of times, in [0, 1].
        top_p, top_k: filters of the distribution that is sampled from.
        block: positions of a block, a divisor of the length (as Fast-dLLM does); by default one block.
        pooled: quirk: the quota is the mean over the rows that are decoded together, and a row with fewer masks gets
            masks written over its tokens, as published.
    """

    steps: int | None = None
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "entropy"
    alg_temp: float | None = None
    eps: float = 1e-3
    top_p: float | None = None
    top_k: int | None = None
    block: int | None = None
    pooled: bool = False

    needs = frozenset({"tokens"})

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(steps, **fixed) for steps in (64, 32, 16, 8, 4)]

    def __post_init__(self) -> None:
        check_choice("Dream", ALGORITHMS, alg=self.alg)
        check_whole("Dream", optional=True, largest=MOST_STEPS, steps=self.steps)
        check_whole("Dream", optional=True, block=self.block, top_k=self.top_k)
        check_number("Dream", least=0.0, most=1.0, eps=self.eps)
        check_number("Dream", least=0.0, most=1.0, optional=True, top_p=self.top_p)
        check_number("Dream", least=0.0, infinite=True, optional=True, alg_temp=self.alg_temp)
        if self.steps is None and (self.pooled or self.alg == "origin"):
            raise CdlmError(f"Dream needs a number of steps with {'pooled' if self.pooled else 'origin'}: give steps")

    @property
    def tokenwise(self) -> bool:
        return not self.pooled

    @property
    def keeps(self) -> bool:
        return not self.pooled

    @property
    def draws(self) -> bool:
        return self.alg == "origin" or bool(self.alg_temp) or self.pooled

    @property
    def masked_only(self) -> str:
        return "pooled" if self.pooled else ""

    def check(self, length: int, constants: Constants) -> None:
        if self.block is not None:
            check_blocks("Dream", length, self.block, self.steps)

    def schedule(self, blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        return None if self.steps is None else (self.steps // blocks).clamp(min=1)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks if self.steps is None else torch.full_like(masks, self.steps)

    def start(self, tokens: Int[Tensor, "b n"], last: Int[Tensor, " b"]) -> Any:
        """The share of the masks that are left at each step of a block."""
        if self.steps is None:
            return ()
        steps = [max(1, self.steps // (blocks + 1)) for blocks in last.tolist()]
        return transfer_shares(steps, self.steps, self.eps).to(tokens.device)

    def choose(self, view: View) -> Choice:
        steps, inner = view.plan.steps, view.plan.inner
        tokens, confidence = self.propose(view)
        if self.alg == "origin" and steps is not None:
            chance = transfer_share(view.plan.own, inner)[:, None]
            return Choice(view.candidates & (view.draws.uniform(view.site, ORDER) < chance), tokens, view.plan.own)
        if self.pooled:
            return self._pooled(view, tokens, confidence)
        if self.alg_temp:
            confidence = view.draws.order(view.site, confidence / self.alg_temp)
        masks = view.candidates.sum(1)
        quota = torch.ones_like(masks) if steps is None else falling(masks, view.plan.own, steps, inner)
        return Choice(best(confidence, view.candidates, quota), tokens, view.plan.own)

    def propose(self, view: View) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Tokens and confidence, from the tempered and filtered distribution."""

        def proposed(logits: Tensor, site: Site, best: Tensor) -> tuple[Tensor, Tensor]:
            if view.temperature > 0:
                logits = logits / view.temperature
            p = filtered(logits, self.top_p, self.top_k).softmax(-1)
            chosen = view.draws.category(site, p.log()) if view.temperature > 0 else p.argmax(-1)
            if self.alg == "topk_margin":
                first, second = p.topk(2, -1).values.unbind(-1)
                return chosen, first - second
            if self.alg == "entropy":
                return chosen, (p * (p + 1e-10).log()).sum(-1)
            return chosen, p.gather(1, chosen[:, None]).squeeze(1)

        return view.of_candidates(proposed)

    def _pooled(self, view: View, tokens: Int[Tensor, "b n"], confidence: Float[Tensor, "b n"]) -> Choice:
        masks = view.candidates.sum()[None].float() / len(view.row)
        step, schedule = view.plan.inner[:1], view.plan.steps
        assert schedule is not None
        steps = schedule[:1]
        share = transfer_share(view.plan.own, view.plan.inner)[0]
        count = int(masks if bool(step >= steps - 1) else masks * share)
        places = confidence.masked_fill(~view.candidates, -torch.inf).topk(count, -1).indices
        commit = torch.zeros_like(view.candidates).scatter(1, places, True)
        assert view.constants is not None
        return Choice(commit, tokens.masked_fill(~view.candidates, view.constants.mask_id), view.plan.own)


def filtered(logits: Float[Tensor, "k v"], top_p: float | None, top_k: int | None) -> Float[Tensor, "k v"]:
    """Logits whose unlikely tokens are the least finite number: those after the first whose cumulative probability
    exceeds `top_p`, then those below the `top_k`-th largest."""
    least = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        falling_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        beyond = falling_logits.softmax(-1).cumsum(-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, :-1]], -1)
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), least)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, least)
    return logits


@dataclass(frozen=True)
class DreamThreshold(Policy):
    """Fast-dLLM's rule for Dream without a cache: of a growing quota, what is confident enough (arXiv 2505.22618).

    A step looks at the `masks / steps` most confident positions and those it still owes, commits the best, and of the
    others those with a probability of at least `tau`; what it refuses it owes. When the steps are over, it goes on
    with what it owes.

    Args:
        steps: a divisor of the number of masks.
        tau: least probability, >= 0.
    """

    steps: int
    tau: float = 0.9

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        if "steps" not in fixed:
            return super().sweep(**fixed)
        return [cls(tau=tau, **fixed) for tau in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)]

    def __post_init__(self) -> None:
        check_whole("DreamThreshold", largest=MOST_STEPS, steps=self.steps)
        check_number("DreamThreshold", least=0.0, infinite=True, tau=self.tau)

    def check(self, length: int, constants: Constants) -> None:
        if length % self.steps:
            raise CdlmError(
                f"DreamThreshold needs a number of steps that divides the length {length}, got {self.steps}:"
                f" these do: {', '.join(str(s) for s in range(1, length + 1) if length % s == 0)}"
            )

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks + self.steps

    def start(self, tokens: Int[Tensor, "b n"], last: Int[Tensor, " b"]) -> Any:
        return torch.zeros_like(last)

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        owed, over = view.plan.own, view.step >= self.steps
        quota = torch.where(over, 0, view.plan.masks // self.steps) + owed
        considered = best(confidence, view.candidates, quota)
        first = best(confidence, view.candidates, torch.ones_like(quota))
        commit = first | (considered & (confidence >= self.tau))
        return Choice(commit, tokens, (considered & ~commit).sum(1))
