"""The contract of halting rules and the ways to combine them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from cdlm.errors import CdlmError
from cdlm.types import Decision, Rows, StepState

Memory = Any
"""A nest of row-first tensors; the loop drops, adds and reorders its rows."""


class Criterion(ABC):
    """A halting rule: small, frozen, and its own configuration. It reads predictions already made and costs no call.

    `a & b` halts when both do, `a | b` when either does.
    """

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Names of the signals that `look` reads (see `cdlm.signals.SIGNALS`)."""

    @abstractmethod
    def start(self, rows: Rows) -> Memory:
        """Memory of rows that enter."""

    @abstractmethod
    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        """The next memory, and which rows halt at this step."""

    def __and__(self, other: Criterion) -> Criterion:
        return And(self, other)

    def __or__(self, other: Criterion) -> Criterion:
        return Or(self, other)


class Stateless(Criterion):
    """A rule of the present step alone: subclasses say what it decides."""

    def start(self, rows: Rows) -> Memory:
        return ()

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        return memory, self.decide(state)

    @abstractmethod
    def decide(self, state: StepState) -> Decision: ...


@dataclass(frozen=True)
class Pair(Criterion):
    """Two rules that both look at every step; subclasses join what they say."""

    first: Criterion
    second: Criterion

    def __post_init__(self) -> None:
        for rule in (self.first, self.second):
            require_rule(type(self).__name__, rule)

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | self.second.needs

    def start(self, rows: Rows) -> Memory:
        return self.first.start(rows), self.second.start(rows)

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        one, a = self.first.look(memory[0], state)
        two, b = self.second.look(memory[1], state)
        return (one, two), Decision(self.join(a.halt, b.halt), {**b.info, **a.info})

    @abstractmethod
    def join(self, first: Bool[Tensor, " b"], second: Bool[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which rows halt."""


@dataclass(frozen=True)
class And(Pair):
    """Halts at a step at which both halt."""

    def join(self, first: Bool[Tensor, " b"], second: Bool[Tensor, " b"]) -> Bool[Tensor, " b"]:
        return first & second


@dataclass(frozen=True)
class Or(Pair):
    """Halts at a step at which either halts."""

    def join(self, first: Bool[Tensor, " b"], second: Bool[Tensor, " b"]) -> Bool[Tensor, " b"]:
        return first | second


@dataclass(frozen=True)
class For(Criterion):
    """Halts when `rule` has said so for `steps` >= 1 consecutive steps: patience, for any rule."""

    rule: Criterion
    steps: int

    def __post_init__(self) -> None:
        require_rule("For", self.rule)
        require_count("For", "steps", self.steps)

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def start(self, rows: Rows) -> Memory:
        return self.rule.start(rows), torch.zeros_like(rows.budget)

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        inner, decision = self.rule.look(memory[0], state)
        run = torch.where(decision.halt, memory[1] + 1, 0)
        return (inner, run), decision._replace(halt=run >= self.steps)


@dataclass(frozen=True)
class AfterStep(Criterion):
    """`rule`, from the `steps`-th step on (counted from 1); it looks at the earlier steps too but cannot halt there."""

    rule: Criterion
    steps: int

    def __post_init__(self) -> None:
        require_rule("AfterStep", self.rule)
        require_count("AfterStep", "steps", self.steps)

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def start(self, rows: Rows) -> Memory:
        return self.rule.start(rows)

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        memory, decision = self.rule.look(memory, state)
        return memory, decision._replace(halt=decision.halt & (state.step + 1 >= self.steps))


def require_rule(name: str, rule: object) -> None:
    """Raise unless `rule` is a halting rule."""
    if not isinstance(rule, Criterion):
        raise CdlmError(f"{name} needs a halting rule, got {rule!r}")


def require_count(rule: str, name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CdlmError(f"{rule} needs a whole number {name} >= 1, got {value!r}")


def require_positive(rule: str, name: str, value: float) -> None:
    """Raise unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CdlmError(f"{rule} needs a number {name} > 0, got {value!r}")
