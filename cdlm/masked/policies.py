"""Unmasking policies: which masked positions to commit at a step, and to what."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.errors import CdlmError
from cdlm.masked.draws import ORDER, Draws, Site
from cdlm.masked.model import Constants
from cdlm.masked.quotas import best, even, falling, ranked, transfer_share
from cdlm.signals import Glance

LIGHT = frozenset({"tokens", "logsumexp"})
"""Signals from which the most likely token and its probability follow."""


class Plan(NamedTuple):
    """Where a row stands in its blocks; every policy's memory."""

    block_of: Int[Tensor, "b n"]
    """Number of the block of each position, counted from where generation begins; below 0 before that."""
    block: Int[Tensor, " b"]
    """The block that is being decoded, with what earlier ones left open."""
    inner: Int[Tensor, " b"]
    """Steps spent in it."""
    masks: Int[Tensor, " b"]
    """Open positions when it was entered."""
    last: Int[Tensor, " b"]
    """The row's last block."""
    own: Any = ()
    """What the policy itself remembers: a nest of row-first tensors."""


class View(NamedTuple):
    """What a policy sees of a step: q positions of each row, all of them or those of a block."""

    glance: Glance
    """Logits (guided, suppressed and shifted) and what follows from them."""
    candidates: Bool[Tensor, "b q"]
    """Open positions of the current block and those before it."""
    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    """Of the schedule, or of the row if there is none."""
    plan: Plan
    temperature: float
    constants: Constants
    draws: Draws

    @property
    def site(self) -> Site:
        """Where things are drawn at random."""
        return Site(self.row, self.step, self.candidates)

    def spread(self, values: Tensor, empty: float) -> Tensor:
        """Values of the k candidates at their places, float; `empty` elsewhere."""
        out = torch.full(self.candidates.shape, empty, dtype=values.dtype, device=values.device)
        out[self.candidates] = values
        return out


class Choice(NamedTuple):
    """What to commit."""

    commit: Bool[Tensor, "b q"]
    tokens: Int[Tensor, "b q"]
    """Proposals; used where committed, and to fill what is left where a quirk says so."""
    own: Any = ()
    """The policy's next memory."""


@dataclass(frozen=True)
class Policy(ABC):
    """An unmasking policy: small, frozen, and its own configuration.

    Its rows are decoded block by block from left to right; a row's block is done when nothing in it is open.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Signals of the step that it reads, beside those of the criterion."""
        return LIGHT

    @property
    def size(self) -> int | None:
        """Positions of a block; None makes all that is generated one."""
        return getattr(self, "block", None)

    def schedule(self, plan: Plan) -> Int[Tensor, " b"] | None:
        """Steps of a block, after which it is left whatever is open; None if it ends when it is full."""
        return None

    @property
    def tokenwise(self) -> bool:
        """Whether it can decode one block alone, as a cache asks for."""
        return True

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        """Settings to try, from strict to loose; `fixed` are the parameters not swept."""
        raise CdlmError(f"{cls.__name__} has no settings to sweep: write it with its arguments")

    def suppressed(self, constants: Constants) -> tuple[int, ...]:
        """Tokens that are never proposed, and that no statistic sees."""
        return ()

    def check(self, length: int, constants: Constants) -> None:
        """Raise unless rows that generate `length` positions can be decoded."""
        return

    def due(
        self, block_of: Int[Tensor, "b n"], block: Int[Tensor, " b"], open_: Bool[Tensor, "b n"]
    ) -> Int[Tensor, " b"]:
        """Positions that a block has to decode when it is entered: its own, and what earlier ones left."""
        return (open_ & (block_of <= block[:, None])).sum(1)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Steps that rows with so many open positions and blocks take at most: here one position a step."""
        return masks

    def start(self, tokens: Int[Tensor, "b n"]) -> Any:
        """The policy's own memory of rows that enter."""
        return ()

    @abstractmethod
    def choose(self, view: View) -> Choice:
        """What to commit at this step: at least one position of each row that has candidates, or its quota of none."""


