"""Laws that the continuous systems share: schedules, the variational objective, priors, readers, training."""

import ast
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, sigma_of
from setups import diffusion
from test_training_run import Crash, assert_same_run, crash_at, saved
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from toys import VOCAB, alive, langflow, plaid, ssd, system, tokenizer, weight_of

from cdlm.continuous.embedding import OutputPrior, TokenEmbedding
from cdlm.continuous.grids import GRIDS, LogT, Truncated, UpperEnds
from cdlm.continuous.inputs import ConcatenatedInput
from cdlm.continuous.objectives import Variational
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.schedules import LogitNormal, Schedule, TimeWarp, alpha_of
from cdlm.continuous.solvers import Ancestral, Euler, Heun, Solver
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.langflow import Gumbel
from cdlm.continuous.systems.plaid import LearnedGamma
from cdlm.continuous.systems.ssd import Cosine
from cdlm.core.errors import CdlmError
from cdlm.core.types import Batch, Condition
from cdlm.data.masking import Block, Masking, RandomSubset
from cdlm.models import hub
from cdlm.models.system import System
from cdlm.models.transformer import Transformer
from cdlm.runs.config import build_system
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.requests import Request
from cdlm.training.options import TrainOptions
from cdlm.training.run import train
from cdlm.training.validation import losses_by_level

B, N = 8, 6
SYSTEMS = {"cdcd": system, "plaid": plaid, "ssd": ssd, "langflow": langflow}
every_system = pytest.mark.parametrize("name", SYSTEMS)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def words(rows: int = B, vocab: int = 11) -> Tensor:
    return torch.randint(vocab, (rows, N), generator=rng(5))


def target(rows: int = B) -> Tensor:
    """Two or more positions of each row are given."""
    return torch.arange(N) >= 2 + torch.arange(rows)[:, None] % 3


# --- schedules ---


