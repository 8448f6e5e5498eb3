"""Rules that a small head decides, which was trained on recorded runs of the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from cdlm.core.checks import check_number, check_object
from cdlm.core.errors import CdlmError
from cdlm.core.types import Decision, NewRows, StepState
from cdlm.halting.criterion import Criterion, Memory
from cdlm.halting.head import Head, features_of, look_at, read_head, start_rows
from cdlm.halting.rules.sweeps import geometric_thresholds


class ByHead(Criterion):
    """A rule that reads a head; subclasses say what they make of its answer."""

    path: str
    digest: str
    _head: Head

    def _open(self) -> None:
        """Read the head, and note or check which one it is."""
        name = type(self).__name__
        check_object(name, str, path=self.path, digest=self.digest)
        head, digest = read_head(Path(self.path))
        if self.digest not in ("", digest):
            raise CdlmError(
                f"{name} was set for the halting head {self.digest}, and {self.path} has {digest}, trained since: set"
                " it again, with cdlm calibrate or without a digest"
            )
        object.__setattr__(self, "_head", head)
        object.__setattr__(self, "digest", digest)

    @property
    def needs(self) -> frozenset[str]:
        return self._head.needs

    def check_made_for(self, has_weights: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
        self._head.check_made_for(has_weights, settings)

    def start(self, rows: NewRows) -> Memory:
        return start_rows(rows)

    def look(self, memory: Any, state: StepState) -> tuple[Memory, Decision]:
        memory = look_at(memory, state)
        settled, loss = self._head(features_of(self._head.features, memory, state)).unbind(1)
        return memory, Decision(self.done(settled, loss, state), info={"settled": settled, "expected_loss": loss})

    @abstractmethod
    def done(self, settled: Float[Tensor, " b"], loss: Float[Tensor, " b"], state: StepState) -> Bool[Tensor, " b"]:
        """Rows that halt, of the chance that all their tokens are final, and the expected share that is not."""


@dataclass(frozen=True)
class Learned(ByHead):
    """Halt when the chance that the tokens are those of the full run exceeds a threshold, by a head trained on
    recordings (after Learn2PD, arXiv 2509.25188).

    At a threshold of 0 every row halts at its first step; at 1 none ever does.

    Args:
        path: folder of the head, as cdlm train-halting wrote it.
        threshold: a chance, from 0 to 1.
        digest: of the head that the threshold was set for; by default the one that is there.
    """

    path: str
    threshold: float
    digest: str = ""
    _head: Head = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("Learned", least=0.0, most=1.0, threshold=self.threshold)
        self._open()

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(threshold=round(1 - x, 6), **fixed) for x in geometric_thresholds(1e-4, 0.99, 30)]

    def done(self, settled: Float[Tensor, " b"], loss: Float[Tensor, " b"], state: StepState) -> Bool[Tensor, " b"]:
        return settled > self.threshold


@dataclass(frozen=True)
class Stop(ByHead):
    """Halt when the expected loss is worth the calls that it saves: loss <= price * share of the steps that are left.

    The loss is the share of tokens that differ from those of the full run, as a head trained on recordings expects it.
    One price traces the whole trade of tokens for calls. The rule looks one step ahead: it does not ask what it would
    expect after the next step.

    Args:
        path: folder of the head, as cdlm train-halting wrote it.
        price: of all the steps, in shares of the tokens, >= 0; at 0 no row halts.
        digest: of the head that the price was set for; by default the one that is there.
    """

    path: str
    price: float
    digest: str = ""
    _head: Head = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("Stop", least=0.0, price=self.price)
        self._open()

    @classmethod
    def sweep(cls, budget: int, **fixed: Any) -> Sequence[Criterion]:
        return [cls(price=price, **fixed) for price in geometric_thresholds(1e-4, 1.0, 30)]

    def done(self, settled: Float[Tensor, " b"], loss: Float[Tensor, " b"], state: StepState) -> Bool[Tensor, " b"]:
        return loss <= self.price * (1 - (state.step + 1) / state.budget)
