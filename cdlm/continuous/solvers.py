"""Solvers: each joins two neighbouring grid points, and no more.

Some follow the probability-flow ODE `dz/dt = (z - x0) / t`, some draw fresh noise on the way or before it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cdlm.core.checks import Settings, check_number
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import Registry
from cdlm.core.rng import CHURN, StepNoise

Estimate = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(z, t, rows or None) -> (estimate that drives the state, plain x0): one prediction for those rows of the batch."""
Memory = Any
"""A nest of row-first tensors; the loop drops, joins and reorders its rows."""


class Interval(NamedTuple):
    """Rows on their way from one grid point to the next. They are independent and may stand at different levels."""

    z: Float[Tensor, "b n d"]
    """States at noise level t."""
    x0: Float[Tensor, "b n d"]
    """The estimate already made there."""
    t: Float[Tensor, " b"]
    t_next: Float[Tensor, " b"]
    """Below t."""
    draws: StepNoise
    """Where fresh noise comes from."""


class Advance(NamedTuple):
    """Where one interval led."""

    z: Float[Tensor, "b n d"]
    x0: Float[Tensor, "b n d"] | None
    """Plain estimate of a later call, for self-conditioning; None when the solver made none that is newer."""
    evaluations: Sequence[int]
    """Predictions of each row beyond the one handed in; the host counts them."""


class Solver(Settings, ABC):
    """Moves rows over one interval of the grid. What it has to know of the intervals before, it keeps as a memory."""

    looks_ahead: ClassVar[bool] = False
    """Whether `before` moves rows: the next level has to be known before the prediction."""

    def check(self, levels: Float[Tensor, " steps"]) -> None:
        """Raise what keeps it from walking these levels; asked of one that looks ahead, before the first step."""
        return

    def before(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], t_next: Float[Tensor, " b"], draws: StepNoise
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, " b"]]:
        """The states and levels at which the prediction is made, of rows at level t that go to t_next after it."""
        return z, t

    def start(self, z: Float[Tensor, "b n d"]) -> Memory:
        """Memory of rows that begin, or begin their next block, in the states `z`; by default there is none."""
        return ()

    def decided(self, memory: Memory, fixed: Bool[Tensor, "b n"], x0: Float[Tensor, "b n d"]) -> Memory:
        """The memory when the estimate at the `fixed` positions is `x0` from now on: they are decided, or no longer."""
        return memory

    @abstractmethod
    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        """The next memory of each row, and where the row is at the end of the interval."""