def learned(seed: int = 0, scale: float = 1.0, low: float = -3.0, width: float = 9.0, units: int = 16) -> LearnedGamma:
    """A schedule of that many units and parameters of that size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LearnedGamma(low, low + width, units)
    with torch.no_grad():
        for parameter in (made.w1, made.b1, made.w2):
            parameter.mul_(scale)
    return made.requires_grad_(False)


def warp(axis: Literal["log", "linear"], seed: int, scale: float) -> TimeWarp:
    """A warp whose logits are random, as after some training."""
    made = TimeWarp(0.3, 40.0, axis, bins=20)
    made.averaged.add_(scale * torch.randn(made.averaged.shape, generator=rng(seed)))
    return made.requires_grad_(False)


def gumbel(mu: float = 0.0, beta: float = 1.0) -> Gumbel:
    return Gumbel(mu, beta, 2.0).requires_grad_(False)


curves = st.builds(
    learned, st.integers(0, 1000), st.floats(0, 3), st.floats(-12, 4), st.floats(0.1, 16), st.integers(2, 40)
)
cosines = st.builds(Cosine, st.floats(0.1, 20), st.floats(1e-5, 1e-2), st.floats(1e-5, 1e-2))
flows = st.builds(LogitNormal, st.floats(-3, 3), st.floats(0.1, 3), st.floats(0.1, 10))
schedules = st.one_of(curves, cosines, flows)
gumbels = st.builds(gumbel, st.floats(-3, 3), st.floats(0.1, 3))
warps = st.builds(warp, st.sampled_from(["log", "linear"]), st.integers(0, 1000), st.floats(0, 4))
every_schedule = pytest.mark.parametrize(
    "family", [warps, curves, cosines, gumbels, flows], ids=["warp", "learned", "cosine", "gumbel", "flow"]
)
fractions = st.lists(st.floats(0, 1), min_size=1, max_size=9).map(lambda u: torch.tensor(u, dtype=torch.float64))


@every_schedule
@given(data=st.data(), u=fractions)
@settings(max_examples=25)
def test_there_and_back_is_the_identity(family: st.SearchStrategy[Schedule], data: st.DataObject, u: Tensor) -> None:
    schedule = data.draw(family)
    low, high = schedule.invertible
    u = u.clamp(low, high)
    t = schedule.t_of_u(u)
    assert t.dtype == torch.float64
    torch.testing.assert_close(schedule.t_of_u(schedule.u_of_t(t)), t, rtol=1e-7, atol=0)
    if not isinstance(schedule, LearnedGamma) or float(schedule.slope(u).min()) > 1e-3 * schedule.t_max:
        close(schedule.u_of_t(t), u, 1e-7)


@every_schedule
@given(data=st.data(), u=fractions)
@settings(max_examples=25)
def test_every_fraction_has_a_finite_level_and_every_level_a_fraction(
    family: st.SearchStrategy[Schedule], data: st.DataObject, u: Tensor
) -> None:
    """Outside of the invertible range as well, and at both ends."""
    schedule = data.draw(family)
    assert 0 <= schedule.invertible[0] < schedule.invertible[1] <= 1
    u = torch.cat([u, torch.tensor([0.0, 2.0**-60, 1 - 2.0**-53, 1.0], dtype=torch.float64)]).sort().values
    t = schedule.t_of_u(u)
    rounding = 1e-12
    assert bool(t.isfinite().all() & (t >= schedule.t_min * (1 - rounding)).all())
    assert bool((t <= schedule.t_max * (1 + rounding)).all() & (t.diff() >= -rounding * t[1:]).all())
    back = schedule.u_of_t(t)
    assert bool((back >= -rounding).all() & (back <= 1 + rounding).all())
    assert bool(schedule.slope(u).isfinite().all())


@pytest.mark.parametrize("deviation", [0.05, 0.8, 2.0])
@pytest.mark.parametrize("mean", [-2.0, 2.0])
def test_both_ends_of_normal_log_odds_have_all_their_digits(mean: float, deviation: float) -> None:
    """A share next to 1 has no digits left, and once u = 1 fell short of the last level."""
    schedule = LogitNormal(mean, deviation, 1.0)
    assert schedule.t_of_u(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx(
        [schedule.t_min, schedule.t_max], rel=1e-13
    )
    near = torch.tensor([2.0**-30, 0.5, 1 - 2.0**-30], dtype=torch.float64)
    close(schedule.u_of_t(schedule.t_of_u(near)), near, 1e-12)


def test_the_cosine_has_a_level_next_to_its_end() -> None:
    """A fresh clone once drew this u, whose level is 2e15 and comes back as another."""
    schedule, u = Cosine(1.0), torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert 1e15 < schedule.t_of_u(u).item() <= schedule.t_max < math.inf  # it may round to the end itself
    close(schedule.u_of_t(schedule.t_of_u(u)), u, 1e-7)
    assert schedule.invertible[1] < u.item()


@given(schedule=schedules)
@settings(max_examples=25)
def test_more_u_is_more_noise_between_the_ends(schedule: Schedule) -> None:
    t = schedule.t_of_u(torch.linspace(0, 1, 201, dtype=torch.float64))
    assert bool((t.diff() >= 0).all())
    assert bool((t[::50].diff() > 0).all())
    assert t[[0, -1]].tolist() == pytest.approx([schedule.t_min, schedule.t_max], rel=1e-12)
    close(schedule.u_of_t(t[-1:]), torch.ones(1, dtype=torch.float64), 1e-9)
    if isinstance(schedule, LearnedGamma):
        assert (2 * t[[0, -1]].log()).tolist() == pytest.approx(schedule.gamma.tolist(), abs=1e-6)


@given(schedule=schedules, u=st.floats(0.02, 0.98))
@settings(max_examples=25)
def test_slope_and_density_are_derivatives(schedule: Schedule, u: float) -> None:
    fraction = torch.tensor([u], dtype=torch.float64)
    by_hand = (schedule.t_of_u(fraction + 1e-5) - schedule.t_of_u(fraction - 1e-5)) / 2e-5
    torch.testing.assert_close(schedule.slope(fraction), by_hand, rtol=1e-4, atol=1e-6 * schedule.t_min)
    t = schedule.t_of_u(fraction)
    step = 1e-5 * t
    back = (schedule.u_of_t(t + step) - schedule.u_of_t(t - step)) / (2 * step)
    torch.testing.assert_close(schedule.density(t), back, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        schedule.density(t) * schedule.slope(fraction), torch.ones(1).double(), rtol=1e-6, atol=0
    )


@given(schedule=schedules)
@settings(max_examples=15)
def test_the_density_integrates_to_one(schedule: Schedule) -> None:
    u = torch.linspace(0.01, 0.99, 3001, dtype=torch.float64)
    t = schedule.t_of_u(u)
    assert float(torch.trapezoid(schedule.density(t), t)) == pytest.approx(0.98, abs=1e-3)


@given(u=st.lists(st.floats(0, 1), min_size=1, max_size=9), k=st.floats(0.1, 20))
@settings(max_examples=20)
def test_the_cosine_is_that_of_the_paper(u: list[float], k: float) -> None:
    """And below the least noise that training draws nothing changes any more."""
    schedule = Cosine(k)
    fraction = torch.tensor(u, dtype=torch.float64)
    inside = fraction.clamp(min=schedule.finest)

    def f(x: Tensor) -> Tensor:
        return ((x + 1e-4) / (1 + 1e-4) * math.pi / 2).cos().square()

    kept = f(inside) / f(torch.zeros(1, dtype=torch.float64))
    close(alpha_of(schedule.t_of_u(fraction) / k).square(), kept, 1e-12)
    assert bool((schedule.slope(fraction) == 0).eq(fraction < schedule.finest).all())
    assert float(alpha_of(torch.tensor(schedule.t_max / k))) < 1e-15


QUANTILES = {
    4: (0.115108, 0.182426, 0.276796),
    8: (0.081639, 0.115108, 0.147429, 0.182426, 0.223551, 0.276796, 0.358997),
}


@pytest.mark.parametrize("steps", QUANTILES)
def test_the_upper_ends_of_a_flow_are_its_grid_of_quantiles(steps: int) -> None:
    tau = 1 / (1 + UpperEnds().levels(LogitNormal(), steps) / 2)
    assert tau.tolist() == pytest.approx([1e-4, *QUANTILES[steps]], abs=5e-7)


@given(mean=st.floats(-3, 3), deviation=st.floats(0.1, 1.5), scale=st.floats(0.1, 10), u=st.floats(0.001, 0.999))
def test_the_log_odds_of_a_flow_are_normal(mean: float, deviation: float, scale: float, u: float) -> None:
    t = LogitNormal(mean, deviation, scale).t_of_u(torch.tensor([u], dtype=torch.float64))
    odds = NormalDist(mean, deviation).inv_cdf(1 - u)
    assert float((scale / t).log()) == pytest.approx(odds, abs=1e-3)  # what is cut off moves it a little


def test_a_flow_ends_a_ten_thousandth_before_noise_and_before_data() -> None:
    flow = LogitNormal(noise_scale=3.0)
    assert (flow.t_min, flow.t_max) == pytest.approx((3 / 9999, 3 * 9999), rel=1e-12)
    nats = torch.ones(2, dtype=torch.float64)
    assert flow.fit(nats, nats).item() == 0
    assert not list(flow.parameters())
    before = flow.t_of_u(nats / 3)
    flow.after_step()
    assert torch.equal(flow.t_of_u(nats / 3), before)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((math.nan,), "mean"), ((0.0, 0.0), "deviation"), ((0.0, 1.0, -2.0), "noise_scale"), ((60.0, 0.1), "lower"),
        ((0.0, math.inf), "deviation"),
    ],
)  # fmt: skip
def test_flows_without_times_are_refused(arguments: tuple[float, ...], word: str) -> None:
    with pytest.raises(CdlmError, match=word):
        LogitNormal(*arguments)


@given(schedule=st.one_of(schedules, gumbels), rows=st.integers(1, 9))
@settings(max_examples=20)
def test_what_is_learned_from_is_the_level_and_its_slope(schedule: Schedule, rows: int) -> None:
    u = torch.rand(rows, generator=rng(rows), dtype=torch.float64)

    def never() -> Tensor:
        raise AssertionError("asked for before there is a gradient")

    t, slope = schedule.learn(u, never)
    torch.testing.assert_close(t, schedule.t_of_u(u), rtol=1e-14, atol=0)
    torch.testing.assert_close(slope, schedule.slope(u), rtol=1e-12, atol=0)


def test_the_scale_multiplies_the_gradient_of_the_shape_row_by_row_and_not_that_of_the_ends() -> None:
    schedule, u = learned().requires_grad_(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    names = ("gamma", "w1", "b1", "w2")

    def gradients(t: Tensor, slope: Tensor, row: int) -> dict[str, Tensor]:
        value = t[row].log() + slope[row].square()
        got = torch.autograd.grad(value, [schedule.get_parameter(name) for name in names], retain_graph=True)
        return dict(zip(names, got, strict=True))

    plain = schedule.t_of_u(u), schedule.slope(u)
    scaled = schedule.learn(u, lambda: torch.tensor([3.0, -5.0], dtype=torch.float64))
    for row, factor in enumerate((3.0, -5.0)):
        before, after = gradients(*plain, row), gradients(*scaled, row)
        close(after.pop("gamma"), before.pop("gamma"), 1e-6)
        for name, gradient in after.items():
            assert float(gradient.abs().max()) > 0
            torch.testing.assert_close(gradient, factor * before[name], rtol=1e-5, atol=1e-9)


# --- the grid that stops one short of the end ---


ALL_SCHEDULES = {
    "warp": lambda: TimeWarp(0.3, 40.0), "learned": learned, "cosine": Cosine, "gumbel": gumbel, "flow": LogitNormal,
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL_SCHEDULES)
@given(steps=st.integers(1, 300))
@settings(max_examples=10)
def test_upper_ends_are_the_levels_of_one_down_to_one_part(kind: str, steps: int) -> None:
    schedule: Schedule = ALL_SCHEDULES[kind]()
    levels = UpperEnds().levels(schedule, steps)
    parts = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    assert levels.dtype == torch.float64
    assert levels.shape == (steps,)
    assert float(levels[0]) == pytest.approx(schedule.t_max, rel=1e-12)
    assert bool((levels.diff() < 0).all())
    assert float(levels[-1]) > schedule.t_min or steps == 1
    close(schedule.u_of_t(levels), parts, 1e-7)


def test_upper_ends_of_no_step_are_refused() -> None:
    with pytest.raises(CdlmError, match="steps >= 1"):
        UpperEnds().levels(Cosine(), 0)


@given(steps=st.integers(1, 300), share=st.floats(0.05, 1.0))
def test_a_truncated_grid_is_the_beginning_of_one_with_more_steps(steps: int, share: float) -> None:
    schedule = Cosine()
    levels = Truncated(LogT(), share).levels(schedule, steps)
    whole = LogT().levels(schedule, max(steps, round(steps / share)))
    assert levels.shape == (steps,)
    assert torch.equal(levels, whole[:steps])
    assert torch.equal(Truncated(LogT(), 1.0).levels(schedule, steps), LogT().levels(schedule, steps))


def test_the_share_of_a_truncated_grid_says_where_it_ends() -> None:
    """Of 1000 points in equal steps of ln t, the last lies at the share of the way from t_max to t_min."""
    schedule = Cosine()
    end = float(Truncated(LogT(), 0.6).levels(schedule, 600)[-1])
    way = math.log(schedule.t_max / end) / math.log(schedule.t_max / schedule.t_min)
    assert way == pytest.approx(0.6, abs=2e-3)


@pytest.mark.parametrize(("grid", "share"), [(LogT(), 0.0), (LogT(), 1.1), ("LogT()", 0.5)])
def test_a_truncated_grid_of_nothing_is_refused(grid: Any, share: float) -> None:
    with pytest.raises(Exception, match="Truncated"):
        Truncated(grid, share)
    assert GRIDS.parse("Truncated(LogT(), 0.6)") == Truncated(LogT(), 0.6)


# --- the variational objective in training ---


class Shown(NamedTuple):
    """What the reader was given."""

    z: Tensor
    t: Tensor
    condition: Condition


def shown_to(model: EmbeddingDiffusion) -> list[Shown]:
    """What the reader is given from now on."""
    calls: list[Shown] = []
    model.network_input.register_forward_pre_hook(lambda _, args: calls.append(Shown(*args)))
    return calls


def trainable(share: float, **settings: Any) -> EmbeddingDiffusion:
    chosen = {"self_conditioning": share, "guidance_dropout": 0.0, "output_prior_warmup": 0, **settings}
    return alive(plaid(**chosen)).train()


class Terms(NamedTuple):
    """Of each row, in nats per token."""

    read_out: Tensor
    error: Tensor
    last: Tensor
    prior: Tensor


def terms_by_hand(model: EmbeddingDiffusion, shown: Shown, cut: Tensor) -> Terms:
    """The three terms of Plaid in its own variables, from the noise that the model drew. Rows in `cut` are held: no
    gradient goes through their state."""
    schedule, objective = model.schedule, model.objective
    assert isinstance(schedule, LearnedGamma)
    assert isinstance(objective, Variational)
    tokens, open_ = words(), target()
    u = torch.where(shown.t == shown.t.min(), 0, schedule.u_of_t(shown.t)).detach().requires_grad_()

    def g(x: Tensor) -> Tensor:
        inner = (x[:, None] - 0.5) * F.softplus(schedule.w1) + schedule.b1
        return inner.tanh() @ (0.01 * F.softplus(schedule.w2))

    zero, one = g(torch.zeros(1).double()), g(torch.ones(1).double())
    gamma = schedule.gamma[0] + (schedule.gamma[1] - schedule.gamma[0]) * (g(u) - zero) / (one - zero)
    (rate,) = torch.autograd.grad(gamma.sum(), u, create_graph=True)
    table = F.normalize(weight_of(model), dim=-1)
    clean = table[tokens]
    eps = ((shown.z - clean) / shown.t[:, None, None]).detach()
    gamma, rate = (torch.where(cut, x.detach(), x) for x in (gamma, rate))
    clean = torch.where(cut[:, None, None], clean.detach(), clean)
    t = (gamma / 2).exp()
    z = clean + t[:, None, None] * eps
    condition = shown.condition._replace(clean=clean * ~open_[..., None], x0=shown.condition.x0.detach())
    logits = model.network(*model.network_input(z, t, condition))
    logits = logits + (z @ table.T / t.square()[:, None, None]) * open_[..., None]
    count = open_.sum(1)
    read_out = (-logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2) * open_).sum(1) / count
    distance = (logits.softmax(-1) @ table - clean).square().sum(-1)
    error = 0.5 * (-gamma).exp() * rate * (distance * open_).sum(1) / count  # -SNR' / 2, with SNR = exp(-gamma)
    top = (schedule.gamma[1] / 2).exp()
    prior = kl_divergence(Normal(alpha_of(top) * table[0].detach(), sigma_of(top)), Normal(0.0, 1.0)).sum()
    return Terms(read_out, error, shown.t == shown.t.min(), prior)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_shape_of_the_schedule_learns_the_square_and_all_else_the_mean(share: float, seed: int) -> None:
    model = trainable(share)
    calls = shown_to(model)
    loss = model(Batch(words(), None, target(), rng(seed)))
    loss.total.backward()
    cut = torch.arange(B) < round(share * B)
    terms = terms_by_hand(model, calls[-1], cut)
    inside = ~terms.last
    assert 0 < int(inside.sum()) < B
    close(loss.nats, torch.where(terms.last, terms.read_out, terms.error).detach(), 1e-5)
    mean = terms.read_out[terms.last].mean() + terms.error[inside].mean() + terms.prior
    close(loss.total.detach(), mean.detach(), 1e-5)
    square = terms.error[inside].square().mean()
    for name, parameter in model.named_parameters():
        wanted = square if name in ("schedule.w1", "schedule.b1", "schedule.w2") else mean
        (expected,) = torch.autograd.grad(wanted, parameter, retain_graph=True, allow_unused=True)
        assert parameter.grad is not None, name
        if expected is None:
            expected = torch.zeros_like(parameter)
        if share < 1 or not name.startswith("schedule"):
            assert float(parameter.grad.norm()) > 0, name
        scale = float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * scale + 1e-12, msg=name)


def test_rows_with_a_first_pass_teach_the_network_alone() -> None:
    """Were all rows such rows, the schedule would only see the prior, and the embeddings no state."""
    model = trainable(1.0)
    model(Batch(words(), None, target(), rng())).total.backward()
    schedule = model.schedule
    assert isinstance(schedule, LearnedGamma)
    for parameter in (schedule.w1, schedule.b1, schedule.w2):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) < 1e-12
    top = schedule.gamma.detach()[1:].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.prior_nats((top / 2).exp()).sum(), top)
    assert schedule.gamma.grad is not None
    close(schedule.gamma.grad, torch.cat([torch.zeros(1).double(), expected]))


def test_which_rows_get_a_first_pass_is_independent_of_which_are_read_out() -> None:
    """The first rows get one; the least noise falls on any row."""
    model = trainable(0.5)
    count = torch.zeros(B)
    for seed in range(40):
        t = model(Batch(words(), None, target(), rng(seed))).t
        count += t == t.min()
    assert bool((count > 5).all())


moments = st.tuples(st.floats(0, 5), st.floats(0.1, 5), st.floats(0, 5), st.floats(0.1, 5))


@given(rows=st.integers(2, 40), values=moments, seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_the_rows_are_shared_out_by_the_deviations(
    rows: int, values: tuple[float, float, float, float], seed: int
) -> None:
    objective = Variational()
    mean_0, deviation_0, mean_1, deviation_1 = values
    objective.moments.copy_(torch.tensor([[mean_0, mean_0**2 + deviation_0**2], [mean_1, mean_1**2 + deviation_1**2]]))
    kept = objective.moments.double()
    spread = (kept[:, 1] - kept[:, 0].square()).clamp(min=1e-12).sqrt()
    expected = min(max(float(rows * spread[0] / spread.sum()), 1), rows - 1)
    last, u = objective._levels(rows_of(rows, seed))
    assert abs(int(last.sum()) - expected) <= 0.5 + 1e-3 * rows
    assert bool((u[last] == 0).all())
    others = u[~last].sort().values
    assert others.dtype == torch.float64
    assert bool(((others >= 0) & (others < 1)).all())
    close(others.diff(), torch.full((len(others) - 1,), 1 / len(others), dtype=torch.float64))  # one in each part


def rows_of(rows: int, seed: int) -> Batch:
    """A batch of which only the number of rows and the generator matter."""
    tokens = torch.zeros(rows, 1, dtype=torch.int64)
    return Batch(tokens, None, tokens == 0, rng(seed))


def test_levels_are_uniform_row_by_row() -> None:
    objective, rows = Variational(), 5
    drawn = [objective._levels(rows_of(rows, seed)) for seed in range(800)]
    for i in range(rows):
        u = torch.stack([u[i] for last, u in drawn if not last[i]])
        assert len(u) > 200
        assert float(u.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(u)))
        assert float(u.square().mean()) == pytest.approx(1 / 3, abs=5 * math.sqrt(4 / 45 / len(u)))


def test_the_moments_are_running_means_of_what_was_seen() -> None:
    model = trainable(0.0)
    objective = model.objective
    assert isinstance(objective, Variational)
    expected = objective.moments.clone().double()
    for seed in range(4):
        loss = model(Batch(words(), None, target(), rng(seed)))
        last = loss.t == loss.t.min()
        for row, values in enumerate((loss.nats[last], loss.nats[~last])):
            fresh = torch.stack([values.mean(), values.square().mean()])
            expected[row] = 0.997 * expected[row] + 0.003 * fresh
    close(objective.moments.double(), expected, 1e-5)
    model.eval()(Batch(words(), None, target(), rng()))
    close(objective.moments.double(), expected, 1e-5)


def remembered(rank: int) -> list[float]:
    objective = Variational()
    objective._remember(torch.tensor([1.0 + rank, 3.0]), torch.tensor([5.0 - rank]))
    return objective.moments.flatten().tolist()


def remembered_together(store: str, device: str, rank: int) -> list[float]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return remembered(rank)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_remember_the_mean_of_both(tmp_path: Path) -> None:
    """What one alone has and what the other has, and half of each."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from functools import partial\nfrom cdlm.core.parallel import Workers\n"
        "from test_continuous_family import remembered_together\n"
        f"together = partial(remembered_together, {str(tmp_path / 'store')!r})\n"
        "if __name__ == '__main__':\n    print(LocalWorkers(str, 2).map(together, 'cpu', (0, 1)))\n"
    )
    told = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True, timeout=200)
    first, second = ast.literal_eval(told.stdout.splitlines()[-1])
    assert first == second
    alone = torch.tensor([remembered(rank) for rank in (0, 1)])
    assert first == pytest.approx(alone.mean(0).tolist(), rel=1e-6)


