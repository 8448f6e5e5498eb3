"""Rules that read the margin between the two best logits. Their papers are about masked models; here any model has one.

For their "masked" positions read "open": those that may still change. Frozen positions count as decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cdlm.core.checks import check_choice, check_number, check_whole
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory, Stateless
from cdlm.halting.rules.sweeps import geometric_thresholds


@dataclass(frozen=True)
class Prophet(Criterion):
    """Halt when the mean logit margin of the answer reaches a threshold that falls in three stages (arXiv 2508.19982).

    The threshold is `tau_high` while the share of the budget spent is below 0.33, `tau_mid` below 0.67, then `tau_low`.

    Args:
        region: the answer, positions [start, end) counted from the first one to generate, all of them, decided or not;
            by default all that is generated.
        one_based: count the present step as spent, as the published code does; the paper does not.

    The earliest halt is at the first step. With a region that holds nothing to generate it never halts.
    """

    tau_high: float = 7.5
    tau_mid: float = 5.0
    tau_low: float = 2.5
    region: tuple[int, int] | None = None
    one_based: bool = False

    def __post_init__(self) -> None:
        check_number("Prophet", infinite=True, tau_high=self.tau_high, tau_mid=self.tau_mid, tau_low=self.tau_low)
        check_choice("Prophet", (True, False), one_based=self.one_based)
        if self.region is not None and not _is_region(self.region):
            raise CdlmError(f"Prophet needs a region (start, end) with 0 <= start < end, got {self.region!r}")

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        scales = geometric_thresholds(8.0, 0.4, 25)
        return [cls(round(7.5 * s, 4), round(5.0 * s, 4), round(2.5 * s, 4), **fixed) for s in scales]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"span_margin"} if self.region is None else {"top1", "top2"})

    def start(self, rows: NewRows) -> Memory:
        if self.region is None:
            return ()
        start, end = self.region
        place = torch.arange(rows.open.shape[1], device=rows.open.device) - rows.open.long().argmax(1)[:, None]
        room = int(torch.where(rows.valid, place + 1, 0).amax(1).min())
        if end > room:
            raise CdlmError(f"Prophet's region {self.region} does not fit: a sample has {room} positions to generate")
        return rows.open & (place >= start) & (place < end)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        if self.region is None:
            margin = state.span_margin
        else:
            margin = torch.where(memory, state.top1 - state.top2, 0).sum(1) / memory.sum(1)  # NaN without an answer
        return memory, Decision(margin >= self.threshold(state), info={"margin": margin})

    def threshold(self, state: StepState) -> Float[Tensor, " b"]:
        """tau of each row at its step."""
        spent = (state.step + self.one_based) / state.budget
        late = torch.where(spent < 0.67, self.tau_mid, self.tau_low)
        return torch.where(spent < 0.33, self.tau_high, late)


@dataclass(frozen=True)
class SchED(Stateless):
    """Halt when the mean logit margin reaches a threshold that falls smoothly with progress p (arXiv 2512.02892).

    `linear`: high + (low - high) p; `cosine`: low + (high - low) (1 + cos(pi p)) / 2; `exp`: low + (high - low)
    exp(-k p), which does not reach `tau_low`.

    Args:
        variant: "code" averages over open positions, counts p = step / (budget - 1), and halts only at a step (from 0)
            at which no open position's token switched, so at the second at the earliest; "paper" averages over all that
            is generated, counts p = step / budget, and has no such guard: it can halt at the first.
    """

    tau_high: float = 7.5
    tau_low: float = 2.5
    schedule: Literal["linear", "cosine", "exp"] = "cosine"
    k: float = 4.0
    variant: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        check_number("SchED", infinite=True, tau_high=self.tau_high, tau_low=self.tau_low)
        if math.isinf(self.tau_high - self.tau_low):
            raise CdlmError(
                f"SchED cannot fall from {self.tau_high} to {self.tau_low}: give both a number, or the same"
            )
        check_number("SchED", above=0.0, k=self.k)
        check_choice("SchED", ("linear", "cosine", "exp"), schedule=self.schedule)
        check_choice("SchED", ("code", "paper"), variant=self.variant)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [
            cls(round(7.5 * scale, 4), round(2.5 * scale, 4), **fixed) for scale in geometric_thresholds(8.0, 0.4, 25)
        ]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"span_margin"} if self.variant == "paper" else {"margin", "switches"})

    def decide(self, state: StepState) -> Decision:
        tau = self.threshold(state)
        if self.variant == "paper":
            return Decision(state.span_margin >= tau, info={"margin": state.span_margin, "threshold": tau})
        halt = (state.margin >= tau) & (state.switches == 0)
        return Decision(halt, info={"margin": state.margin, "threshold": tau})

    def threshold(self, state: StepState) -> Float[Tensor, " b"]:
        """tau of each row at its step, float64; of a run of one step, `tau_low` in the code's count."""
        step, budget = refined(state.step), refined(state.budget)
        if self.variant == "paper":
            p = step / budget
        else:
            p = torch.where(budget > 1, step / (budget - 1).clamp(min=1), 1.0)
        gap = 0.0 if self.tau_high == self.tau_low else self.tau_high - self.tau_low
        if self.schedule == "linear":
            return self.tau_high - gap * p
        if self.schedule == "cosine":
            return self.tau_low + gap * (1 + (math.pi * p).cos()) / 2
        return self.tau_low + gap * (-self.k * p).exp()


