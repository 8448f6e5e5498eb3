"""How likely a text is to a continuous model: the variational bound, and the density of its probability-flow ODE.

Both are in nats, summed over the positions of a row that are scored, and hold for any denoiser. With self-conditioning
the denoiser is the second of two calls, the first of which has no estimate: a function of the state alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.objectives import squared_error
from cdlm.continuous.schedules import Schedule
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import (
    BOUND,
    ODE,
    LikelihoodSettings,
    Nats,
    Ode,
    Progress,
    Text,
    in_batches,
    stratified_error,
)
from cdlm.core.rng import generator
from cdlm.core.types import Condition, Prediction
from cdlm.models.system import row_cross_entropy

if TYPE_CHECKING:
    from cdlm.continuous.system import EmbeddingDiffusion

BOUND_NOISE, FLOW_NOISE = 0x626F, 0x666C
"""Purposes of noise: a word of its key."""


def nats(
    system: EmbeddingDiffusion, text: Text, settings: LikelihoodSettings, progress: Progress | None = None
) -> dict[str, Nats]:
    """The bound of each row, and the likelihood of the ODE if the settings have one; see `Model.nats`.

    A system that generates block by block is scored block by block.
    """
    rows, weight = len(text.tokens), next(system.parameters())
    parts, origin = (text, torch.arange(rows)) if system.block is None else by_block(text, system.block)
    scores: dict[str, Callable[[Text], Nats]] = {
        BOUND: lambda part: bound(system, part, settings.levels, settings.seed, read_out=settings.read_out)
    }
    if (ode := settings.ode) is not None:
        check_precision(system, weight.dtype, weight.device)  # before the bound, which takes long
        scores[ODE] = lambda part: ode_nats(system, part, ode, settings.seed, read_out=settings.read_out)
    found = {name: in_batches(score, parts, name, settings, weight.device, progress) for name, score in scores.items()}
    return {name: made.summed(origin.cpu(), rows) for name, made in found.items()}


def check_text(denoiser: Denoiser, text: Text) -> None:
    """Raise if a row has nothing to score, padding is to be scored, or something is given to a network that does not
    tell given positions from noisy ones."""
    padding = None if text.valid is None else ~text.valid
    if not bool(text.target.any(1).all()) or (padding is not None and bool((text.target & padding).any())):
        raise CdlmError("each row needs a position to score, and padding is none: choose other positions")
    if not denoiser.sees_given and bool(text.given.any()):
        raise CdlmError("this network does not tell given positions from noisy ones: score whole rows")


def by_block(text: Text, size: int) -> tuple[Text, Int[Tensor, " k"]]:
    """A row for each block, and the row that each is of. The likelihood of a row is the product over its blocks.

    A block is the next `size` positions to score. What is before it is given, what is after it is hidden as padding.
    """
    order = text.target.cumsum(1)
    blocks = (order[:, -1] + size - 1) // size
    origin = torch.arange(len(blocks), device=order.device).repeat_interleave(blocks)
    number = torch.arange(len(origin), device=order.device) - (blocks.cumsum(0) - blocks)[origin]
    rank, first = order[origin] - 1, (number * size)[:, None]
    now = text.target[origin] & (rank >= first) & (rank < first + size)
    valid = now.flip(1).cumsum(1).flip(1) > 0
    if text.valid is not None:
        valid = valid & text.valid[origin]
    return Text(text.tokens[origin], now, valid, torch.cat([text.key[origin], number[:, None]], 1)), origin


@dataclass(frozen=True, eq=False)
class Estimate:
    """(z, t) -> the prediction for the rows of a text, a function of the state alone.

    Args:
        two_passes: the denoiser is called twice, and the second call gets the estimate of the first.
    """

    denoiser: Denoiser
    condition: Condition
    two_passes: bool

    @classmethod
    def of(cls, denoiser: Denoiser, text: Text, two_passes: bool | None = None) -> Estimate:
        """Of a text; by default there are two passes if the system was trained with self-conditioning."""
        if two_passes is None:
            two_passes = denoiser.self_conditioning > 0
        clean = denoiser.embed(text.tokens) * text.given[..., None]
        return cls(denoiser, Condition(clean, text.target, torch.zeros_like(clean), text.valid), two_passes)

    def __call__(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Prediction:
        condition = self.condition
        if self.two_passes:
            condition = condition._replace(x0=self.denoiser.denoise(z, t, condition).x0)
        return self.denoiser.denoise(z, t, condition)


# --- the bound --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bound(
    denoiser: Denoiser,
    text: Text,
    levels: int = 8,
    seed: int = 0,
    two_passes: bool | None = None,
    read_out: float | None = None,
) -> Nats:
    """The variational bound on -ln p(text), which holds for any denoiser (arXiv 2107.00630; Plaid, 2305.18619).

    With z = e + t eps, x0 the estimate, and t the level of u in [0, 1], the sum of three terms:

        prior           KL(N(e, t_max^2) || N(0, prior_std^2)), in closed form
        reconstruction  -ln p(token | z) at `read_out`
        diffusion       integral over t from there to t_max of ||x0 - e||^2 / t^3

    The integral is a mean over levels of which half are even in the schedule's u and half in ln t, weighed by the
    density of both together: what a schedule that fits badly hardly visits would else be missing, unnoticed.

    Args:
        levels: draws of each row, >= 1: one in each of so many equal parts of the levels, and as many at `read_out`.
        seed: with the key of a row it fixes its noise.
        two_passes: by default whether the system was trained with self-conditioning.
        read_out: noise level in [t_min, t_max) at which tokens are read out; by default t_min. It is a bound at each;
            a higher one helps where the network is wrong about little noise.

    Returns:
        The terms, and an upper estimate of their error, since neighbouring levels also differ in their mean.

    Raises:
        CdlmError: see `check_text`.
    """
    if levels < 1:
        raise CdlmError(f"the bound needs levels >= 1, got {levels}")
    check_text(denoiser, text)
    estimate, clean = Estimate.of(denoiser, text, two_passes), denoiser.embed(text.tokens)
    first = _first(denoiser.schedule, read_out, clean.device)
    keys = text.key.tolist()
    low = denoiser.schedule.t_of_u(torch.full((len(keys),), first, dtype=fine(clean.device), device=clean.device))
    reconstruction, diffusion = [], []
    for level in range(levels):
        u, eps = _bound_noise([(seed, BOUND_NOISE, *key, level) for key in keys], text, clean)
        t, weight = _level((level + u) / levels, denoiser.schedule, first)
        x0 = estimate(_noisy(clean, t, eps[:, :, 0]), t).x0
        diffusion.append(weight / t**3 * squared_error(refined(x0), refined(clean), text.target))
        logits = estimate(_noisy(clean, low, eps[:, :, 1]), low).logits
        reconstruction.append(refined(row_cross_entropy(logits, text.tokens, text.target)[0]))
    at_end, between = torch.stack(reconstruction, 1), torch.stack(diffusion, 1)
    terms = {"prior": _prior_nats(denoiser, clean, text.target), "reconstruction": at_end.mean(1)}
    return Nats({**terms, "diffusion": between.mean(1)}, stratified_error(at_end + between), text.target.sum(1))


def _first(schedule: Schedule, read_out: float | None, device: torch.device) -> float:
    """The u of the level at which tokens are read out."""
    if read_out is None:
        return 0.0
    if not schedule.t_min <= read_out < schedule.t_max:
        raise CdlmError(
            f"read_out is a noise level of the schedule, from {schedule.t_min:.4g} to below {schedule.t_max:.4g}, got"
            f" {read_out}"
        )
    return schedule.u_of_t(torch.tensor([read_out], dtype=fine(device), device=device)).item()


def _level(v: Float[Tensor, " b"], schedule: Schedule, first: float) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(t, 1 / density of t) for v uniform in [0, 1]: the lower half is even in u from `first` on, the upper half in
    ln t."""
    low, high = (schedule.t_of_u(torch.full_like(v, end)) for end in (first, 1.0))
    width, u = (high / low).log(), first + (1 - first) * (2 * v).clamp(max=1)
    t = torch.where(v < 0.5, schedule.t_of_u(u), low * (width * (2 * v - 1)).exp())
    weight = 2 / (schedule.density(t) / (1 - first) + 1 / (t * width))
    return t, torch.where((v < 0.5) & (schedule.slope(u) == 0), 0, weight)  # where t stands still, u covers nothing