def test_a_batch_of_one_row_is_refused_in_one_line() -> None:
    with pytest.raises(CdlmError, match="batch_size") as caught:
        trainable(0.0)(Batch(words(1), None, target(1), rng()))
    assert "\n" not in str(caught.value)
    assert trainable(0.0).eval()(Batch(words(1), None, target(1), rng())).total.item() > 0


def test_fixed_levels_are_used() -> None:
    """Every row then makes all terms, as in evaluation."""
    u = torch.linspace(0, 1, B, dtype=torch.float64)
    model = trainable(0.0)
    trained = model(Batch(words(), None, target(), rng(), u))
    judged = model.eval()(Batch(words(), None, target(), rng(), u))
    close(trained.t, model.levels(u).detach())
    close(judged.nats, trained.nats)
    assert not judged.t.requires_grad


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_loss_is_a_function_of_its_generator(mode: str) -> None:
    model = trainable(0.5, guidance_dropout=0.3).train(mode == "train")
    before = torch.random.get_rng_state()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for seed in (3, 3, 4):
        model.load_state_dict(state)
        losses.append(model(Batch(words(), None, target(), rng(seed))))
    assert torch.equal(losses[0].total, losses[1].total)
    assert torch.equal(losses[0].nats, losses[1].nats)
    assert not torch.equal(losses[0].total, losses[2].total)
    assert torch.equal(before, torch.random.get_rng_state())