def plan_of(
    policy: Policy, open_: Bool[Tensor, "b n"], start: Int[Tensor, " b"], end: Int[Tensor, " b"],
    tokens: Int[Tensor, "b n"],
) -> Plan:  # fmt: skip
    """The plan of rows that enter, whose generated part is [start, end)."""
    place = torch.arange(open_.shape[1], device=open_.device)
    size = policy.size or open_.shape[1]
    block_of = torch.div(place - start[:, None], size, rounding_mode="floor")
    last = torch.div(end - 1 - start, size, rounding_mode="floor")
    zero = torch.zeros_like(start)
    return Plan(block_of, zero, zero, policy.due(block_of, zero, open_), last, policy.start(tokens))


def enter(policy: Policy, plan: Plan, open_: Bool[Tensor, "b n"], waits: bool) -> Plan:
    """The plan at the start of a step, before the model is called: rows whose block is done move on.

    Args:
        waits: a block with a schedule of steps is left at its end alone, even if nothing in it is open any more.
    """
    steps = policy.schedule(plan)
    full = ~(open_ & (plan.block_of <= plan.block[:, None])).any(1)
    following = plan.block + 1
    if steps is None or not waits:  # blocks that are full already are passed over
        ahead = open_ & (plan.block_of > plan.block[:, None])
        following = torch.where(ahead, plan.block_of, plan.last[:, None]).amin(1)
    done = full if steps is None else plan.inner >= steps if waits else (plan.inner >= steps) | full
    moves = done & (plan.block < plan.last)
    block = torch.where(moves, torch.minimum(following, plan.last), plan.block)
    masks = torch.where(moves, policy.due(plan.block_of, block, open_), plan.masks)
    inner = torch.where(moves, 0, plan.inner)
    return plan._replace(block=block, inner=inner, masks=masks)