def _bound_noise(
    keys: list[tuple[int, ...]], text: Text, like: Float[Tensor, "b n d"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b n 2 d"]]:
    made = [generator(*key) for key in keys]  # on the CPU, as in sampling
    u = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in made])
    sizes = zip(text.sizes, made, strict=True)
    eps = [torch.randn(2, size, like.shape[-1], generator=g).transpose(0, 1) for size, g in sizes]
    return u.to(like.device, fine(like.device)), text.spread(eps).to(like)


def _noisy(
    clean: Float[Tensor, "b n d"], t: Float[Tensor, " b"], eps: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n d"]:
    return clean + t.to(clean.dtype)[:, None, None] * eps


def _prior_nats(denoiser: Denoiser, clean: Float[Tensor, "b n d"], target: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    one = torch.ones(1, dtype=fine(clean.device), device=clean.device)
    variance = denoiser.prior_std**2
    ratio = denoiser.schedule.t_of_u(one).square() / variance
    each = refined(clean).square().sum(-1) / variance + clean.shape[-1] * (ratio - 1 - ratio.log())
    return 0.5 * (each * target).sum(1)


# --- the density of the ODE -------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """All that is arbitrary or random in one solution of the ODE."""

    levels: Float[Tensor, " k"]
    """Noise levels t from t_min to t_max or back, float64: the grid of the solver."""
    noise: Float[Tensor, "b n d"]
    """eps of the first state, e + t_min eps."""
    probe: Callable[[], Float[Tensor, "p b n d"]]
    """Directions u along which the Jacobian is measured. Called once per evaluation of the right-hand side; their mean
    of u u^T should be the identity. The same each time; evaluators that draw new ones each time add noise."""


def ode_nats(
    denoiser: Denoiser,
    text: Text,
    ode: Ode | None = None,
    seed: int = 0,
    two_passes: bool | None = None,
    read_out: float | None = None,
) -> Nats:
    """-ln p(text) of the model whose states follow the probability-flow ODE, estimated from above; see `walk_nats`.

    The trace is estimated along random directions that stay fixed during a solution (Hutchinson; FFJORD, 1810.01367).
    The derivative goes through both passes of self-conditioning.

    Args:
        read_out: noise level in [t_min, t_max) at which tokens are read out, where the ODE starts; by default t_min.

    Returns:
        The terms of `walk_nats`, averaged over the probes, and the standard error over them.

    Raises:
        CdlmError: see `check_text`; or the network runs in half precision.
    """
    ode = ode or Ode()
    like = denoiser.embed(text.tokens).detach()
    first = _first(denoiser.schedule, read_out, like.device)
    levels = denoiser.schedule.t_of_u(torch.linspace(first, 1, ode.steps + 1, dtype=torch.float64)).detach().cpu()
    made = []
    for number in range(ode.probes):
        sources = [generator(seed, FLOW_NOISE, *key, number) for key in text.key.tolist()]
        shapes = [(size, like.shape[-1]) for size in text.sizes]
        eps = text.spread([torch.randn(shape, generator=g) for shape, g in zip(shapes, sources, strict=True)])
        along = text.spread([_direction(ode.law, shape, g) for shape, g in zip(shapes, sources, strict=True)])
        probe = along[None].to(like.device, ode.state)
        made.append(walk_nats(denoiser, text, Walk(levels, eps.to(like.device), lambda p=probe: p), ode, two_passes))
    draws = torch.stack([nats.total for nats in made], 1)
    terms = {name: torch.stack([nats.terms[name] for nats in made]).mean(0) for name in made[0].terms}
    error = draws.std(1) / math.sqrt(ode.probes) if ode.probes > 1 else torch.full_like(draws[:, 0], math.nan)
    return Nats(terms, error, made[0].positions)


def walk_nats(
    denoiser: Denoiser, text: Text, walk: Walk, ode: Ode | None = None, two_passes: bool | None = None
) -> Nats:
    """One solution with everything handed in; of `ode` only `method` and `state` matter.

    In y = z / t and s = 1 / t the ODE is dy/ds = x0, and along it d ln p(y) / ds = -trace(d x0 / d y). From
    y_0 = e / t_min + eps at s = 1/t_min to y_1 at s = 1/t_max, D = positions * dim numbers of each row are scored:

        -ln p(y_0) = D/2 ln(2 pi) + D ln(c) + ||y_1||^2 / (2 c^2) + integral of the trace over s from 1/t_max to 1/t_min

    where y_1 is normal with deviation c = prior_std / t_max. The text is bounded by the mean over eps of
    -ln p(text | y_0) - ln p(y_0) + ln q(y_0 | text), and ln q = -D/2 ln(2 pi) - ||eps||^2 / 2. Hence three terms:

        reconstruction  -ln p(text | y_0)
        flow            integral of the trace
        prior           D ln(c) + ||y_1||^2 / (2 c^2) - ||eps||^2 / 2

    For a perfect denoiser and an exact trace each draw is -ln p(text): the last term uses the eps that was drawn, not
    its mean D/2, whose deviation of sqrt(D/2) nats would drown everything.
    """
    check_text(denoiser, text)
    ode = ode or Ode()
    solution = solve(Estimate.of(denoiser, text, two_passes), text, walk, ode)
    c, size = denoiser.prior_std / denoiser.schedule.t_max, text.target.sum(1) * walk.noise.shape[-1]
    eps = (refined(walk.noise) * text.target[..., None]).square().sum((1, 2))
    prior = size * math.log(c) + solution.length / (2 * c**2) - 0.5 * eps
    terms = {"prior": prior, "reconstruction": solution.reconstruction, "flow": solution.trace}
    return Nats(terms, torch.full_like(prior, math.nan), text.target.sum(1))


class Solution(NamedTuple):
    """A solved ODE, float64."""

    reconstruction: Float[Tensor, " b"]
    trace: Float[Tensor, " b"]
    """Integral over s from 1/t_max to 1/t_min."""
    length: Float[Tensor, " b"]
    """||y_1||^2 over the positions that are scored."""


@torch.no_grad()
def solve(estimate: Estimate, text: Text, walk: Walk, ode: Ode) -> Solution:
    """The state and the trace along the ODE; of `ode` only `method` and `state` matter.

    Raises:
        CdlmError: the network runs in half precision.
    """
    from torchdiffeq import odeint

    clean = estimate.denoiser.embed(text.tokens)
    check_precision(estimate.denoiser, clean.dtype, clean.device)
    open_ = text.target[..., None]
    s = (1 / walk.levels.double().sort().values).to(clean.device, fine(clean.device))
    start = (s[0] * refined(clean) + refined(walk.noise)).to(ode.state)
    logits = estimate((start / s[0]).to(clean.dtype), (1 / s[:1]).expand(len(start))).logits
    nats, _ = row_cross_entropy(logits, text.tokens, text.target)

    def slope(s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _slope(estimate, refined(s), state[0], walk.probe(), open_)

    # Only the ends are kept; the steps in between are those of the grid.
    path = odeint(
        slope, (start, start.new_zeros(len(start))), s[[0, -1]], method=ode.method,
        options={"grid_constructor": lambda func, y0, t: s},
    )  # fmt: skip
    y, gained = (refined(part[-1]) for part in path)
    return Solution(refined(nats), -gained, (y * open_).square().sum((1, 2)))


def _slope(
    estimate: Estimate, s: Float[Tensor, ""], y: Float[Tensor, "b n d"], probes: Float[Tensor, "p b n d"],
    open_: Bool[Tensor, "b n 1"],
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, " b"]]:  # fmt: skip
    """x0 and the trace of its Jacobian in y, over the positions that are scored."""
    dtype = estimate.condition.clean.dtype
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        x0 = estimate((y / s).to(dtype), (1 / s).expand(len(y))).x0.to(y.dtype) * open_
        trace = y.new_zeros(len(y))
        for u in probes.to(y) * open_:
            (turned,) = torch.autograd.grad(x0, y, u, retain_graph=True)
            trace += (turned * u).sum((1, 2)) / len(probes)
    return x0.detach(), trace


def _direction(law: str, shape: tuple[int, int], source: torch.Generator) -> Float[Tensor, "n d"]:
    if law == "gaussian":
        return torch.randn(shape, generator=source)
    return 2.0 * torch.randint(0, 2, shape, generator=source) - 1


def check_precision(denoiser: Denoiser, dtype: torch.dtype, device: torch.device) -> None:
    """Raise if a denoiser of these weights runs in half precision, which the ODE likelihood cannot use."""
    low = dtype in (torch.bfloat16, torch.float16) or getattr(denoiser, "precision", "fp32") != "fp32"
    if low or torch.is_autocast_enabled(device.type):
        raise CdlmError(
            "the ODE likelihood needs a network in float32 or float64, and this one runs in half precision, whose"
            " rounding is larger than the derivatives that the trace adds up: take precision fp32, or the bound"
        )