# --- the variational objective in evaluation ---


class Frequencies(nn.Module):
    """A network that knows how often each token comes and nothing else."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.frequencies = frequencies

    def forward(self, features: Tensor, level: Tensor, valid: Tensor | None) -> Tensor:
        return self.frequencies.log().expand(*features.shape[:2], -1)


def exact(schedule: LearnedGamma) -> tuple[EmbeddingDiffusion, Tensor]:
    """The exact posterior of independent tokens, on embeddings of norm one; and their frequencies."""
    oracle = Oracle()
    embedding = TokenEmbedding(7, oracle.dim, rho=1.0).double()
    embedding.weight.data.copy_(oracle.table)
    made = EmbeddingDiffusion(
        embedding, schedule, Frequencies(oracle.frequencies), objective=Variational(), output_prior=OutputPrior(),
        self_conditioning=0.0, unit_prior=True, config={},
    )  # fmt: skip
    return made.eval(), oracle.frequencies


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float


RUNS, ROWS = 16, 600
"""Independent estimates of each bound, and rows of each, whose levels are evenly spaced."""


def mean_of(runs: list[Tensor]) -> Mean:
    values = torch.stack(runs)
    return Mean(float(values.mean()), float(values.std() / math.sqrt(len(values))))


@torch.no_grad()
def evaluated(model: EmbeddingDiffusion, tokens: Tensor, open_: Tensor) -> Mean:
    losses = [model(Batch(tokens, None, open_, rng(seed))) for seed in range(RUNS)]
    for loss in losses:
        close(loss.total, (loss.nats * loss.count).sum() / loss.count.sum())
    return mean_of([loss.nats.mean() for loss in losses])


@torch.no_grad()
def bound_by_hand(model: EmbeddingDiffusion, tokens: Tensor, open_: Tensor) -> Mean:
    """Plaid's bound in its own variables, with gamma spread evenly: no schedule has a part in it."""
    low, high = (2 * math.log(t) for t in (model.schedule.t_min, model.schedule.t_max))
    clean, count = model.embed(tokens), open_.sum(1)
    e, top = clean[0, 0], torch.tensor(math.exp(high / 2), dtype=torch.float64)
    prior = kl_divergence(Normal(alpha_of(top) * e, sigma_of(top)), Normal(0.0, 1.0)).sum()

    def once(generator: torch.Generator) -> Tensor:
        def guess(gamma: Tensor) -> Tensor:
            z = clean + (gamma / 2).exp()[:, None, None] * torch.randn(clean.shape, generator=generator).to(clean)
            condition = Condition(clean * ~open_[..., None], open_, clean * 0)
            return model.logits(z, (gamma / 2).exp(), condition).softmax(-1)

        even = torch.randperm(len(tokens), generator=generator) + torch.rand(1, generator=generator).double()
        gamma = low + (high - low) * even / len(tokens)
        x0 = guess(gamma) @ model.embedding.table()
        diffusion = (high - low) / 2 * (-gamma).exp() * ((x0 - clean).square().sum(-1) * open_).sum(1)
        right = guess(torch.full_like(gamma, low)).gather(2, tokens[..., None]).squeeze(2)
        return ((diffusion - (right.log() * open_).sum(1)) / count).mean() + prior

    return mean_of([once(rng(100 + seed)) for seed in range(RUNS)])