def _lerp(z: Tensor, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    return x0 + (t_next / t).to(z.dtype).view(-1, 1, 1) * (z - x0)


def _no_calls(t: Tensor) -> list[int]:
    return [0] * t.shape[0]


@dataclass(frozen=True)
class Euler(Solver):
    """`z' = (t'/t) z + (1 - t'/t) x0`: exact for a constant x0, the same map as DDIM (arXiv 2010.02502)."""

    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        z, x0, t, t_next, _ = interval
        return memory, Advance(_lerp(z, x0, t, t_next), None, _no_calls(t))


@dataclass(frozen=True)
class Churn(Euler):
    """Euler's step after a step back to more noise, at which the prediction is made (ELF, arXiv 2605.10938).

    In the time of a flow, tau = s / (s + t) with s = `noise_scale`, a step of length h from tau begins at
    `tau_b = (1 - gamma h) tau`, that is at t_b > t. The noise that leads there has the standard deviation
    sqrt(t_b^2 - t^2) in kind "exact": variances add, and the marginal at t_b is right. In kind "elf", as published, it
    has t_b - t: deviations are added, the state has less noise than t_b says, and samples come out as at a lower
    temperature (docs/churn.md). The last point of the grid takes no churn. Rows report the level t_b.

    Args:
        gamma: how far back, >= 0; 0 is Euler. In the paper 1.5 for 32 steps, 1 for 64.
        kind: "exact" or "elf".
        noise_scale: s > 0, in the units of the state: 2 in the paper, where each number of the data has variance 1.
    """

    looks_ahead = True

    gamma: float = 1.5
    kind: Literal["exact", "elf"] = "elf"
    noise_scale: float = 2.0

    def __post_init__(self) -> None:
        check_number("Churn", least=0, gamma=self.gamma, hint="0 is Euler")
        check_number("Churn", above=0, noise_scale=self.noise_scale)

    def check(self, levels: Float[Tensor, " steps"]) -> None:
        """Raise unless each step back ends before pure noise, at tau_b > 0."""
        longest = float(self._length(levels[:-1], levels[1:]).max()) if len(levels) > 1 else 0.0
        if self.gamma * longest >= 1:
            most = math.floor(100 / longest) / 100
            raise CdlmError(
                f"{self!r} goes back behind pure noise: the longest step of this grid is {longest:.3g} of the way from"
                f" noise to data, so take gamma below {most:g}, or more steps"
            )

    def before(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], t_next: Float[Tensor, " b"], draws: StepNoise
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, " b"]]:
        back, deviation = self.back(t, t_next)
        return z + deviation.to(z.dtype)[:, None, None] * draws.normal(z, CHURN), back

    def back(self, t: Float[Tensor, " b"], t_next: Float[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        """The level t_b, and the standard deviation of the noise that leads there."""
        share = self.gamma * self._length(t, t_next)
        more = share / (1 - share) * (self.noise_scale + t)  # t_b - t
        return t + more, more if self.kind == "elf" else (more * (2 * t + more)).sqrt()

    def _length(self, t: Float[Tensor, " b"], t_next: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Of a step, in tau."""
        s = self.noise_scale
        return s / (s + t) * ((t - t_next) / (s + t_next))


@dataclass(frozen=True)
class Heun(Solver):
    """Euler, then the mean of both slopes: second order, one more prediction an interval (arXiv 2206.00364, alg. 1)."""

    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        z, x0, t, t_next, _ = interval
        tilde = _lerp(z, x0, t, t_next)
        x0_tilde, plain = estimate(tilde, t_next, None)
        now, then = t.to(z.dtype)[:, None, None], t_next.to(z.dtype)[:, None, None]
        slope = (z - x0) / now + (tilde - x0_tilde) / then
        return memory, Advance(z + (then - now) / 2 * slope, plain, [1] * t.shape[0])


TINY = 1e-12
"""Least length of an interval in ln t that is divided by."""


class Before(NamedTuple):
    """What a two-step method keeps of the interval before."""

    x0: Float[Tensor, "b n d"]
    t: Float[Tensor, " b"]
    """Infinite where there was none, which makes the first interval one of Euler's."""


@dataclass(frozen=True)
class TwoStep(Solver):
    """Second order without a further call: the estimate is carried on along ln t (DPM-Solver++(2M), arXiv 2211.01095).

    `z' = (t'/t) z + (1 - t'/t) (x0 + h / (2 h_before) (x0 - x0_before))`, h = ln t - ln t'. The factor is 1 at most: a
    step that is much longer than the one before is not trusted further, and one after a step of no length not at all.
    """

    def start(self, z: Float[Tensor, "b n d"]) -> Before:
        return Before(torch.zeros_like(z), torch.full((len(z),), torch.inf, dtype=fine(z.device), device=z.device))

    def decided(self, memory: Before, fixed: Bool[Tensor, "b n"], x0: Float[Tensor, "b n d"]) -> Before:
        return memory._replace(x0=torch.where(fixed[..., None], x0, memory.x0))

    def advance(self, memory: Before, interval: Interval, estimate: Estimate) -> tuple[Before, Advance]:
        z, x0, t, t_next, _ = interval
        before = (memory.t / t).log()
        share = torch.where(before > 0, (t / t_next).log() / (2 * before.clamp(min=TINY)), 0).clamp(max=1)
        ahead = x0 + share.to(z.dtype)[:, None, None] * (x0 - memory.x0)
        return Before(x0, t), Advance(_lerp(z, ahead, t, t_next), None, _no_calls(t))


@dataclass(frozen=True)
class Ancestral(Solver):
    """A draw from q(z' | z, x0): `z' = x0 + (t'/t)^2 (z - x0) + t' sqrt(1 - (t'/t)^2) eps`.

    The reverse step of a variational diffusion model (arXiv 2107.00630, eq. 33), which Plaid samples with.
    """

    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        z, x0, t, t_next, draws = interval
        kept = (t_next / t).square()
        fresh = t_next * (-torch.expm1(2 * (t_next / t).log())).sqrt()  # near 1 the difference is exact in this form
        moved = x0 + kept.to(z.dtype)[:, None, None] * (z - x0) + fresh.to(z.dtype)[:, None, None] * draws.normal(z)
        return memory, Advance(moved, None, _no_calls(t))


@dataclass(frozen=True)
class Renoise(Solver):
    """`z' = x0 + t' eps`: the estimate under fresh noise, nothing of the state is kept (SSD-LM, section 3.3)."""

    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        z, x0, t, t_next, draws = interval
        return memory, Advance(x0 + t_next.to(z.dtype)[:, None, None] * draws.normal(z), None, _no_calls(t))


FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """Any one-step method of torchdiffeq, over tau in [0, 1] with t = t + tau (t' - t).

    Adaptive methods share one error norm over what they are given, so they get one row at a time; the others take the
    batch. Self-conditioning stays as it was at the start of the interval, which keeps the field a function of (z, t).

    Args:
        method: such as "midpoint", "rk4", "dopri5".
        rtol, atol: tolerances of the adaptive methods.
        double: integrate in float64 instead of float32.
    """

    method: str
    rtol: float = 1e-4
    atol: float = 1e-4
    double: bool = False

    def __post_init__(self) -> None:
        if self.method not in FIXED + ADAPTIVE:
            adams = "adams" in self.method
            why = "starts anew in each interval, where it is rk4" if adams else "is no method of torchdiffeq's for this"
            raise CdlmError(f"{self.method!r} {why}: use one of {', '.join(FIXED + ADAPTIVE)}")
        check_number("TorchDiffEq", above=0, rtol=self.rtol, atol=self.atol)

    def advance(self, memory: Memory, interval: Interval, estimate: Estimate) -> tuple[Memory, Advance]:
        z, x0, t, t_next, _ = interval
        rows = torch.arange(len(t), device=z.device)
        parts = rows.split(1) if self.method in ADAPTIVE else (rows,)
        moved = [self._integrate(estimate, z[part], x0[part], t[part], t_next[part], part) for part in parts]
        return memory, Advance(torch.cat([m[0] for m in moved]), None, [made for m in moved for made in m[1]])

    def _integrate(
        self, estimate: Estimate, z: Tensor, x0: Tensor, t: Tensor, t_next: Tensor, rows: Tensor
    ) -> tuple[Tensor, list[int]]:
        from torchdiffeq import odeint

        state = refined(z) if self.double else z.to(torch.promote_types(z.dtype, torch.float32))
        made = 0

        def slope(tau: Tensor, y: Tensor) -> Tensor:
            nonlocal made
            level = torch.lerp(t, t_next, tau.to(t))
            known = tau == 0 and torch.equal(y, state)  # the prediction at the start is already paid for
            if not known:
                made += 1
            target = x0 if known else estimate(y.to(z.dtype), level, rows)[0]
            return (t_next - t)[:, None, None].to(y.dtype) * (y - target) / level[:, None, None].to(y.dtype)

        tau = torch.tensor([0.0, 1.0], dtype=state.dtype, device=z.device)
        clock = {"dtype": fine(z.device)} if self.method in ADAPTIVE else None
        try:
            path = torch.as_tensor(
                odeint(slope, state, tau, method=self.method, rtol=self.rtol, atol=self.atol, options=clock)
            )
        except AssertionError as error:  # its word for a step size that shrank to nothing
            raise CdlmError(f"{self.method} cannot keep its tolerances ({error}): raise rtol and atol") from error
        return path[-1].to(z.dtype), [made] * len(rows)


SOLVERS: Registry[Solver] = Registry("solver", Solver, Euler, Heun, TwoStep, TorchDiffEq, Ancestral, Renoise, Churn)
