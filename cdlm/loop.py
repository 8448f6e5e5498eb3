"""The loop that every sampler shares: rows leave when they are done, and waiting requests enter at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cdlm.errors import CdlmError
from cdlm.types import Finished, join, take


@dataclass(frozen=True, eq=False)
class Request:
    """One sample to draw."""

    index: int
    """Its number: with the run's seed it fixes the sample's noise."""
    tokens: Int[Tensor, " n"]
    """Prompt tokens; ignored where not given."""
    given: Bool[Tensor, " n"]
    """True at prompt positions and padding; at least one position must be open."""
    valid: Bool[Tensor, " n"] | None = None
    """False on padding; None when no request of the run has any."""
    start: int | None = None
    """Where generation begins, from which blocks are counted; by default at the first open position."""


@runtime_checkable
class HasRows(Protocol):
    """Rows in flight: a nest of row-first tensors, one of which says which rows they are."""

    @property
    def row(self) -> Tensor: ...


L = TypeVar("L", bound=HasRows)


class Loop(ABC, Generic[L]):
    """One run, at most `batch_size` rows at a time; subclasses say what a step is."""

    def __init__(self, batch_size: int, device: torch.device | str = "cpu"):
        if batch_size < 1:
            raise CdlmError(f"batch_size must be >= 1, got {batch_size}")
        self.batch_size, self.device = batch_size, torch.device(device)

    @abstractmethod
    def admit(self, requests: list[Request], beside: L | None) -> L:
        """Rows of requests that enter, in the form of the rows `beside` which they join."""

    @abstractmethod
    def step(self, live: L) -> tuple[Finished, Any]:
        """One step of these rows, and what `advance` needs of them: a nest of row-first tensors."""

    @abstractmethod
    def advance(self, carried: Any) -> L:
        """The rows that stay, ready for their next step."""

    def choose(self, live: L) -> Int[Tensor, " k"] | None:
        """Rows that take the next step together; None for all."""
        return None

    def steps(self, requests: Iterable[Request]) -> Iterator[Finished]:
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
            if finished.done.any():
                carried = take(carried, (~finished.done).nonzero().squeeze(1))
            moved = None if bool(finished.done.all()) else self.advance(carried)
            live = moved if idle is None else idle if moved is None else join(idle, moved)

    def _split(self, live: L) -> tuple[L, L | None]:
        chosen = self.choose(live)
        if chosen is None or len(chosen) == len(live.row):
            return live, None
        others = torch.ones_like(live.row, dtype=torch.bool)
        others[chosen] = False
        return take(live, chosen), take(live, others.nonzero().squeeze(1))


def stack_masks(masks: list[Tensor | None], device: torch.device) -> Tensor | None:
    """Masks of requests, stacked; None if none has one."""
    present = [mask for mask in masks if mask is not None]
    return torch.stack(present).to(device) if present else None
