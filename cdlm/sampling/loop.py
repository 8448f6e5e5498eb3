"""The loop that every sampler shares: rows leave when they are done, and waiting requests enter at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from cdlm.core.checks import check_object, check_whole, shown
from cdlm.core.errors import CdlmError
from cdlm.core.trees import join, take
from cdlm.core.types import LoopStep
from cdlm.halting import Criterion, Full, Never
from cdlm.halting.signals import check_signals
from cdlm.sampling.prompts import MOST_SAMPLES
from cdlm.sampling.requests import Request


@dataclass(frozen=True)
class RunOptions:
    """What fixes a run beside the model and how it is sampled.

    Args:
        criterion: when a row is done before its last step.
        seed: of the run, >= 0.
        record: names of signals to compute at every step, for what consumes the loop.
    """

    criterion: Criterion = field(default_factory=Never)
    seed: int = 0
    record: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_whole("a run", least=0, seed=self.seed)
        check_object("a run", Criterion, criterion=self.criterion)
        check_signals(self.needs)

    @property
    def needs(self) -> frozenset[str]:
        """Signals that every step computes."""
        return self.record | self.criterion.needs

    @property
    def modules(self) -> frozenset[str]:
        """Modules of the network whose outputs every step keeps."""
        return self.criterion.modules

    @property
    def halts(self) -> bool:
        """Whether the rule can do anything: it need not be asked otherwise."""
        return type(self.criterion) not in (Full, Never)


@runtime_checkable
class HasRows(Protocol):
    """Rows in flight: a nest of row-first tensors, one of which says which rows they are."""

    @property
    def row(self) -> Tensor: ...


L = TypeVar("L", bound=HasRows)


def check_batch_size(size: object) -> None:
    """Raise unless it is a number of rows."""
    if type(size) is not int or not 1 <= size <= MOST_SAMPLES:
        raise CdlmError(f"batch_size must be >= 1 and at most {MOST_SAMPLES:,}, got {shown(size)}")


class Loop(ABC, Generic[L]):
    """One run, at most `batch_size` rows at a time; subclasses say what a step is."""

    def __init__(self, options: RunOptions, batch_size: int, device: torch.device | str = "cpu"):
        check_batch_size(batch_size)
        self.options, self.batch_size, self.device = options, batch_size, torch.device(device)

    @abstractmethod
    def budget(self, requests: Sequence[Request]) -> int:
        """Most steps that any of the requests may take."""

    @abstractmethod
    def admit(self, requests: list[Request], beside: L | None) -> L:
        """Rows of requests that enter, in the form of the rows `beside` which they join."""

    @abstractmethod
    def step(self, live: L) -> tuple[LoopStep, Any]:
        """One step of these rows, and what `advance` needs of them: a nest of row-first tensors."""

    @abstractmethod
    def advance(self, carried: Any) -> L:
        """The rows that stay, ready for their next step."""

    def choose(self, live: L) -> Int[Tensor, " k"] | None:
        """Rows that take the next step together, on the CPU; None for all."""
        return None

    def steps(self, requests: Iterable[Request]) -> Iterator[LoopStep]:
        """One item a step, until every request is served. Rows that finish leave; waiting requests enter at once."""
        waiting, live = iter(requests), None
        while True:
            fresh = list(islice(waiting, self.batch_size - (0 if live is None else len(live.row))))
            if fresh:
                entered = self.admit(fresh, live)
                live = entered if live is None else join(live, entered)
            if live is None:
                return
            served, idle = self._split(live)
            finished, carried = self.step(served)
            yield finished
            staying = finished.counts.staying
            if len(staying) < len(finished.counts.done):  # some leave
                carried = take(carried, torch.tensor(staying, dtype=torch.int64))
            moved = self.advance(carried) if staying else None
            live = moved if idle is None else idle if moved is None else join(idle, moved)

    def _split(self, live: L) -> tuple[L, L | None]:
        chosen = self.choose(live)
        if chosen is None or len(chosen) == len(live.row):
            return live, None
        others = torch.ones(len(live.row), dtype=torch.bool)
        others[chosen] = False
        return take(live, chosen), take(live, others.nonzero().squeeze(1))
