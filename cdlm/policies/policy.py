"""Policies: which open positions to commit at a step, and to what. A committed position is given from then on.

Of a masked model they decide what is unmasked; of a continuous one, what is no longer noisy. A policy that `revises`
may also take back what it has committed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import Settings
from cdlm.core.devices import places
from cdlm.core.errors import CdlmError
from cdlm.core.rng import PositionNoise, Site
from cdlm.core.types import Constants, SignalReader
from cdlm.halting.signals import StepStatistics, positions_at_a_time
from cdlm.sampling.session import Model

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
    steps: Int[Tensor, " b"] | None = None
    """Steps of a block, after which it is left whatever is open; None if it ends when it is full."""
    own: Any = ()
    """What the policy itself remembers: a nest of row-first tensors."""
    again: Bool[Tensor, " b"] | None = None
    """Rows that do not leave their block yet, even if nothing in it is open; None of a policy that never asks that."""


@runtime_checkable
class Call(Protocol):
    """A further call of the model within a step, guided, suppressed and shifted as the step's own."""

    def __call__(
        self, rows: Int[Tensor, " r"], tokens: Int[Tensor, "r n"], positions: Int[Tensor, " k"]
    ) -> Float[Tensor, "k v"]:
        """Logits of some places in `tokens.flatten()`, which are other texts of some of the step's rows.

        Whoever calls says so in `Choice.calls`.
        """
        ...


@runtime_checkable
class Refine(Protocol):
    """What a layer on top of the model says, guided by nothing, suppressed and shifted as the step's own logits."""

    def __call__(self, tokens: Int[Tensor, "b n"], positions: Int[Tensor, " k"]) -> Float[Tensor, "k v"]:
        """Logits of some places in `tokens.flatten()`, where `tokens` are the rows as they are now."""
        ...


class View(NamedTuple):
    """What a policy sees of a step."""

    statistics: StepStatistics
    """Logits (guided, suppressed and shifted) and what follows from them."""
    candidates: Bool[Tensor, "b n"]
    """Open positions of the current block and those before it."""
    row: Int[Tensor, " b"]
    step: Int[Tensor, " b"]
    """Of the schedule, or of the row if there is none."""
    plan: Plan
    level: Float[Tensor, " b"]
    """Noise left: of a masked model the share of the generated positions that are open, of a continuous one the noise
    level in embedding norms."""
    temperature: float
    constants: Constants | None
    """Of a masked model."""
    draws: PositionNoise
    place: Int[Tensor, "b n"]
    """Of each position in its row, not counting padding before it."""
    known: int | None = None
    """How many candidates there are, where the host knows that."""
    call: Call | None = None
    """Of a masked model that is decoded without a cache."""
    refine: Refine | None = None
    """Of a policy that has a layer on top of the model, see `Policy.refiner`."""
    spent: Sequence[int] = ()
    """Of a masked model, on the host: steps that each row has spent in its block."""
    steps: Sequence[int] = ()
    """And steps of each block; -1 if it ends when it is full."""
    ending: Bool[Tensor, "b n"] | None = None
    """Of a model of whole texts: positions behind all that is given, where a stop token ends the text."""

    @property
    def least(self) -> int:
        """Positions that are committed at least: one of a masked model, whose every call has to decide something; none
        of a continuous one, whose state moves without."""
        return 0 if self.constants is None else 1

    @property
    def site(self) -> Site:
        """Every position, as something is drawn for it."""
        return Site(self.row[:, None], self.step[:, None], self.place)

    def site_of(self, row: Int[Tensor, " k"], place: Int[Tensor, " k"]) -> Site:
        """Some positions, by row and column of the step's, as something is drawn for them."""
        return Site(self.row[row], self.step[row], self.place[row, place])

    def of_candidates(
        self, work: Callable[[Float[Tensor, "k v"], Site, Int[Tensor, " k"]], tuple[Tensor, Tensor]],
        tokens: Int[Tensor, "b n"] | None = None,
    ) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]:  # fmt: skip
        """Tokens and numbers that some work makes of the logits of the candidates, at their places; elsewhere `tokens`
        and 0.

        Args:
            work: gets some of the logits, which it may write into, a few positions at a time, with their sites and
                `tokens`.
            tokens: by default the most likely ones.
        """
        statistics = self.statistics
        chosen = places(statistics.pick(self.candidates), self.known)
        site = Site(*(statistics.pick(part.expand_as(self.candidates)) for part in self.site)).at(chosen)
        likely = statistics.tokens if tokens is None else tokens
        at = chosen if statistics.where is None else statistics.where.flat[chosen]
        best, size = likely.flatten()[at], positions_at_a_time(statistics.flat)
        drawn, numbers = torch.empty_like(best), statistics.flat.new_empty(len(best))
        for begin in range(0, len(chosen), size):
            some = slice(begin, begin + size)
            drawn[some], numbers[some] = work(statistics.flat[chosen[some]], site.at(some), best[some])
        return (
            likely.flatten().index_copy(0, at, drawn).view_as(likely),
            numbers.new_zeros(likely.numel()).index_copy_(0, at, numbers).view_as(likely),
        )


