"""Grids: the noise levels `t = sigma / alpha` that sampling walks along, float64; of all rows, or of each row alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.core.checks import Settings, check_number, check_object
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import Registry

if TYPE_CHECKING:
    from cdlm.continuous.schedules import Schedule


TINY = 1e-12
"""A change that is taken for none."""


class Seen(NamedTuple):
    """What a step shows of its rows, for the choice of their next level."""

    t: Float[Tensor, " b"]
    step: Int[Tensor, " b"]
    x0: Float[Tensor, "b n d"]
    """The estimate at t."""
    open: Bool[Tensor, "b n"]


class Walk(ABC):
    """A grid on the levels of a model: where rows begin, where each goes next, and where it is read out."""

    @property
    @abstractmethod
    def begin(self) -> float:
        """Noise level of the first step."""

    def start(self, z: Float[Tensor, "b n d"]) -> Any:
        """Memory of rows that begin, or begin their next block, in the states `z`."""
        return ()

    def ahead(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The level that follows each row's step, said before the step is made; at the last step, its own.

        Raises:
            CdlmError: it depends on what the step will show.
        """
        raise CdlmError(f"{type(self).__name__} chooses a level after the prediction: take a grid that all rows share")

    @abstractmethod
    def next(self, memory: Any, seen: Seen) -> tuple[Any, Float[Tensor, " b"]]:
        """The next memory and level of each row; of a row that is at its end, any."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """The most steps: a row is read out at the last of them."""

    def arrived(self, t: Float[Tensor, " b"]) -> Bool[Tensor, " b"] | None:
        """Rows that are read out at an earlier step, because of their level; None if no row ever is."""
        return None


class SharedLevels(Walk):
    """The same levels for all rows.

    Args:
        levels: of each step, on the CPU.
        device: where the rows are.
    """

    def __init__(self, levels: Float[Tensor, " steps"], device: torch.device | str = "cpu"):
        self._begin = float(levels[0])
        self._following = torch.cat([levels[1:], levels[-1:]]).to(device, fine(torch.device(device)))

    @property
    def begin(self) -> float:
        return self._begin

    @property
    def steps(self) -> int:
        return len(self._following)

    def ahead(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return self._following.index_select(0, step)

    def next(self, memory: Any, seen: Seen) -> tuple[Any, Float[Tensor, " b"]]:
        return memory, self.ahead(seen.step)


class Grid(Settings, ABC):
    """A way to space the steps of sampling."""

    @abstractmethod
    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        """`steps` noise levels from t_max down, float64 on the CPU; a sample is read out at the last.

        Raises:
            CdlmError: each row has levels of its own.
        """

    def walk(self, schedule: Schedule, steps: int, rho: float, device: torch.device) -> Walk:
        """The way of rows that take `steps` at most.

        Args:
            rho: norm of the embeddings.
        """
        return SharedLevels(self.levels(schedule, steps), device)


def _fractions(steps: int) -> Float[Tensor, " steps"]:
    if steps < 1:
        raise CdlmError(f"sampling needs steps >= 1, got {steps}: ask for at least one denoiser call")
    return torch.linspace(1, 0, steps, dtype=torch.float64)


@dataclass(frozen=True)
class Warped(Grid):
    """Equal steps in the schedule's own u: with a learned warp, equal loss between neighbours (CDCD, section 3.3)."""

    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        return schedule.t_of_u(_fractions(steps)).detach().cpu()


@dataclass(frozen=True)
class UniformT(Grid):
    """Equal steps in t."""

    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        return schedule.t_min + (schedule.t_max - schedule.t_min) * _fractions(steps)


@dataclass(frozen=True)
class LogT(Grid):
    """Equal steps in ln t."""

    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        low, high = math.log(schedule.t_min), math.log(schedule.t_max)
        return (low + (high - low) * _fractions(steps)).exp()


@dataclass(frozen=True)
class UpperEnds(Grid):
    """Equal steps in u that stop one short of u = 0: u = 1, ..., 2/N, 1/N (SSD-LM, arXiv 2210.17432)."""

    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        _fractions(steps)
        return schedule.t_of_u(torch.arange(steps, 0, -1, dtype=torch.float64) / steps).detach().cpu()