@dataclass(frozen=True)
class JoT(Criterion):
    """Freeze each open position whose two best probabilities stand in a ratio of at least tau (arXiv 2602.11133).

    tau falls from `tau_max` to `tau_min` with the share of decided neighbours: one at distance d <= `distance` weighs
    `gamma` ** d; prompt and frozen positions are decided, padding and what lies outside are not. A row ends when every
    position is frozen: at its first step at the earliest.

    On a continuous model a frozen position is given from then on: the network sees its clean embedding, and its state
    goes on to follow the row's noise level. It still passes through the network, which the others attend to: calls are
    saved at the end of the row alone.
    """

    tau_max: float = 3.0
    tau_min: float = 1.0
    gamma: float = 0.5
    distance: int = 16

    needs = frozenset({"tokens", "top1", "top2"})
    freezes = True

    def __post_init__(self) -> None:
        check_number("JoT", tau_min=self.tau_min)
        check_number("JoT", above=float(self.tau_min), tau_max=self.tau_max)
        check_number("JoT", above=0.0, gamma=self.gamma)
        check_whole("JoT", distance=self.distance)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(tau_max, **fixed) for tau_max in geometric_thresholds(1e6, 3.0, 12)]

    def start(self, rows: NewRows) -> Memory:
        return rows.valid

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        # p1 / (p2 + 1e-12) without the normaliser: where the 1e-12 counts, p1 is 1.
        ratio = 1 / ((state.top2 - state.top1).exp() + 1e-12)
        settled = state.open & (ratio >= self.threshold(~state.open & memory))
        share = 1 - (state.open & ~settled).sum(1) / memory.sum(1)
        return memory, Decision(torch.zeros_like(state.open[:, 0]), settled, {"decided": share})

    def threshold(self, decided: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """tau of each position, float64."""
        weights = self.gamma ** torch.arange(1, self.distance + 1, dtype=fine(decided.device), device=decided.device)
        around = torch.cat([weights.flip(0), weights.new_zeros(1), weights])
        padded = torch.nn.functional.pad(refined(decided), (self.distance, self.distance))
        near = (padded.unfold(1, len(around), 1) * around).sum(-1) / around.sum()
        return self.tau_max - (self.tau_max - self.tau_min) * near.clamp(0, 1)


def _is_region(region: object) -> bool:
    if not (isinstance(region, tuple | list) and len(region) == 2):
        return False
    start, end = region
    return all(isinstance(x, int) and not isinstance(x, bool) for x in region) and 0 <= start < end