class Choice(NamedTuple):
    """What to commit."""

    commit: Bool[Tensor, "b n"]
    tokens: Int[Tensor, "b n"]
    """Proposals; used where committed, and with some quirks to fill what is left."""
    own: Any = ()
    """The policy's next memory."""
    reopen: Bool[Tensor, "b n"] | None = None
    """Of a policy that revises: generated positions to mask again; those that are committed as well are replaced."""
    calls: Sequence[int] | None = None
    """Further calls of the model that the policy made for each row; None: it made none."""
    again: Bool[Tensor, " b"] | None = None
    """Of a policy that revises: rows that stay in their block, even if nothing in it is open."""
    counted: Mapping[str, Int[Tensor, " b"]] = MappingProxyType({})
    """How much is added to each of the policy's `counts`."""


@dataclass(frozen=True)
class Policy(SignalReader, Settings, ABC):
    """A policy: small, frozen, and its own configuration.

    Its rows are decoded block by block from left to right; a row's block is done when nothing in it is open.
    """

    needs = LIGHT
    counts: ClassVar[tuple[str, ...]] = ()
    """Names of what it counts of each sample, beside the calls of the model."""
    spared: ClassVar[frozenset[str]] = frozenset()
    """Of these, what it can do without where no position has to be committed, as on continuous models."""

    @property
    def size(self) -> int | None:
        """Positions of a block; None makes all that is generated one."""
        return getattr(self, "block", None)

    def schedule(self, blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        """Steps of each block of rows that have so many, after which it is left whatever is open; None if it ends when
        it is full."""
        return None

    def steps_of(self, plan: Plan, block: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        """Steps of a block that rows enter; by default those of their first one."""
        return plan.steps

    def idles(self, masks: Int[Tensor, " b"], steps: Int[Tensor, " b"], block: int) -> Bool[Tensor, " b"]:
        """Whether a block of so many masks and steps is full before its last step."""
        return masks < steps

    def layout(self, offset: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """Number of the block of each position, by its distance from where generation begins; below 0 before that."""
        return torch.div(offset, self.size or offset.shape[1], rounding_mode="floor")

    @property
    def tokenwise(self) -> bool:
        """Whether it can decode one block alone, as a cache requires."""
        return True

    @property
    def keeps(self) -> bool:
        """Whether no mask is written over a token, be it given or committed."""
        return True

    @property
    def revises(self) -> bool:
        """Whether it may replace or mask again what it has committed; what was given stays."""
        return False

    @property
    def draws(self) -> bool:
        """Whether equal rows may be decoded differently at temperature 0: something is drawn at random, or rows that
        are decoded together see each other."""
        return False

    @classmethod
    def sweep(cls, **fixed: Any) -> Sequence[Policy]:
        """Settings to try, from strict to loose; `fixed` are the parameters not swept."""
        raise CdlmError(f"{cls.__name__} has no settings to sweep: write it with its arguments")

    @property
    def masked_only(self) -> str:
        """The setting that makes sense for masked models alone; empty if there is none."""
        return ""

    def suppressed(self, constants: Constants) -> tuple[int, ...]:
        """Tokens that are never proposed, and that no statistic sees."""
        return ()

    def refiner(self, model: Any) -> Any:
        """The layer on top of a masked model that the policy asks within a step; None if it has none.

        It is made once a run. See `cdlm.masked.model.Refiner`.
        """
        return None

    def check(self, length: int, constants: Constants) -> None:
        """Raise unless rows that generate `length` positions can be decoded."""
        return

    def check_model(self, model: Model) -> None:
        """Raise unless this model can be decoded."""
        return

    def due(
        self, block_of: Int[Tensor, "b n"], block: Int[Tensor, " b"], open_: Bool[Tensor, "b n"]
    ) -> Int[Tensor, " b"]:
        """Positions that a block has to decode when it is entered: its own, and what earlier ones left."""
        return (open_ & (block_of <= block[:, None])).sum(1)

    def budget(self, masks: Int[Tensor, " b"], blocks: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Steps that rows with so many open positions and blocks take at most: here one position a step."""
        return masks

    def start(self, tokens: Int[Tensor, "b n"], last: Int[Tensor, " b"]) -> Any:
        """The policy's own memory of rows that enter, whose last block is `last`."""
        return ()

    @abstractmethod
    def choose(self, view: View) -> Choice:
        """What to commit at this step: `view.least` positions or more of each row that has candidates, or its quota."""


def plan_of(
    policy: Policy, open_: Bool[Tensor, "b n"], start: Int[Tensor, " b"], end: Int[Tensor, " b"],
    tokens: Int[Tensor, "b n"],
) -> Plan:  # fmt: skip
    """The plan of rows that enter, whose generated part is [start, end)."""
    place = torch.arange(open_.shape[1], device=open_.device)
    block_of = policy.layout(place - start[:, None])
    last = block_of.gather(1, end[:, None] - 1).squeeze(1)
    zero = torch.zeros_like(start)
    steps, due = policy.schedule(last + 1), policy.due(block_of, zero, open_)
    again = torch.zeros_like(start, dtype=torch.bool) if policy.revises else None
    return Plan(block_of, zero, zero, due, last, steps, policy.start(tokens, last), again)


def enter(policy: Policy, plan: Plan, open_: Bool[Tensor, "b n"], waits: bool) -> Plan:
    """The plan at the start of a step, before the model is called: rows whose block is done move on.

    Args:
        waits: a block with a schedule of steps is left at its end alone, even if nothing in it is open any more.
    """
    if policy.size is None:  # one block: nothing follows it
        return plan
    steps = plan.steps
    full = ~(open_ & (plan.block_of <= plan.block[:, None])).any(1)
    if plan.again is not None:
        full &= ~plan.again
    following = plan.block + 1
    if steps is None or not waits:  # blocks that are full already are passed over
        ahead = open_ & (plan.block_of > plan.block[:, None])
        following = torch.where(ahead, plan.block_of, plan.last[:, None]).amin(1)
    done = full if steps is None else plan.inner >= steps if waits else (plan.inner >= steps) | full
    moves = done & (plan.block < plan.last)
    block = torch.where(moves, torch.minimum(following, plan.last), plan.block)
    masks = torch.where(moves, policy.due(plan.block_of, block, open_), plan.masks)
    inner = torch.where(moves, 0, plan.inner)
    return plan._replace(block=block, inner=inner, masks=masks, steps=policy.steps_of(plan, block))


def proposal(
    view: View, least: Float[Tensor, " b"] | float | None = None
) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]:
    """The most likely token, or one drawn at the temperature, and its probability at temperature 1 (LLaDA).

    Args:
        least: where no position has to be committed, smaller probabilities need not be exact, which saves most of the
            work; what is given in place of one is smaller too.
    """
    statistics = view.statistics
    if view.temperature == 0:
        if least is None or view.least > 0:
            return statistics.tokens, statistics.chance
        floor = torch.as_tensor(least, device=view.row.device).expand(len(view.row))
        return statistics.tokens, statistics.chance_from(floor, view.candidates)

    return view.of_candidates(lambda logits, site, best: drawn(view, logits, site))


def drawn(view: View, logits: Float[Tensor, "k v"], site: Site) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """A token of each position, drawn at the temperature above 0, and its probability at temperature 1."""
    tokens = view.draws.token(site, logits, view.temperature)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1).exp()


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
