"""What fixes a run of a loop, written as one list: how it is sampled, its rule, its seed and what it records."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

from cdlm.continuous.sampler import Diffusion
from cdlm.halting import Criterion, Never
from cdlm.masked.sampler import Unmasking
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Policy
from cdlm.sampling.loop import RunOptions

OF_A_RUN = {field.name for field in fields(RunOptions)}


class Setup(NamedTuple):
    """A sampling and the options of a run, in the order of the loops: `DiffusionLoop(denoiser, *setup, batch_size)`."""

    sampling: Any
    options: RunOptions

    def but(self, **changes: Any) -> Setup:
        """The same with some of it replaced."""
        run = {name: changes.pop(name) for name in OF_A_RUN & changes.keys()}
        if "record" in run:
            run["record"] = frozenset(run["record"])
        return Setup(replace(self.sampling, **changes), replace(self.options, **run))


def diffusion(steps: int = 200, criterion: Criterion | None = None, **settings: Any) -> Setup:
    """A run of a continuous model."""
    return Setup(Diffusion(), RunOptions()).but(steps=steps, criterion=criterion or Never(), **settings)


def unmasking(
    policy: Policy | None = None, criterion: Criterion | None = None, temperature: float = 0.0, **settings: Any
) -> Setup:
    """A run of a masked model."""
    start = Setup(Unmasking(policy or LLaDA()), RunOptions())
    return start.but(criterion=criterion or Never(), temperature=temperature, **settings)