def assert_equal_means(first: Mean, second: Mean, slack: float = 0.0) -> None:
    assert abs(first.value - second.value) <= slack + 4.5 * math.hypot(first.error, second.error)


def independent_tokens(frequencies: Tensor, rows: int) -> Tensor:
    """Rows in which each token comes as often as it is expected to, as nearly as whole numbers allow."""
    ends = (frequencies.cumsum(0) * rows * N).round().long()
    tokens = torch.searchsorted(ends, torch.arange(rows * N), right=True)
    return tokens[torch.randperm(rows * N, generator=rng(1))].view(rows, N)


SHAPES = (learned(0), learned(1, scale=4.0), learned(2, scale=0.0))
"""Equal ends, but other levels in between."""


def test_the_bound_of_the_exact_posterior_is_the_entropy_whatever_the_shape() -> None:
    entropies, halves = [], []
    for schedule in SHAPES:
        model, frequencies = exact(schedule)
        tokens = independent_tokens(frequencies, ROWS)
        entropies.append(evaluated(model, tokens, tokens >= 0))
        halves.append(schedule.t_of_u(torch.tensor([0.5]).double()).item())
        entropy = -float((frequencies * frequencies.log()).sum())
        # What the prior costs beyond the information that is left at the top is below KL of one embedding.
        extra = model.facts()["prior_mismatch"]
        assert entropies[-1].error < 0.02 * entropy
        assert entropies[-1].value > entropy - 3.5 * entropies[-1].error
        assert_equal_means(entropies[-1], Mean(entropy, 0.0), slack=extra)
    assert max(halves) > 1.2 * min(halves)
    for other in entropies[1:]:
        assert_equal_means(entropies[0], other)


