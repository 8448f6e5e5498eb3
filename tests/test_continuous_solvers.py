"""Laws of the solvers, on a denoiser with a closed form, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, draws
from torch import Tensor

from cdlm.continuous.schedules import alpha_of, gamma_of
from cdlm.continuous.solvers import ADAPTIVE, FIXED, Advance, Euler, Heun, Interval, Solver, TorchDiffEq
from cdlm.core.errors import CdlmError
from cdlm.core.types import Condition

HIGH, LOW = 6.0, 1.2
"""A stretch of levels in which the tokens of the oracle are being decided."""


class Field:
    """The oracle as the loop hands it to a solver; counts the rows it predicts."""

    def __init__(self) -> None:
        self.oracle = Oracle()

    def __call__(self, z: Tensor, t: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(z)
        x0 = self.oracle.denoise(z, t, Condition(zero, zero[..., 0] == 0, zero)).x0
        return x0, x0


def start(rows: int = 2) -> Tensor:
    return HIGH * torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def walk(solver: Solver, steps: int, z: Tensor | None = None) -> Tensor:
    """The state at LOW after `steps` intervals, even in the logarithm."""
    field, z = Field(), start() if z is None else z
    memory = solver.start(z)
    grid = torch.linspace(math.log(HIGH), math.log(LOW), steps + 1, dtype=torch.float64).exp()
    for now, then in itertools.pairwise(grid):
        t, t_next = now.expand(len(z)).clone(), then.expand(len(z)).clone()
        memory, moved = solver.advance(memory, Interval(z, field(z, t)[0], t, t_next, draws(len(z))), field)
        z = moved.z
    return z


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return walk(TorchDiffEq("rk4", double=True), 400)


def order(solver: Solver, reference: Tensor, counts: tuple[int, ...]) -> float:
    """Minus the slope of log error against log steps."""
    errors = [(walk(solver, steps) - reference).abs().max().log() for steps in counts]
    x = torch.tensor(counts, dtype=torch.float64).log()
    x, y = x - x.mean(), torch.stack(errors)
    return -float((x * (y - y.mean())).sum() / x.square().sum())


@pytest.mark.parametrize(
    ("solver", "expected"), [(Euler(), 1), (Heun(), 2), (TorchDiffEq("midpoint", double=True), 2)], ids=repr
)
def test_the_order_of_convergence(solver: Solver, expected: int, reference: Tensor) -> None:
    assert order(solver, reference, (32, 64, 128)) == pytest.approx(expected, abs=0.25)


def test_rk4_is_of_a_high_order(reference: Tensor) -> None:
    assert order(TorchDiffEq("rk4", double=True), reference, (8, 16, 32)) >= 3


def test_an_adaptive_method_meets_its_tolerance(reference: Tensor) -> None:
    for tolerance in (1e-4, 1e-8):
        solver = TorchDiffEq("dopri5", rtol=tolerance, atol=tolerance, double=True)
        torch.testing.assert_close(walk(solver, 1), reference, rtol=30 * tolerance, atol=30 * tolerance)


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_every_method_named_solves_the_equation(method: str, reference: Tensor) -> None:
    torch.testing.assert_close(walk(TorchDiffEq(method, double=True), 64), reference, rtol=0.05, atol=0.05)


def one_step(solver: Solver, t: float, t_next: float, constant: Tensor, z: Tensor) -> Advance:
    now, then = (torch.full((len(z),), level, dtype=torch.float64) for level in (t, t_next))
    interval = Interval(z, constant, now, then, draws(len(z)))
    return solver.advance(solver.start(z), interval, lambda z, t, rows: (constant, constant))[1]


def moved(solver: Solver, z: Tensor, t: Tensor, t_next: Tensor) -> Advance:
    """One interval of the oracle."""
    field = Field()
    return solver.advance(solver.start(z), Interval(z, field(z, t)[0], t, t_next, draws(len(z))), field)[1]


@given(t=st.floats(0.1, 50), ratio=st.floats(0.01, 0.99))
@settings(max_examples=30)
def test_euler_is_exact_for_a_constant_estimate(t: float, ratio: float) -> None:
    z, constant = start(), start().flip(0) / 7
    direct = one_step(Euler(), t, t * ratio, constant, z).z
    halfway = one_step(Euler(), t, t * (1 + ratio) / 2, constant, z).z
    two = one_step(Euler(), t * (1 + ratio) / 2, t * ratio, constant, halfway).z
    torch.testing.assert_close(two, direct, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(direct, constant + ratio * (z - constant), rtol=1e-10, atol=1e-10)


@given(t=st.floats(0.1, 50), ratio=st.floats(0.01, 0.99))
@settings(max_examples=30)
def test_euler_in_its_other_forms(t: float, ratio: float) -> None:
    z, x0, then = start(), start().flip(0) / 7, t * ratio
    step = one_step(Euler(), t, then, x0, z).z
    score = (x0 - z) / t**2
    torch.testing.assert_close(step, z + (t - then) * t * score, rtol=1e-9, atol=1e-9)
    now, next_ = torch.tensor(t, dtype=torch.float64), torch.tensor(then, dtype=torch.float64)
    noise_ratio = ((gamma_of(next_) - gamma_of(now)) / 2).exp()
    preserving = alpha_of(next_) * x0 + (alpha_of(now) * z * alpha_of(next_) / alpha_of(now) - alpha_of(next_) * x0) * (
        noise_ratio
    )
    torch.testing.assert_close(alpha_of(next_) * step, preserving, rtol=1e-9, atol=1e-9)


def test_heun_is_euler_for_a_constant_estimate_and_hands_its_newer_estimate_on() -> None:
    z, constant = start(), start().flip(0) / 7
    heun, euler = (one_step(solver, 5.0, 2.0, constant, z) for solver in (Heun(), Euler()))
    torch.testing.assert_close(heun.z, euler.z)
    assert heun.x0 is constant
    assert euler.x0 is None
    assert heun.evaluations == [1, 1]
    assert euler.evaluations == [0, 0]


def test_rows_may_stand_at_different_levels() -> None:
    z = start(3)
    t, t_next = torch.tensor([6.0, 3.0, 1.0]).double(), torch.tensor([4.0, 2.0, 0.2]).double()
    for solver in (Euler(), Heun(), TorchDiffEq("rk4", double=True), TorchDiffEq("dopri5", double=True)):
        together = moved(solver, z, t, t_next)
        for i in range(3):
            row = slice(i, i + 1)
            alone = moved(solver, z[row], t[row], t_next[row])
            assert torch.equal(together.z[row], alone.z)
            assert list(together.evaluations[row]) == list(alone.evaluations)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_stiff_neighbour_changes_nothing(method: str) -> None:
    solver, z = TorchDiffEq(method, double=True), start(2)
    t, t_next = torch.tensor([6.0, 6.0]).double(), torch.tensor([5.0, 0.05]).double()
    easy = slice(0, 1)
    alone, beside = moved(solver, z[easy], t[easy], t_next[easy]), moved(solver, z, t, t_next)
    assert torch.equal(beside.z[easy], alone.z)
    assert beside.evaluations[:1] == alone.evaluations
    assert beside.evaluations[1] > beside.evaluations[0]


def test_double_integrates_in_float64_and_keeps_the_type_of_the_state() -> None:
    z, constant = start().float(), (start().flip(0) / 7).float()
    wide = one_step(TorchDiffEq("rk4", double=True), 5.0, 2.0, constant, z).z
    narrow = one_step(TorchDiffEq("rk4"), 5.0, 2.0, constant, z).z
    exact = one_step(TorchDiffEq("rk4", double=True), 5.0, 2.0, constant.double(), z.double()).z
    assert wide.dtype == narrow.dtype == torch.float32
    assert torch.equal(wide, exact.float())
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["euler2", "", "scipy_solver"])
def test_an_unknown_method_is_refused(method: str) -> None:
    with pytest.raises(CdlmError, match="dopri5"):
        TorchDiffEq(method)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_methods_with_a_memory_are_refused_since_an_interval_has_none(method: str) -> None:
    with pytest.raises(CdlmError, match=f"'{method}' starts anew in each interval, where it is rk4: use one of euler"):
        TorchDiffEq(method)


def test_a_field_that_no_step_is_small_enough_for_is_an_error_in_one_line() -> None:
    def wild(z: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return 1e30 * torch.sin(1e30 * z), z

    z, t = torch.ones(1, 2, 3), torch.ones(1, dtype=torch.float64)
    with pytest.raises(CdlmError, match="cannot keep its tolerances") as caught:
        TorchDiffEq("dopri5", rtol=1e-9, atol=1e-9).advance((), Interval(z, z, t, t / 2, draws()), wild)
    assert "\n" not in str(caught.value)