def proposal(view: View) -> tuple[Int[Tensor, "b q"], Float[Tensor, "b q"]]:
    """The most likely token, or one drawn at the temperature, and its probability at temperature 1 (LLaDA)."""
    glance = view.glance
    if view.temperature == 0:
        return glance.tokens, (-glance.scale[..., 1]).exp()  # the scale is relative to the largest logit
    logits = glance.logits[view.candidates]
    drawn = view.draws.token(view.site, logits, view.temperature)
    chance = logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1).exp()
    tokens = glance.tokens.clone()
    tokens[view.candidates] = drawn
    return tokens, view.spread(chance, 0.0)


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
        if self.steps is not None:
            require_whole("LLaDA", "steps", self.steps)
        require_block("LLaDA", self.block)
        if self.remasking not in ("low_confidence", "random"):
            raise CdlmError(f"LLaDA needs a remasking among low_confidence, random, got {self.remasking!r}")

    def suppressed(self, constants: Constants) -> tuple[int, ...]:
        return (_end(constants, "no_eos"),) if self.no_eos else ()

    def check(self, length: int, constants: Constants) -> None:
        check_blocks("LLaDA", length, self.block, self.steps)
        if self.eos_last:
            _end(constants, "eos_last")

    def due(
        self, block_of: Int[Tensor, "b n"], block: Int[Tensor, " b"], open_: Bool[Tensor, "b n"]
    ) -> Int[Tensor, " b"]:
        if self.block_quota:
            return (open_ & (block_of == block[:, None])).sum(1)
        return super().due(block_of, block, open_)

    def schedule(self, plan: Plan) -> Int[Tensor, " b"] | None:
        return None if self.steps is None else self.steps // (plan.last + 1)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks if self.steps is None else torch.full_like(masks, self.steps)

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        if self.remasking == "random":
            confidence = view.spread(view.draws.uniform(view.site, ORDER), 0.0)
        elif self.eos_last:
            confidence = self._without_ends(view, tokens)
        steps, plan = self.schedule(view.plan), view.plan
        quota = torch.ones_like(plan.inner) if steps is None else even(plan.masks, steps, plan.inner)
        return Choice(best(confidence, view.candidates, quota), tokens)

    def _without_ends(self, view: View, tokens: Int[Tensor, "b q"]) -> Float[Tensor, "b q"]:
        """Probability of each proposal when there are no ends: 0 for them, and more for the others."""
        ends = [view.constants.eos_id, view.constants.eot_id]
        held = ends[1:] if self.eot_only and view.temperature > 0 else ends
        logits = view.glance.logits[view.candidates].clone()
        logits[:, [end for end in held if end is not None]] = -torch.inf
        chosen = tokens[view.candidates][:, None]
        return view.spread(logits.softmax(-1).gather(1, chosen).squeeze(1), 0.0)


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

    def __post_init__(self) -> None:
        if self.steps is not None:
            require_whole("Dream", "steps", self.steps)
        elif self.pooled or self.alg == "origin":
            raise CdlmError(f"Dream needs a number of steps with {'pooled' if self.pooled else 'origin'}: give steps")
        require_block("Dream", self.block)
        if self.alg not in ALGORITHMS:
            raise CdlmError(f"Dream needs an alg among {', '.join(ALGORITHMS)}, got {self.alg!r}")
        require_number("Dream", "eps", self.eps, 0.0, 1.0)
        require_number("Dream", "alg_temp", self.alg_temp or 0.0, 0.0)
        require_number("Dream", "top_p", 1.0 if self.top_p is None else self.top_p, 0.0, 1.0)
        if self.top_k is not None:
            require_whole("Dream", "top_k", self.top_k)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens"})

    @property
    def tokenwise(self) -> bool:
        return not self.pooled

    def check(self, length: int, constants: Constants) -> None:
        if self.block is not None:
            check_blocks("Dream", length, self.block, self.steps)

    def schedule(self, plan: Plan) -> Int[Tensor, " b"] | None:
        return None if self.steps is None else self.steps // (plan.last + 1)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks if self.steps is None else torch.full_like(masks, self.steps)

    def choose(self, view: View) -> Choice:
        steps, inner = self.schedule(view.plan), view.plan.inner
        tokens, confidence = self.propose(view)
        if self.alg == "origin" and steps is not None:
            chance = transfer_share(steps, inner, self.eps)[:, None].expand_as(view.candidates)
            drawn = view.spread(view.draws.uniform(view.site, ORDER).float(), 1.0)
            return Choice(view.candidates & (drawn < chance), tokens)
        if self.pooled:
            return self._pooled(view, tokens, confidence)
        if self.alg_temp:
            score = view.draws.order(view.site, confidence[view.candidates] / self.alg_temp)
            confidence = view.spread(score, 0.0)
        masks = view.candidates.sum(1)
        quota = torch.ones_like(masks) if steps is None else falling(masks, steps, inner, self.eps)
        return Choice(best(confidence, view.candidates, quota), tokens)

    def propose(self, view: View) -> tuple[Int[Tensor, "b q"], Float[Tensor, "b q"]]:
        """Tokens and confidence, from the tempered and filtered distribution."""
        logits = view.glance.logits[view.candidates]
        if view.temperature > 0:
            logits = logits / view.temperature
        logits = filtered(logits, self.top_p, self.top_k)
        p = logits.softmax(-1)
        chosen = view.draws.category(view.site, p.log()) if view.temperature > 0 else p.argmax(-1)
        if self.alg == "topk_margin":
            first, second = p.topk(2, -1).values.unbind(-1)
            confidence = first - second
        elif self.alg == "entropy":
            confidence = (p * (p + 1e-10).log()).sum(-1)
        else:
            confidence = p.gather(1, chosen[:, None]).squeeze(1)
        tokens = view.glance.tokens.clone()
        tokens[view.candidates] = chosen
        return tokens, view.spread(confidence, 0.0)

    def _pooled(self, view: View, tokens: Int[Tensor, "b q"], confidence: Float[Tensor, "b q"]) -> Choice:
        masks = view.candidates.sum()[None].float() / len(view.row)
        step, schedule = view.plan.inner[:1], self.schedule(view.plan)
        assert schedule is not None
        steps = schedule[:1]
        share = transfer_share(steps, step, self.eps)
        count = int(masks if bool(step >= steps - 1) else masks * share)
        places = confidence.masked_fill(~view.candidates, -torch.inf).topk(count, -1).indices
        commit = torch.zeros_like(view.candidates).scatter(1, places, True)
        return Choice(commit, tokens.masked_fill(~view.candidates, view.constants.mask_id))


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

    def __post_init__(self) -> None:
        require_whole("DreamThreshold", "steps", self.steps)
        require_number("DreamThreshold", "tau", self.tau, 0.0)

    def check(self, length: int, constants: Constants) -> None:
        if length % self.steps:
            raise CdlmError(
                f"DreamThreshold needs a number of steps that divides the length {length}, got {self.steps}:"
                f" these do: {', '.join(str(s) for s in range(1, length + 1) if length % s == 0)}"
            )

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks + self.steps

    def start(self, tokens: Int[Tensor, "b n"]) -> Any:
        return torch.zeros_like(tokens[:, 0])

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        owed, over = view.plan.own, view.step >= self.steps
        quota = torch.where(over, 0, view.plan.masks // self.steps) + owed
        asked = best(confidence, view.candidates, quota)
        first = best(confidence, view.candidates, torch.ones_like(quota))
        commit = first | (asked & (confidence >= self.tau))
        return Choice(commit, tokens, (asked & ~commit).sum(1))


@dataclass(frozen=True)
class Threshold(Policy):
    """Commit every position of the block with a probability of at least `tau`, and always the best (Fast-dLLM).

    arXiv 2505.22618, section 3.2. There is no schedule: a block takes the steps that it takes.

    Args:
        tau: least probability, >= 0; above 1 one position a step.
        block: positions of a block; by default one block.
        calls: quirk: a block is left after so many steps, full or not (Fast-dLLM's dual cache since 2026).
    """

    tau: float = 0.9
    block: int | None = None
    calls: int | None = None

    def __post_init__(self) -> None:
        require_number("Threshold", "tau", self.tau, 0.0)
        require_block("Threshold", self.block)
        if self.calls is not None:
            require_whole("Threshold", "calls", self.calls)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        taus = (0.999, 0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        return [cls(tau, **fixed) for tau in taus]

    def schedule(self, plan: Plan) -> Int[Tensor, " b"] | None:
        return None if self.calls is None else torch.full_like(plan.block, self.calls)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return masks if self.calls is None else blocks * self.calls

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        count = (view.candidates & (confidence >= self.tau)).sum(1).clamp(min=1)
        return Choice(best(confidence, view.candidates, count), tokens)


@dataclass(frozen=True)
class Factor(Policy):
    """Commit the best n positions of the block, for the largest n with (k + 1) (1 - p_k) <= f at each rank 2 to n.

    Fast-dLLM's factor rule (arXiv 2505.22618, theorem 1): as many as a greedy sequential decoder would agree with when
    f = 1. The best is always committed.

    Args:
        f: >= 0; larger commits more.
        block: positions of a block; by default one block.
        last_rank: quirk: the first position that fails is committed too if it is the last one, as published.
    """

    f: float = 1.0
    block: int | None = None
    last_rank: bool = False

    def __post_init__(self) -> None:
        require_number("Factor", "f", self.f, 0.0)
        require_block("Factor", self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(f, **fixed) for f in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)]

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        p = confidence.gather(1, ranked(confidence, view.candidates))
        rank = torch.arange(1, p.shape[1] + 1, device=p.device)
        there = rank <= view.candidates.sum(1, keepdim=True)
        passes = there & ((p >= 1 - self.f / (rank + 1)) | (rank == 1))
        count = passes.cumprod(1).sum(1)
        if self.last_rank:
            count = count + (count == view.candidates.sum(1) - 1)
        return Choice(best(confidence, view.candidates, count), tokens)


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

    def __post_init__(self) -> None:
        require_number("EntropyBound", "nats", self.nats, 0.0)
        require_block("EntropyBound", self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        return [cls(nats, **fixed) for nats in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)]

    @property
    def needs(self) -> frozenset[str]:
        return LIGHT | {"entropy"}

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        return Choice(entropy_bounded(view.glance.entropy, confidence, view.candidates, self.nats), tokens)


def entropy_bounded(
    entropy: Float[Tensor, "b q"], score: Float[Tensor, "b q"], candidates: Bool[Tensor, "b q"], nats: float
) -> Bool[Tensor, "b q"]:
    """The longest prefix of the candidates by falling score with sum H - max H <= nats, at least one."""
    order = ranked(score, candidates)
    h = entropy.gather(1, order)
    cost = h.cumsum(1) - h.cummax(1).values
    count = (candidates.gather(1, order) & (cost <= nats)).cumprod(1).sum(1)
    return best(score, candidates, count.clamp(min=1))


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

    def __post_init__(self) -> None:
        require_number("KLASS", "confidence", self.confidence, 0.0, 1.0)
        require_number("KLASS", "nats", self.nats, 0.0)
        require_block("KLASS", self.block)

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        confidence = float(fixed.pop("confidence", 0.6))
        return [cls(confidence, nats, **fixed) for nats in (1e-5, 1e-4, 1e-3, 0.005, 0.015, 0.05, 0.2, 1.0)]

    @property
    def needs(self) -> frozenset[str]:
        return LIGHT | {"mean_kl"}

    @property
    def tokenwise(self) -> bool:
        return False

    def start(self, tokens: Int[Tensor, "b n"]) -> Any:
        return torch.full(tokens.shape, torch.inf, device=tokens.device)

    def choose(self, view: View) -> Choice:
        tokens, confidence = proposal(view)
        kl = view.glance.kl.float()
        stable = (kl < self.nats) & (view.plan.own < self.nats)
        ready = view.candidates & stable & (confidence > self.confidence)
        alone = best(confidence, view.candidates, torch.ones_like(view.row))
        return Choice(torch.where(ready.any(1, keepdim=True), ready, alone), tokens, kl)


def check_blocks(policy: str, length: int, block: int | None, steps: int | None) -> None:
    """Raise unless blocks divide the length, and the steps are shared out evenly among them."""
    size = block or length
    if length % size:
        raise CdlmError(
            f"{policy} needs a length that is a multiple of its block {size}, got {length}: {_near(length, size)}"
        )
    blocks = length // size
    if steps is not None and steps % blocks:
        raise CdlmError(
            f"{policy} needs steps that are a multiple of its {blocks} blocks (length {length}, block {size}),"
            f" got {steps}: {_near(steps, blocks)}"
        )


def _near(value: int, unit: int) -> str:
    """The multiples beside a value that is none."""
    below = value // unit * unit
    return f"{below} and {below + unit} fit" if below else f"{unit} fits"


def require_whole(policy: str, name: str, value: object) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CdlmError(f"{policy} needs a whole number {name} >= 1, got {value!r}")


def require_block(policy: str, block: object) -> None:
    """Raise unless `block` is None or a number of positions."""
    if block is not None:
        require_whole(policy, "block", block)


def require_number(policy: str, name: str, value: object, least: float, most: float = math.inf) -> None:
    """Raise unless `value` is a number, at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise CdlmError(f"{policy} needs a number {name} of at least {least:g}{limit}, got {value!r}")


def _end(constants: Constants, switch: str) -> int:
    if constants.eos_id is None:
        raise CdlmError(f"LLaDA's {switch} needs a model with an end-of-text token: give eos_id")
    return constants.eos_id