def test_worse_frequencies_cost_what_they_should() -> None:
    """The bound of a posterior with a wrong prior over tokens is their cross-entropy."""
    model, frequencies = exact(SHAPES[0])
    wrong = torch.full_like(frequencies, 1 / 7)
    assert isinstance(model.network, Frequencies)
    model.network.frequencies = wrong
    tokens = independent_tokens(frequencies, ROWS)
    assert_equal_means(evaluated(model, tokens, tokens >= 0), Mean(math.log(7), 0.0), slack=0.01)


@pytest.mark.parametrize("schedule", [SHAPES[1], learned(width=2.0, scale=4.0)], ids=["long", "short"])
def test_evaluation_is_prior_reconstruction_and_error(schedule: LearnedGamma) -> None:
    """Of any network, with prompts, rows of different lengths to generate, and a prior that is far off or near."""
    made = plaid(self_conditioning=0.0, output_prior_warmup=0)
    made.schedule = schedule
    model = alive(made)
    assert (model.facts()["prior_mismatch"] > 1) == (schedule.t_max < 1)
    tokens, open_ = words(200), target(200)
    by_hand = bound_by_hand(model, tokens, open_)
    assert by_hand.error < 0.03 * by_hand.value
    assert_equal_means(evaluated(model, tokens, open_), by_hand)


def test_evaluation_is_stratified_and_asks_every_row_at_its_level_and_at_the_least() -> None:
    model = trainable(0.25).eval()
    calls = shown_to(model)
    loss = model(Batch(words(), None, target(), rng()))
    assert [len(call.z) for call in calls] == [B] * 4  # a first pass and a second one, twice
    assert torch.equal(calls[1].t, loss.t)
    close(calls[3].t, torch.full((B,), model.schedule.t_min, dtype=torch.float64))
    u = model.schedule.u_of_t(loss.t).sort().values
    close(u.diff(), torch.full((B - 1,), 1 / B).double(), 1e-7)


# --- the prior ---


@given(t=st.floats(0.05, 200), rho=st.floats(0.1, 20), dim=st.integers(1, 20))
@settings(max_examples=20)
@pytest.mark.parametrize("unit", [True, False])
def test_the_prior_term_is_the_divergence_of_two_normals(unit: bool, t: float, rho: float, dim: int) -> None:
    class Known(TimeWarp):
        @property
        def t_max(self) -> float:
            return t

    embedding = TokenEmbedding(3, dim, init_std=1.0, rho=rho).double()
    model = EmbeddingDiffusion(
        embedding,
        Known(0.01, 300.0),
        nn.Identity(),
        network_input=ConcatenatedInput(dim, rho),
        unit_prior=unit,
        config={},
    )
    e = model.embed(torch.tensor([[1]]))[0, 0].detach()
    level = torch.tensor(t, dtype=torch.float64)
    start = torch.tensor(model.prior_std, dtype=torch.float64)
    expected = kl_divergence(Normal(e, level), Normal(0.0, start)).sum()
    assert model.prior_std == pytest.approx(math.sqrt(t**2 + unit))
    torch.testing.assert_close(model.prior_nats(level[None]), expected[None], rtol=1e-6, atol=1e-9 * dim)
    assert model.facts() == {"prior_mismatch": pytest.approx(float(expected), rel=1e-6, abs=1e-9 * dim)}
    if unit:  # the same in the variables in which it is standard normal
        standard = kl_divergence(Normal(alpha_of(level) * e, sigma_of(level)), Normal(0.0, 1.0)).sum()
        close(expected, standard)


