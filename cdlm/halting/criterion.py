"""The contract of halting rules and the ways to combine them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from cdlm.core.checks import Settings, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.types import AttributeOrProperty, Decision, NewRows, SignalReader, StepState
from cdlm.halting.voting import ReadAnswers

Memory = Any
"""A nest of row-first tensors; the loop drops, adds and reorders its rows."""


class Criterion(SignalReader, Settings, ABC):
    """A halting rule: small, frozen, and its own configuration. It reads predictions already made and costs no call.

    `needs`, `modules`, `freezes` and `waits` may each be an attribute of the class or a property. `a & b` halts and
    freezes what both do, `a | b` what either does; there, to halt a row counts as freezing all of it.
    """

    freezes: AttributeOrProperty[bool] = False
    """Whether it can freeze positions. That changes the steps that follow, so it must run: no recording can be used."""

    waits: AttributeOrProperty[bool] = False
    """Whether a row goes on to its last step although nothing in it may change any more."""

    @property
    def live(self) -> bool:
        """Whether it has to run: it freezes positions, or reads activations, which no recording keeps."""
        return self.freezes or bool(self.modules)

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        """Settings to try on runs of `budget` steps, from strict to loose; `fixed` are the parameters not swept."""
        raise CdlmError(f"{cls.__name__} has no settings to sweep: write it with its arguments")

    def check_made_for(self, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
        """Raise if the rule was made for another model or sampler; a rule that was made for none fits all.

        Args:
            has_weights: whether the model's weights are those of a fingerprint.
            settings: of the sampler.
        """
        return

    def reading(self, read: ReadAnswers) -> Criterion:
        """The same rule, which reads answers of texts in this way if it needs any; most need none.

        Whoever runs a rule asks for it, as the rule's own settings say nothing of the model's tokenizer.
        """
        return self

    @abstractmethod
    def start(self, rows: NewRows) -> Memory:
        """Memory of rows that enter."""

    @abstractmethod
    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        """The next memory, and which rows halt at this step."""

    def __and__(self, other: Criterion) -> Criterion:
        return And(self, other)

    def __or__(self, other: Criterion) -> Criterion:
        return Or(self, other)


class Stateless(Criterion):
    """A rule without memory: subclasses decide from the present step alone."""

    def start(self, rows: NewRows) -> Memory:
        return ()

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        return memory, self.decide(state)

    @abstractmethod
    def decide(self, state: StepState) -> Decision: ...


@dataclass(frozen=True)
class Pair(Criterion):
    """Two rules that both look at every step; subclasses join their decisions."""

    first: Criterion
    second: Criterion

    def __post_init__(self) -> None:
        for rule in (self.first, self.second):
            check_rule(type(self).__name__, rule)

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | self.second.needs

    @property
    def modules(self) -> frozenset[str]:
        return self.first.modules | self.second.modules

    @property
    def freezes(self) -> bool:
        return self.first.freezes or self.second.freezes

    def check_made_for(self, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
        self.first.check_made_for(has_weights, settings)
        self.second.check_made_for(has_weights, settings)

    def reading(self, read: ReadAnswers) -> Criterion:
        return replace(self, first=self.first.reading(read), second=self.second.reading(read))

    def start(self, rows: NewRows) -> Memory:
        return self.first.start(rows), self.second.start(rows)

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        one, a = self.first.look(memory[0], state)
        two, b = self.second.look(memory[1], state)
        freeze = self.join(_settled(a, state), _settled(b, state)) if self.freezes else None
        return (one, two), Decision(self.join(a.halt, b.halt), freeze, {**b.info, **a.info})

    @abstractmethod
    def join(self, first: Bool[Tensor, "*b"], second: Bool[Tensor, "*b"]) -> Bool[Tensor, "*b"]:
        """Joins two masks: the rows that each rule halts, or the positions that each freezes."""


@dataclass(frozen=True)
class And(Pair):
    """Halts at a step at which both halt, and freezes what both settle."""

    @property
    def waits(self) -> bool:
        return self.first.waits or self.second.waits

    def join(self, first: Bool[Tensor, "*b"], second: Bool[Tensor, "*b"]) -> Bool[Tensor, "*b"]:
        return first & second


@dataclass(frozen=True)
class Or(Pair):
    """Halts at a step at which either halts, and freezes what either settles."""

    @property
    def waits(self) -> bool:
        return self.first.waits and self.second.waits

    def join(self, first: Bool[Tensor, "*b"], second: Bool[Tensor, "*b"]) -> Bool[Tensor, "*b"]:
        return first | second


@dataclass(frozen=True)
class For(Criterion):
    """Halts a row that `rule` has halted at `steps` >= 1 consecutive steps, and likewise freezes positions."""

    rule: Criterion
    steps: int

    def __post_init__(self) -> None:
        check_rule("For", self.rule)
        check_whole("For", steps=self.steps)

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def modules(self) -> frozenset[str]:
        return self.rule.modules

    @property
    def freezes(self) -> bool:
        return self.rule.freezes

    @property
    def waits(self) -> bool:
        return self.rule.waits

    def check_made_for(self, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
        self.rule.check_made_for(has_weights, settings)

    def reading(self, read: ReadAnswers) -> Criterion:
        return replace(self, rule=self.rule.reading(read))

    def start(self, rows: NewRows) -> Memory:
        runs = torch.zeros_like(rows.open, dtype=torch.int64) if self.freezes else None
        return self.rule.start(rows), torch.zeros_like(rows.budget), runs

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        inner, decision = self.rule.look(memory[0], state)
        run = torch.where(decision.halt, memory[1] + 1, 0)
        runs = torch.where(_settled(decision, state), memory[2] + 1, 0) if self.freezes else None
        freeze = None if runs is None else runs >= self.steps
        return (inner, run, runs), Decision(run >= self.steps, freeze, decision.info)


@dataclass(frozen=True)
class FromStep(Criterion):
    """`rule`, from the `steps`-th step on (counted from 1). It looks at earlier steps too, but does nothing there."""

    rule: Criterion
    steps: int

    def __post_init__(self) -> None:
        check_rule("FromStep", self.rule)
        check_whole("FromStep", steps=self.steps)

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def modules(self) -> frozenset[str]:
        return self.rule.modules

    @property
    def freezes(self) -> bool:
        return self.rule.freezes

    @property
    def waits(self) -> bool:
        return self.rule.waits

    def check_made_for(self, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
        self.rule.check_made_for(has_weights, settings)

    def reading(self, read: ReadAnswers) -> Criterion:
        return replace(self, rule=self.rule.reading(read))

    def start(self, rows: NewRows) -> Memory:
        return self.rule.start(rows)

    def look(self, memory: Memory, state: StepState) -> tuple[Memory, Decision]:
        memory, decision = self.rule.look(memory, state)
        late = state.step + 1 >= self.steps
        freeze = None if decision.freeze is None else decision.freeze & late[:, None]
        return memory, Decision(decision.halt & late, freeze, decision.info)


def _settled(decision: Decision, state: StepState) -> Bool[Tensor, "b n"]:
    """Positions that the decision settles: to halt a row is to freeze all of it, which makes & and | those of sets."""
    halted = decision.halt[:, None].expand_as(state.open)
    return halted if decision.freeze is None else halted | decision.freeze


def check_rule(name: str, rule: object) -> None:
    """Raise unless `rule` is a halting rule."""
    if not isinstance(rule, Criterion):
        raise CdlmError(f"{name} needs a halting rule, got {rule!r}")
