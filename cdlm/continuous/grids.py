"""Grids: the noise levels `t = sigma / alpha` that sampling walks along, float64."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from cdlm.core.checks import check_number, check_object
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import Registry

if TYPE_CHECKING:
    from cdlm.continuous.schedules import Schedule


class Grid(ABC):
    """A way to space the steps of sampling."""

    @abstractmethod
    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        """`steps` noise levels from t_max down, float64 on the CPU; a sample is read out at the last."""


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
        check_number("Truncated", above=0, most=1, share=self.share, hint="0.6 leaves out the last 40 %")

    def levels(self, schedule: Schedule, steps: int) -> Float[Tensor, " steps"]:
        return self.grid.levels(schedule, max(steps, round(steps / self.share)))[:steps]


GRIDS: Registry[Grid] = Registry("grid", Grid, Warped, UniformT, LogT, UpperEnds, Truncated)