# --- what the network reads ---


@given(t=st.floats(0.01, 100), rho=st.sampled_from([1.0, 3.0, math.sqrt(12)]))
@settings(max_examples=20)
def test_the_state_is_shown_at_unit_variance_whatever_the_norm(t: float, rho: float) -> None:
    dim, rows = 12, 4000
    e = rho * F.normalize(torch.randn(rows, 1, dim, generator=rng(1), dtype=torch.float64), dim=-1)
    z = e + t * torch.randn(rows, 1, dim, generator=rng(2), dtype=torch.float64)
    open_ = torch.ones(rows, 1, dtype=torch.bool)
    features, level = ConcatenatedInput(dim, rho)(z, torch.full((rows,), t).double(), Condition(e, open_, e))
    assert features.shape == (rows, 1, 3 * dim + 1)
    shown, clean, estimate, mask = features.split((dim, dim, dim, 1), -1)
    assert float(shown.square().mean()) == pytest.approx(1, abs=5.5 * math.sqrt(2 / z.numel()))
    close(clean.square().mean(-1), torch.ones(rows, 1).double())
    assert torch.equal(clean, estimate)
    assert bool((mask == 1).all())
    close(level, torch.full((rows,), math.log(t / rho)), 1e-5)


def test_at_the_norm_of_cdcd_the_features_are_those_of_the_paper() -> None:
    dim = 9
    z, clean, x0 = (torch.randn(B, N, dim, generator=rng(seed)) for seed in (1, 2, 3))
    t, open_ = torch.linspace(0.2, 30, B).double(), target()
    features, level = ConcatenatedInput(dim, math.sqrt(dim))(z, t, Condition(clean, open_, x0))
    mask = open_[..., None].float()
    scale = (1 / (1 + t.square()).sqrt()).float()[:, None, None]
    expected = torch.cat([z * scale * mask, clean, x0 * mask, mask], -1)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=0)
    assert torch.equal(features[..., dim:], expected[..., dim:])
    close(level, (t / 3).log().float(), 1e-6)


class Blind(ConcatenatedInput):
    """Takes given positions for noisy ones."""

    sees_given = False

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        everywhere = torch.ones_like(condition.target)
        return super().forward(z, t, Condition(condition.clean * 0, everywhere, condition.x0, condition.valid))


def blind(share: float = 0.5) -> EmbeddingDiffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding = TokenEmbedding(11, 8)
        network = Transformer(25, 11, width=16, depth=2, heads=2)
    return alive(
        EmbeddingDiffusion(
            embedding, TimeWarp(0.2, 30.0), network, network_input=Blind(8, embedding.rho), output_prior=OutputPrior(),
            self_conditioning=share, config={},
        )
    )  # fmt: skip


def prompts(first: int) -> list[Request]:
    """Three given positions, one of them inside."""
    given_ = torch.tensor([1, 1, 0, 0, 1, 0]).bool()
    return [Request(i, torch.tensor([first, 3, 0, 0, first + 1, 0]), given_) for i in range(3)]


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=repr)
def test_a_blind_network_sees_given_tokens_under_the_noise_of_the_row(solver: Solver) -> None:
    model, asked = blind(), prompts(2)
    assert not model.sees_given
    calls = shown_to(model)
    given_ = asked[0].given
    clean = model.embed(asked[0].tokens[None])[:, given_]
    final = [step.tokens for step in DiffusionLoop(model, *diffusion(9, solver=solver), 3).steps(asked)][-1]
    assert bool((final[:, given_] == asked[0].tokens[given_]).all())
    carried = torch.stack([(call.z[:, given_] - clean) / call.t[:, None, None] for call in calls])
    close(carried, carried[:1].expand_as(carried), 1e-6)  # e + t times one noise all along the way
    assert float(carried[0].detach().square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / carried[0].numel()))
    for call in calls[1:]:
        close(call.condition.x0[:, given_], clean.expand(3, -1, -1))


def test_given_tokens_of_a_blind_network_get_fresh_noise_with_an_ancestral_step() -> None:
    model, asked = blind(), prompts(2)
    calls = shown_to(model)
    list(DiffusionLoop(model, *diffusion(30, solver=Ancestral()), 3).steps(asked))
    clean = model.embed(asked[0].tokens[None])[:, asked[0].given]
    noise = torch.stack([(call.z[:, asked[0].given] - clean) / call.t[:, None, None] for call in calls])
    assert float(noise[-1].detach().square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / noise[-1].numel()))
    assert float((noise[-1] - noise[0]).detach().abs().min()) > 1e-6


@pytest.mark.parametrize("make", [blind, lambda: alive(system())], ids=["blind", "seeing"])
def test_prompts_change_the_other_positions(make: Callable[[], EmbeddingDiffusion]) -> None:
    def logits(first: int) -> Tensor:
        sampler = diffusion(8, record=frozenset({"logits"}))
        return torch.stack([step.state.logits for step in DiffusionLoop(make(), *sampler, 3).steps(prompts(first))])

    one, same, other = logits(2), logits(2), logits(5)
    assert torch.equal(one, same)
    open_ = ~prompts(2)[0].given
    assert bool(((one - other)[1:, :, open_].abs().amax(-1) > 1e-6).all())


# --- the weight of the own position ---


def at(model: EmbeddingDiffusion) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, N, model.dim, generator=rng(3), dtype=torch.float64)
    return z, torch.tensor([0.5, 3.0]).double()


def test_the_weight_of_the_own_position_grows_with_the_steps() -> None:
    embedding, (z, t) = alive(plaid()).embedding, at(alive(plaid()))
    full, growing = OutputPrior(), OutputPrior(4)
    for steps in range(7):
        close(growing(z, t, embedding), min(steps / 4, 1) * full(z, t, embedding))
        growing.after_step()
        full.after_step()
    close(full(z, t, embedding), (z @ embedding.table().T) / t.square()[:, None, None])


