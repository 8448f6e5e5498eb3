"""Which noise levels to train on: a learned map between u in [0, 1] and t in [t_min, t_max].

Beside it the views of the noise level `t = sigma / alpha`. With alpha**2 + sigma**2 = 1: alpha = 1/sqrt(1+t**2),
sigma = t/sqrt(1+t**2), gamma = ln(sigma**2/alpha**2) = 2 ln t. All of gamma, sigma and t grow with the noise and
alpha falls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdlm.core.checks import check_number
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError


class Schedule(nn.Module, ABC):
    """The distribution of noise levels: u uniform in [0, 1] gives t; u = 0 is t_min, u = 1 is t_max. Float64.

    t is finite and positive for every u in [0, 1] and never falls as u rises.
    """

    invertible: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest u where `u_of_t` is the inverse: there `t_of_u(u_of_t(t))` is t to 1e-7 of t, and
    `u_of_t(t_of_u(u))` is u to 1e-7 wherever t rises with u. Outside, t is constant or too steep for float64."""

    @property
    @abstractmethod
    def t_min(self) -> float:
        """The least noise that training knows; it may be learned."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """The most."""

    @abstractmethod
    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]: ...

    @abstractmethod
    def u_of_t(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]: ...

    @abstractmethod
    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """du/dt at t."""

    @abstractmethod
    def fit(self, t: Float[Tensor, " b"], nats: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """Loss of the schedule's own parameters, given the losses of rows at levels t; both detached."""

    def slope(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """dt/du at u."""
        return 1 / self.density(self.t_of_u(u))

    def learn(
        self, u: Float[Tensor, " b"], scale: Callable[[], Float[Tensor, " b"]]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """(t, dt/du) for an objective whose gradient may reach the schedule; here it does not.

        Args:
            scale: called in the backward pass: by what each row's gradient of the schedule's shape is multiplied.
        """
        return self.t_of_u(u).detach(), self.slope(u).detach()

    @abstractmethod
    def after_step(self) -> None:
        """Called after each optimiser step."""


class TimeWarp(Schedule):
    """A piecewise linear CDF fitted to the loss as a function of the noise level (CDCD, section 3.3 and appendix A).

    `F~(t)`, with bin widths softmax(l_t) on the noise axis and bin heights exp(l_u), regresses the loss at t.
    Normalised, it is the CDF from which training draws t, so that the loss grows linearly with u. The same map spaces
    the steps of sampling. The noise axis is ln t by default: on the paper's linear axis almost all early draws are pure
    noise.

    Training and sampling read an exponential moving average of the logits. Bins never shrink below `floor`, a share of
    the axis.
    """

    def __init__(
        self,
        t_min: float,
        t_max: float,
        axis: Literal["log", "linear"] = "log",
        bins: int = 100,
        floor: float = 1e-4,
        ema: float = 0.99,
    ):
        super().__init__()
        check_range(t_min, t_max)
        self._range, self.axis, self.floor, self.ema = (t_min, t_max), axis, floor, ema
        self.logits = nn.Parameter(torch.full((2, bins), -math.log(bins)))
        self.averaged: Tensor
        self.register_buffer("averaged", self.logits.detach().clone())

    @property
    def t_min(self) -> float:
        return self._range[0]

    @property
    def t_max(self) -> float:
        return self._range[1]

    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        edges_t, edges_u = self._edges(self.averaged)
        return self._from_axis(_interpolate(u.to(edges_u), edges_u, edges_t)).clamp(self.t_min, self.t_max)

    def u_of_t(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        edges_t, edges_u = self._edges(self.averaged)
        return _interpolate(self._to_axis(t), edges_t, edges_u)

    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        edges_t, edges_u = self._edges(self.averaged)
        bin_ = _bin(self._to_axis(t), edges_t)
        slope = (edges_u.diff() / edges_t.diff())[bin_]
        if self.axis == "log":
            return slope / (refined(t) * math.log(self.t_max / self.t_min))
        return slope / (self.t_max - self.t_min)

    def fit(self, t: Float[Tensor, " b"], nats: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        axis = self._to_axis(t)
        with torch.no_grad():  # undo the non-uniform draw, so that every level of the axis counts alike
            edges_t, edges_u = self._edges(self.averaged)
            weight = (edges_t.diff() / edges_u.diff())[_bin(axis, edges_t)]
            weight = weight / weight.mean()
        widths = self._floored(refined(self.logits[0]).softmax(0))
        heights = self._heights(self.logits)
        predicted = _interpolate(axis, _cumulative(widths), _cumulative(heights))
        return (weight * (predicted - refined(nats)).square()).mean()

    @torch.no_grad()
    def after_step(self) -> None:
        self.averaged.lerp_(self.logits, 1 - self.ema)

    def _edges(self, logits: Float[Tensor, "2 bins"]) -> tuple[Float[Tensor, " edges"], Float[Tensor, " edges"]]:
        widths = self._floored(refined(logits).softmax(-1))
        edges_t = _cumulative(widths[0])
        edges_u = _cumulative(widths[1])
        return edges_t / edges_t[-1], edges_u / edges_u[-1]

    def _heights(self, logits: Float[Tensor, "2 bins"]) -> Float[Tensor, " bins"]:
        return refined(logits[1]).exp() + self.floor

    def _floored(self, widths: Float[Tensor, "... bins"]) -> Float[Tensor, "... bins"]:
        return (widths + self.floor) / (1 + self.floor * widths.shape[-1])

    def _to_axis(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        t = refined(t)
        if self.axis == "log":
            return (t / self.t_min).log() / math.log(self.t_max / self.t_min)
        return (t - self.t_min) / (self.t_max - self.t_min)

    def _from_axis(self, x: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        if self.axis == "log":
            return self.t_min * (x * math.log(self.t_max / self.t_min)).exp()
        return self.t_min + x * (self.t_max - self.t_min)


def _cumulative(widths: Float[Tensor, " bins"]) -> Float[Tensor, " edges"]:
    return torch.cat([widths.new_zeros(1), widths.cumsum(0)])


def _bin(x: Float[Tensor, " b"], edges: Float[Tensor, " edges"]) -> Tensor:
    return torch.searchsorted(edges.detach(), x.contiguous(), right=True).sub_(1).clamp_(0, len(edges) - 2)


def _interpolate(
    x: Float[Tensor, " b"], inputs: Float[Tensor, " edges"], outputs: Float[Tensor, " edges"]
) -> Float[Tensor, " b"]:
    """The piecewise linear function through (inputs, outputs); swap the two for its inverse."""
    i = _bin(x, inputs)
    return outputs[i] + (outputs[i + 1] - outputs[i]) * (x - inputs[i]) / (inputs[i + 1] - inputs[i])


class LogitNormal(Schedule):
    """Times of a flow with normal log-odds, `tau = sigmoid(mean + deviation Phi^-1(1 - u))` (ELF, arXiv 2605.10938).

    tau is the share of the data in the state of the flow `tau x + (1 - tau) noise_scale eps`, from noise at 0 to data
    at 1. In the units of z = x + t eps its level is `t = noise_scale (1 - tau) / tau`, so that ln t is normal. The
    distribution is cut off at tau = 1e-4, where u = 1 and t = 9999 noise_scale, and at tau = 1 - 1e-4, where u = 0 and
    t = noise_scale / 9999. `UpperEnds` on it is the grid of ELF's quantiles without its last point, tau = 1.

    Args:
        mean, deviation: of the log-odds of tau; deviation > 0. More mean is less noise.
        noise_scale: standard deviation of the noise at tau = 0, > 0, where that of the data is 1.
    """

    invertible = (1e-300, 1 - 1e-8)

    def __init__(self, mean: float = -1.5, deviation: float = 0.8, noise_scale: float = 2.0):
        super().__init__()
        check_number("LogitNormal", mean=mean)
        check_number("LogitNormal", above=0, deviation=deviation, noise_scale=noise_scale)
        self.mean, self.deviation, self.noise_scale = mean, deviation, noise_scale
        furthest = math.log1p(-EDGE) - math.log(EDGE)
        self._ends = (mean - furthest) / deviation, (mean + furthest) / deviation
        self._below, self._above = (0.5 * math.erfc(away / math.sqrt(2)) for away in (-self._ends[0], self._ends[1]))
        self._kept = 1 - self._below - self._above
        if not self._kept > 0:
            raise CdlmError(f"LogitNormal({mean}, {deviation}) has no time between 1e-4 and 1 - 1e-4: lower |mean|")

    @property
    def t_min(self) -> float:
        return self.noise_scale * EDGE / (1 - EDGE)

    @property
    def t_max(self) -> float:
        return self.noise_scale * (1 - EDGE) / EDGE

    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        # Each half of the distribution from its own end: a share next to 1 has no digits left.
        below, above = self._below + self._kept * refined(u), self._above + self._kept * (1 - refined(u))
        normal = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above)).clamp(*self._ends)
        return (math.log(self.noise_scale) - self.mean + self.deviation * normal).exp().clamp(self.t_min, self.t_max)

    def u_of_t(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        normal = self._normal(t)
        share = torch.special.erfc(normal.abs() / math.sqrt(2)) / 2  # ndtr loses the digits of small shares
        return torch.where(
            normal < 0, (share - self._below) / self._kept, 1 - (share - self._above) / self._kept
        ).clamp(0, 1)

    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        bell = (-self._normal(t).square() / 2).exp() / math.sqrt(2 * math.pi)
        return bell / (self._kept * self.deviation * refined(t))

    def slope(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        density = self.density(self.t_of_u(u))
        return torch.where(density > 0, 1 / density, 0).clamp(max=STEEPEST)

    def fit(self, t: Float[Tensor, " b"], nats: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        return torch.zeros((), dtype=fine(t.device), device=t.device)  # nothing to learn

    def after_step(self) -> None:
        return

    def _normal(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """How many deviations ln t lies above its mean."""
        return (((refined(t) / self.noise_scale).log() + self.mean) / self.deviation).clamp(*self._ends)


EDGE = 1e-4
"""Times of a flow that are cut off at each end."""
STEEPEST = 1e300
"""The most that the slope at an end of a flow is said to be; further out it is 0."""


def alpha_of(t: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Signal scale of the variance-preserving view."""
    return torch.rsqrt(1 + t.square())


def gamma_of(t: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Minus the log signal-to-noise ratio."""
    return 2 * t.log()


def t_of_gamma(gamma: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Inverse of `gamma_of`."""
    return (gamma / 2).exp()


def check_range(t_min: float, t_max: float) -> None:
    """Raise unless 0 < t_min < t_max < infinity."""
    if not 0 < t_min < t_max < math.inf:
        raise CdlmError(f"noise levels need 0 < t_min < t_max, got t_min={t_min:g} and t_max={t_max:g}: lower t_min")