@dataclass(frozen=True)
class Truncated(Grid):
    """The beginning of another grid: its levels at so many more steps, without the last of them.

    Where tokens no longer change near the end of a grid, the same number of steps is better spent before.

    Args:
        grid: the whole.
        share: of its points that are walked, in (0, 1].
    """

    grid: Grid
    share: float

    def __post_init__(self) -> None:
        check_object("Truncated", Grid, grid=self.grid)
        if isinstance(self.grid, Adaptive):
            raise CdlmError(f"{self.grid!r} has an end of its own: give it, in embedding norms, in place of Truncated")
        check_number("Truncated", above=0, most=1, share=self.share, hint="0.6 leaves out the last 40 %")

    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        return self.grid.levels(schedule, max(steps, round(steps / self.share)))[:steps]


@dataclass(frozen=True)
class Adaptive(Grid):
    """Steps of each row's own, in ln t, as long as its estimate stays near that of the step before.

    A step is the one before times tolerance / change, where change is the root mean square, over open positions, of how
    far the estimate moved, in embedding norms: no further call. The number of steps of a run is the most a row may
    take; one that has not come to the end by then is read out where it is.

    Args:
        tolerance: change that a step may make, > 0; towards 0 all steps are `smallest`, as of a fine grid in ln t.
        end: level in embedding norms at which rows are read out; None is t_min.
        first: length of the first step, in ln t.
        smallest, largest: step, in ln t.
        shrink, grow: of one step beside the one before, shrink < 1 < grow.
    """

    tolerance: float = 0.04
    end: float | None = None
    first: float = 0.1
    smallest: float = 0.02
    largest: float = 0.7
    shrink: float = 0.33
    grow: float = 2.0

    def __post_init__(self) -> None:
        hint = "0.04 of an embedding norm is a good start"
        check_number("Adaptive", above=0.0, tolerance=self.tolerance, hint=hint)
        check_number("Adaptive", above=0.0, optional=True, end=self.end)
        check_number("Adaptive", above=0.0, first=self.first, smallest=self.smallest)
        check_number("Adaptive", least=self.smallest, largest=self.largest)
        check_number("Adaptive", above=0.0, below=1.0, shrink=self.shrink)
        check_number("Adaptive", above=1.0, grow=self.grow)

    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        raise CdlmError(f"{self!r} has no levels that all rows share: take another grid, such as LogT()")

    def walk(self, schedule: Schedule, steps: int, rho: float, device: torch.device) -> Walk:
        end = schedule.t_min if self.end is None else max(schedule.t_min, self.end * rho)
        return OwnLevels(self, schedule.t_max, min(end, schedule.t_max), steps, rho)


class LastStep(NamedTuple):
    """What a row with steps of its own keeps of the last."""

    length: Float[Tensor, " b"]
    """In ln t."""
    x0: Float[Tensor, "b n d"]
    """The estimate at its beginning: a solver with further calls leaves another one to self-conditioning."""


@dataclass(frozen=True)
class OwnLevels(Walk):
    """Rows whose steps are as long as `Adaptive` allows."""

    grid: Adaptive
    top: float
    end: float
    most: int
    rho: float

    @property
    def begin(self) -> float:
        return self.top

    @property
    def steps(self) -> int:
        return self.most

    def start(self, z: Float[Tensor, "b n d"]) -> LastStep:
        length = torch.full((len(z),), self.grid.first, dtype=fine(z.device), device=z.device)
        return LastStep(length, torch.zeros_like(z))

    def next(self, memory: LastStep, seen: Seen) -> tuple[LastStep, Float[Tensor, " b"]]:
        grid = self.grid
        moved = refined(seen.x0 - memory.x0).square().sum(-1) / self.rho**2 * seen.open
        change = (moved.sum(1) / seen.open.sum(1).clamp(min=1)).sqrt()
        other = memory.length * (grid.tolerance / change.clamp(min=TINY)).clamp(grid.shrink, grid.grow)
        length = torch.where(seen.step == 0, memory.length, other.clamp(grid.smallest, grid.largest))
        return LastStep(length, seen.x0), (seen.t * (-length).exp()).clamp(min=self.end)

    def arrived(self, t: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
        return t <= self.end


GRIDS: Registry[Grid] = Registry("grid", Grid, Warped, UniformT, LogT, UpperEnds, Truncated, Adaptive)
