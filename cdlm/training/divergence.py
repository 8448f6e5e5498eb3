"""Whether what is trained can still be used: finite weights and averages, and noise levels that rise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.models.system import System
from cdlm.training.sharding import local

LEVELS = 33
"""Places where the noise levels of a schedule are looked at."""


def diverged(what: str, checkpoint: Path) -> CdlmError:
    """The error that training went astray; `what` names the step."""
    kept = f"last good checkpoint: {checkpoint}" if checkpoint.exists() else "no checkpoint was saved before"
    return CdlmError(f"{what}; {kept}; resume with a lower learning rate")


def fault_of(system: System, name: str = "weights") -> str | None:
    """What is wrong with a system, in words that a step can follow; None if nothing is.

    Args:
        name: what its weights are called.
    """
    if not _all_finite([*system.parameters(), *system.buffers()]):
        return f"{name} became NaN or infinite"
    if system.learned_schedule is not None and not _rise(system):
        return "the noise levels of the schedule became NaN or infinite, or fall where they must rise,"
    return None


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(local(x).isfinite().all()) for x in tensors)


@torch.no_grad()
def _rise(system: System) -> bool:
    levels = system.levels(torch.linspace(0, 1, LEVELS, dtype=torch.float64))
    ends = bool(levels.isfinite().all()) and bool(0 < levels[0] < levels[-1])
    return ends and bool((levels.diff() >= -1e-9 * levels[1:]).all())
