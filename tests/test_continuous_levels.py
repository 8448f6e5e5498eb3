"""Laws of noise levels, of the learned time warp and of the grids."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import sigma_of
from torch import Tensor

from cdlm.continuous.grids import LogT, UniformT, Warped
from cdlm.continuous.schedules import TimeWarp, alpha_of, check_range, gamma_of, t_of_gamma
from cdlm.core.errors import CdlmError

Axis = Literal["log", "linear"]
T_MIN, T_MAX = 0.3, 40.0
axes = pytest.mark.parametrize("axis", ["log", "linear"])
levels = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=20).map(lambda x: torch.tensor(x, dtype=torch.float64))
fractions = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(lambda x: torch.tensor(x, dtype=torch.float64))


def warp(axis: Axis, seed: int = 0, scale: float = 2.0, bins: int = 20) -> TimeWarp:
    """A warp whose logits are random, as after some training."""
    made = TimeWarp(T_MIN, T_MAX, axis, bins=bins)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.averaged.add_(scale * torch.randn(made.averaged.shape, generator=generator))
    return made


def spread(count: int) -> Tensor:
    """Levels over the whole range, log spaced, ends included."""
    return torch.linspace(math.log(T_MIN), math.log(T_MAX), count, dtype=torch.float64).exp().clamp(T_MIN, T_MAX)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(levels)
def test_the_views_of_a_level_agree(t: Tensor) -> None:
    alpha, sigma, gamma = alpha_of(t), sigma_of(t), gamma_of(t)
    close(alpha**2 + sigma**2, torch.ones_like(t))
    close(sigma / alpha, t)
    close(alpha**2, torch.sigmoid(-gamma))
    close(sigma**2, torch.sigmoid(gamma))
    close(t_of_gamma(gamma), t)


@given(st.floats(-15, 15))
def test_gamma_is_the_inverse_of_its_inverse(gamma: float) -> None:
    value = torch.tensor([gamma], dtype=torch.float64)
    close(gamma_of(t_of_gamma(value)), value)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (-1.0, 1.0), (2.0, 2.0), (3.0, 2.0), (1.0, math.inf), (math.nan, 1.0)])
def test_ranges_that_are_none_are_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(CdlmError, match="t_min"):
        check_range(*pair)
    with pytest.raises(CdlmError, match="t_min"):
        TimeWarp(*pair)


@axes
@given(u=fractions, seed=st.integers(0, 1000), scale=st.floats(0, 4))
@settings(max_examples=50)
def test_there_and_back_is_the_identity(axis: Axis, u: Tensor, seed: int, scale: float) -> None:
    schedule = warp(axis, seed, scale)
    close(schedule.u_of_t(schedule.t_of_u(u)), u, 1e-7)
    t = T_MIN + (T_MAX - T_MIN) * u
    close(schedule.t_of_u(schedule.u_of_t(t)), t, 1e-7)


@axes
@given(seed=st.integers(0, 1000), scale=st.floats(0, 6))
@settings(max_examples=30)
def test_more_u_is_more_noise_between_exact_ends(axis: Axis, seed: int, scale: float) -> None:
    schedule = warp(axis, seed, scale)
    t = schedule.t_of_u(torch.linspace(0, 1, 257, dtype=torch.float64))
    assert t.dtype == torch.float64
    assert bool((t.diff() > 0).all())
    assert float(t[0]) == T_MIN
    assert float(t[-1]) == pytest.approx(T_MAX, rel=1e-14)
    assert float(t[-1]) <= T_MAX
    close(schedule.u_of_t(torch.tensor([T_MIN, T_MAX], dtype=torch.float64)), torch.tensor([0.0, 1.0]).double(), 1e-12)


@axes
def test_a_fresh_warp_is_the_identity_on_its_axis(axis: Axis) -> None:
    t = TimeWarp(T_MIN, T_MAX, axis).t_of_u(torch.tensor([0.5], dtype=torch.float64))
    expected = math.sqrt(T_MIN * T_MAX) if axis == "log" else (T_MIN + T_MAX) / 2
    assert float(t) == pytest.approx(expected, rel=1e-6)


@axes
@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_the_density_is_the_derivative(axis: Axis, seed: int) -> None:
    schedule = warp(axis, seed)
    t = spread(301).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.u_of_t(t).sum(), t)
    close(schedule.density(t.detach()), slope)
    u = torch.linspace(0.0005, 0.9995, 301, dtype=torch.float64).requires_grad_()
    level = schedule.t_of_u(u)
    (inverse,) = torch.autograd.grad(level.sum(), u)
    close(schedule.density(level.detach()) * inverse, torch.ones_like(inverse), 1e-6)


@axes
def test_the_density_is_the_finite_difference(axis: Axis) -> None:
    schedule = warp(axis, 3)
    t, step = spread(500)[1:-1], 1e-7
    finite = (schedule.u_of_t(t + step) - schedule.u_of_t(t - step)) / (2 * step)
    near = (finite - schedule.density(t)).abs() < 1e-4 * finite
    assert near.double().mean() > 0.99  # the others straddle an edge of a bin


@axes
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_the_density_integrates_to_one(axis: Axis, seed: int) -> None:
    schedule = warp(axis, seed, scale=1.0)
    x = torch.linspace(math.log(T_MIN), math.log(T_MAX), 40_001, dtype=torch.float64)
    t = x.exp().clamp(T_MIN, T_MAX)
    assert float(torch.trapezoid(schedule.density(t) * t, x)) == pytest.approx(1, abs=2e-2)  # by trapezoids


@axes
def test_no_bin_vanishes(axis: Axis) -> None:
    assert bool((warp(axis, scale=200.0).density(spread(500)) > 0).all())


@axes
def test_the_fit_makes_u_linear_in_the_loss(axis: Axis) -> None:
    flat, learned = TimeWarp(T_MIN, T_MAX, axis), TimeWarp(T_MIN, T_MAX, axis, ema=0.9)

    def nats(t: Tensor) -> Tensor:
        x = flat.u_of_t(t)
        return 6 * x**2 * (3 - 2 * x)

    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(learned.parameters(), lr=0.05)
    for _ in range(400):
        t = learned.t_of_u(torch.rand(256, generator=generator, dtype=torch.float64))
        optimiser.zero_grad()
        learned.fit(t, nats(t)).backward()
        optimiser.step()
        learned.after_step()
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert float((nats(learned.t_of_u(u)) / 6 - u).abs().max()) < 0.02
    assert float((nats(flat.t_of_u(u)) / 6 - u).abs().max()) > 0.08


@axes
def test_the_fit_is_zero_for_the_losses_that_the_warp_predicts(axis: Axis) -> None:
    schedule = TimeWarp(T_MIN, T_MAX, axis, floor=0.0)
    t = spread(50)
    assert schedule.fit(t, schedule.u_of_t(t)).item() == pytest.approx(0, abs=1e-9)
    assert schedule.fit(t, schedule.u_of_t(t) + 1).item() == pytest.approx(1, rel=1e-6)


def test_the_draw_does_not_bias_the_fit() -> None:
    """Rows drawn densely in one half weigh less each, so that the halves weigh alike."""
    schedule = TimeWarp(T_MIN, T_MAX, bins=2, floor=0.0)
    with torch.no_grad():
        schedule.averaged[1] = torch.tensor([0.9, 0.1]).log()
    t = schedule.t_of_u((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    high = t > math.sqrt(T_MIN * T_MAX)
    assert int(high.sum()) == 100
    residual = schedule.fit(t, TimeWarp(T_MIN, T_MAX, bins=2, floor=0.0).u_of_t(t) + high)
    assert residual.item() == pytest.approx(0.5, rel=1e-5)


def test_training_reads_the_average_of_the_logits() -> None:
    schedule = TimeWarp(T_MIN, T_MAX, ema=0.75)
    before = schedule.averaged.clone()
    with torch.no_grad():
        schedule.logits.add_(1)
    schedule.after_step()
    torch.testing.assert_close(schedule.averaged, before + 0.25)


@pytest.mark.parametrize("grid", [Warped(), UniformT(), LogT()], ids=repr)
@given(steps=st.integers(2, 60), seed=st.integers(0, 100))
@settings(max_examples=20)
def test_grids_fall_from_t_max_to_t_min(grid: Warped | UniformT | LogT, steps: int, seed: int) -> None:
    t = grid.levels(warp("log", seed), steps)
    assert t.shape == (steps,)
    assert t.dtype == torch.float64
    assert bool((t.diff() < 0).all())
    assert float(t[0]) == pytest.approx(T_MAX, rel=1e-12)
    assert float(t[-1]) == pytest.approx(T_MIN, rel=1e-12)


@pytest.mark.parametrize("grid", [Warped(), UniformT(), LogT()], ids=repr)
def test_one_step_starts_at_the_top_and_none_is_refused(grid: Warped | UniformT | LogT) -> None:
    assert grid.levels(warp("log"), 1).tolist() == pytest.approx([T_MAX])
    for steps in (0, -3):
        with pytest.raises(CdlmError, match="steps >= 1"):
            grid.levels(warp("log"), steps)


def test_each_grid_is_even_in_its_own_coordinate() -> None:
    schedule = warp("linear", 5)
    close(UniformT().levels(schedule, 9).diff().diff(), torch.zeros(7, dtype=torch.float64))
    close(LogT().levels(schedule, 9).log().diff().diff(), torch.zeros(7, dtype=torch.float64))
    close(schedule.u_of_t(Warped().levels(schedule, 9)).diff().diff(), torch.zeros(7, dtype=torch.float64), 1e-7)