def test_the_count_is_kept_with_the_weights_and_there_is_none_without_a_warmup() -> None:
    warm, cold = plaid(output_prior_warmup=10), plaid(output_prior_warmup=0)
    assert warm.state_dict().keys() - cold.state_dict().keys() == {"output_prior.steps"}
    assert not [name for name in system(output_prior=True).state_dict() if name.startswith("output_prior")]
    for _ in range(3):
        warm.after_step()
    again = plaid(output_prior_warmup=10)
    again.load_state_dict(warm.state_dict())
    assert again.state_dict()["output_prior.steps"].item() == 3
    cold.after_step()
    assert cold.state_dict().keys() == plaid(output_prior_warmup=0).state_dict().keys()


# --- training ---


class Loader:
    """Rows that count up modulo seven from anywhere; batch i is a function of i, and `act` may misbehave at it."""

    def __init__(self, act: Callable[[int], None] | None = None):
        self.batches, self.act = 0, act

    def batch(self, index: int, rows: int = 16) -> Batch:
        start = torch.randint(7, (rows, 1), generator=rng(index))
        tokens = (start + torch.arange(N)) % 7
        everything = torch.ones_like(tokens, dtype=torch.bool)
        return Batch(tokens, everything, everything)

    def __iter__(self):
        while True:
            index, self.batches = self.batches, self.batches + 1
            if self.act is not None:
                self.act(index)
            yield self.batch(index)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


STEPS = 16
OPTIONS: dict[str, Any] = dict(
    steps=STEPS, accelerator="cpu", warmup=3, validate_every=8, checkpoint_every=6, log_every=4, ema=0.9, lr=1e-2
)


def trained(
    name: str, folder: Path, act: Callable[[int], None] | None = None, resume: bool = False, **settings: Any
) -> EmbeddingDiffusion:
    """The averaged system after training, as it was handed out for export."""
    made: list[System] = []
    model = SYSTEMS[name](VOCAB, **settings)
    model.tokenizer, model.length = tokenizer(), N

    def export(average: System, folder: Path, step: int) -> None:
        made[:] = [average]
        average.save_pretrained(folder / "model")

    train(
        model, Loader(act), lambda: [Loader().batch(1000)], law(name), TrainOptions(**OPTIONS), folder,
        samples=lambda average: [str(next(average.network.parameters()).sum().item())], export=export, resume=resume,
        progress=False,
    )  # fmt: skip
    assert isinstance(made[0], EmbeddingDiffusion)
    return made[0]


def law(name: str) -> Masking:
    return Block(3, 0.3) if name == "ssd" else RandomSubset()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[EmbeddingDiffusion, Path]]:
    """Each system after one run, and the folder of that run."""
    done: dict[str, tuple[EmbeddingDiffusion, Path]] = {}

    def get(name: str) -> tuple[EmbeddingDiffusion, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name) / "run"
            done[name] = trained(name, folder), folder
        return done[name]

    return get


@every_system
def test_training_lowers_the_loss(name: str, runs) -> None:
    def loss(model: System) -> float:
        sums = losses_by_level(model, [Loader().batch(1000, 200)], law(name), 0)
        return float(sums[0].sum() / sums[1].sum())

    before = loss(SYSTEMS[name](VOCAB).eval())
    assert before > 0.9 * math.log(VOCAB)
    assert loss(runs(name)[0]) < 0.75 * before


@every_system
def test_a_crashed_and_resumed_run_equals_an_uninterrupted_one(name: str, runs, tmp_path: Path) -> None:
    whole, (cut, folder) = runs(name), (tmp_path / "cut", tmp_path / "cut")
    with pytest.raises(Crash):
        trained(name, folder, crash_at(9))
    resumed = trained(name, cut, resume=True)
    assert_same_run(whole[1], folder)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@every_system
def test_a_saved_system_draws_the_same_samples(name: str, runs) -> None:
    made, run = runs(name)
    folder = hub.read(run / "model")
    again = build_system(folder.config)
    assert isinstance(again, EmbeddingDiffusion)
    hub.load_weights(again, folder)
    first, second = samples(made.eval()), samples(again.eval())
    assert len(first) > 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    losses = [model(Batch(Loader().batch(3).tokens, None, target(16), rng())).total for model in (made, again)]
    assert torch.equal(losses[0], losses[1])


def samples(model: EmbeddingDiffusion) -> list[Tensor]:
    """Logits of every step of the system's own sampler, with a prompt in one of the rows."""
    options, sampling = RunOptions(record=frozenset({"logits"})), model.defaults.with_steps(6)
    asked = [Request(i, torch.arange(N), torch.arange(N) < i) for i in range(3)]
    return [step.state.logits for step in DiffusionLoop(model, sampling, options, 2).steps(asked)]


def test_what_training_counts_is_in_the_average_and_in_the_checkpoint(runs) -> None:
    average, folder = runs("plaid")
    weights = saved(folder)["state_dict"]
    for kind in ("system", "ema.system"):
        assert weights[f"{kind}.output_prior.steps"].item() == STEPS
        assert not torch.equal(weights[f"{kind}.objective.moments"], Variational().moments)
    for name, buffer in average.named_buffers():
        if name in average.state_dict():
            assert torch.equal(buffer, weights[f"system.{name}"]), name
    exported = hub.read(folder / "model").weights
    assert exported["output_prior.steps"].item() == STEPS
    assert torch.equal(exported["objective.moments"], weights["system.objective.moments"])
    start = plaid(VOCAB).schedule
    for name, value in average.schedule.named_parameters():
        assert torch.equal(value, weights[f"system.schedule.{name}"])
        assert not torch.equal(value, start.get_parameter(name)), name  # ends and shape have learned
