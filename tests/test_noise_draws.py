"""Laws of the random numbers of a step, of the solvers that draw them, and of the loop that they run in."""

import math
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, draws
from setups import Setup, diffusion
from test_replay import RULES, M, live, recorded
from torch import Tensor

from cdlm.continuous.grids import Grid, LogT, UpperEnds, Warped
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.schedules import alpha_of, gamma_of
from cdlm.continuous.solvers import Ancestral, Euler, Heun, Interval, Renoise, Solver, TorchDiffEq
from cdlm.core.rng import StepNoise, row_normal
from cdlm.halting import Criterion, Never, NormConvergence, Patience
from cdlm.halting.replay import replay
from cdlm.sampling.requests import Request

N = 6
KINDS = pytest.mark.parametrize("kind", ["normal", "uniform"])
RANDOM = (Ancestral(), Renoise())
SOLVERS = (*RANDOM, Euler(), Heun(), TorchDiffEq("midpoint", double=True))
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
random_solvers = pytest.mark.parametrize("solver", RANDOM, ids=repr)


class Key(NamedTuple):
    """What the numbers of a row depend on, beside the seed."""

    sample: int
    step: int


keys = st.builds(Key, st.integers(0, 2**31), st.integers(0, 10_000))


def drawn(kind: str, keys: list[Key], *shape: int, seed: int = 0, like: torch.dtype = torch.float64) -> Tensor:
    """The numbers [keys, *shape] of rows in one batch."""
    index, step = zip(*keys, strict=True)
    return getattr(StepNoise(seed, index, step), kind)(torch.empty(len(keys), *shape, dtype=like))


# --- the numbers ---


@KINDS
@given(rows=st.lists(keys, min_size=1, max_size=6), data=st.data(), seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_numbers_belong_to_the_row_and_not_to_the_batch(kind: str, rows: list[Key], data, seed: int) -> None:
    together = drawn(kind, rows, 3, 2, seed=seed)
    order = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=6))  # some of them, or twice
    assert torch.equal(drawn(kind, [rows[i] for i in order], 3, 2, seed=seed), together[order])
    assert torch.equal(drawn(kind, rows, 3, 2, seed=seed), together)  # and not to what was drawn before


def test_all_that_a_key_says_makes_other_numbers() -> None:
    """Samples, steps, purposes and seeds, and the noise that rows start from, are independent of each other."""
    size = 20_000
    rows = [Key(i, k) for i in (0, 1, 2) for k in (0, 1, 2)]
    streams = [drawn("normal", rows, size), drawn("normal", rows, size, seed=1), row_normal(0, range(3), size).double()]
    streams += [torch.special.ndtri(drawn("uniform", rows, size, seed=seed)) for seed in (0, 1)]
    correlation = torch.corrcoef(torch.cat(streams))
    correlation.fill_diagonal_(0)
    assert len(correlation) == 39
    assert float(correlation.abs().max()) < 5.5 / math.sqrt(size)


def test_normal_and_uniform_numbers_are_not_two_forms_of_the_same_bits() -> None:
    rows = [Key(i, 0) for i in range(500)]
    first, second = drawn("uniform", rows, 2).T
    polar = (-2 * torch.log1p(-second)).sqrt() * (2 * math.pi * first).cos()  # how torch makes the one of the other
    normal = drawn("normal", rows, 1)[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([polar, normal]))[0, 1])) < 5 / math.sqrt(len(rows))


def test_the_numbers_are_normal_and_uniform() -> None:
    rows, size = [Key(i, k) for i in range(20) for k in range(5)], 2000
    normal, uniform = drawn("normal", rows, size).flatten(), drawn("uniform", rows, size).flatten()
    count = len(normal)
    for order, moment, deviation in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert float(normal.pow(order).mean()) == pytest.approx(moment, abs=5 * deviation / math.sqrt(count))
    assert bool(((uniform >= 0) & (uniform < 1)).all())
    cells = torch.histc(uniform, 50, 0, 1)
    assert float(((cells - count / 50).square() / (count / 50)).sum()) < 95  # chi-square, 49 degrees, p = 1e-4


def test_normal_numbers_have_the_type_of_the_state_and_uniform_ones_are_always_fine() -> None:
    rows = [Key(3, 1), Key(4, 0)]
    narrow, wide = (drawn("normal", rows, 50, like=dtype) for dtype in (torch.float32, torch.float64))
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert torch.equal(narrow.double(), wide)  # one noise, whatever the arithmetic
    uniform = drawn("uniform", rows, 50, like=torch.float32)
    assert uniform.dtype == torch.float64
    assert not torch.equal(uniform.float().double(), uniform)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    drawn("normal", [Key(0, 0)], 9)
    drawn("uniform", [Key(0, 0)], 9)
    assert torch.equal(before, torch.random.get_rng_state())


# --- one step ---


def advance(solver: Solver, z: Tensor, x0: Tensor, t: float, t_next: float, step: int = 0) -> Tensor:
    now, then = (torch.full((len(z),), level, dtype=torch.float64) for level in (t, t_next))
    interval = Interval(z, x0, now, then, draws(len(z), step))
    _, moved = solver.advance(solver.start(z), interval, lambda z, t, rows: (x0, x0))
    assert moved.x0 is None
    assert moved.evaluations == [0] * len(z)
    return moved.z


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(t=st.floats(0.05, 200), ratio=st.floats(1e-4, 1 - 1e-9))
@settings(max_examples=60)
def test_ancestral_is_the_variance_preserving_step(t: float, ratio: float) -> None:
    """Equation 33 of arXiv 2107.00630, with s for the next level: its state is alpha z."""
    z, x0 = t * noise(2, 3, 4), noise(2, 3, 4, seed=8)
    now, then = torch.tensor(t, dtype=torch.float64), torch.tensor(t * ratio, dtype=torch.float64)
    c = -torch.expm1(gamma_of(then) - gamma_of(now))
    alpha_t, alpha_s = alpha_of(now), alpha_of(then)
    variance = 1 - alpha_s.square()
    mean = alpha_s * (alpha_t * z * (1 - c) / alpha_t + c * x0)
    expected = mean + (variance * c).sqrt() * draws(2).normal(z)
    step = advance(Ancestral(), z, x0, t, t * ratio)
    torch.testing.assert_close(alpha_s * step, expected, rtol=1e-9, atol=1e-9 * t)


@given(t=st.floats(0.05, 200))
@settings(max_examples=20)
def test_the_ends_of_a_step(t: float) -> None:
    z, x0 = t * noise(2, 3, 4), noise(2, 3, 4, seed=8)
    torch.testing.assert_close(advance(Ancestral(), z, x0, t, t), z, rtol=1e-14, atol=1e-14 * t)
    near = advance(Ancestral(), z, x0, t, t * (1 - 1e-12))
    assert float((near - z).abs().max()) < 1e-5 * t  # the noise of a short step is of the order of its root
    assert not torch.equal(near, z)
    for solver in (*RANDOM, Euler()):
        assert torch.equal(advance(solver, z, x0, t, 0.0), x0)
    assert torch.equal(advance(Renoise(), z, x0, t, t), advance(Renoise(), 3 * z, x0, 9 * t, t))  # nothing is kept


def falling(ratios: list[float], start: float) -> list[float]:
    return [start * float(x) for x in np.cumprod([1.0, *ratios])]


@pytest.mark.parametrize(
    ("solver", "kept"), [(Ancestral(), 1.0), (Renoise(), 0.0), (Euler(), math.inf)], ids=["ancestral", "renoise", "ode"]
)
@given(ratios=st.lists(st.floats(0.2, 0.98), min_size=1, max_size=6), start=st.floats(0.1, 50))
@settings(max_examples=12)
def test_the_marginal_of_a_constant_estimate_is_kept(
    solver: Solver, kept: float, ratios: list[float], start: float
) -> None:
    """z = x0 + t eps at every level, with an eps that is all new, all old or, of the ancestral step, old to t'/t."""
    grid, first, x0 = falling(ratios, start), noise(2, 100, 400), noise(2, 100, 400, seed=8)
    z = x0 + grid[0] * first
    for step, (t, t_next) in enumerate(pairwise(grid)):
        z = advance(solver, z, x0, t, t_next, step)
    eps = (z - x0) / grid[-1]
    close = 5.5 / math.sqrt(eps.numel())
    assert float(eps.mean()) == pytest.approx(0, abs=close)
    assert float(eps.square().mean()) == pytest.approx(1, abs=math.sqrt(2) * close)
    assert float((eps * x0).mean()) == pytest.approx(0, abs=close)
    expected = {math.inf: 1.0, 0.0: 0.0, 1.0: grid[-1] / grid[0]}[kept]
    assert float((eps * first).mean()) == pytest.approx(expected, abs=2 * close)


# --- the loop ---


def requests(indices) -> list[Request]:
    """Rows of which every third one has a prompt."""
    tokens = torch.arange(N) % 7
    return [Request(int(i), tokens, torch.arange(N) < (2 if i % 3 == 1 else 0)) for i in indices]


def run(sampler: Setup, asked: list[Request], batch_size: int) -> tuple[dict[int, list[Tensor]], dict[int, tuple]]:
    """Logits of every step of each sample, and what left the loop."""
    seen: dict[int, list[Tensor]] = {}
    left: dict[int, tuple] = {}
    for step in DiffusionLoop(Oracle(), *sampler, batch_size).steps(asked):
        state = step.state
        for row, logits in zip(state.row.tolist(), state.logits, strict=True):
            seen.setdefault(row, []).append(logits)
        for row, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens.tolist(), strict=True):
            left[int(state.row[row])] = (tuple(tokens), int(state.step[row]), int(state.nfe[row]))
    return seen, left


def assert_same(first: tuple[dict, dict], second: tuple[dict, dict]) -> None:
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for i, logits in first[0].items():
        assert torch.equal(torch.stack(logits), torch.stack(second[0][i]))


def sampler(solver: Solver, criterion: Criterion | None = None, steps: int = 12, **others) -> Setup:
    record = frozenset({"logits", "tokens", "score_cosine"})
    return diffusion(steps, criterion or Never(), solver=solver, record=record, **others)


@every_solver
def test_each_sample_is_the_same_in_any_company(solver: Solver) -> None:
    """Alone, in another order, in small batches which rows leave early and others join."""
    halting = sampler(solver, Patience(2) | NormConvergence(0.05))
    together = run(halting, requests(range(7)), 7)
    assert len({steps for _, steps, _ in together[1].values()}) > 1
    for order, size in ((range(7), 1), (range(7), 2), ([5, 0, 6, 3, 1, 2, 4], 3), ([6, 5, 4, 3, 2, 1, 0], 7)):
        assert_same(run(halting, requests(order), size), together)


@random_solvers
@given(order=st.permutations(range(5)), size=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=5)
def test_order_and_batch_size_do_not_matter(solver: Solver, order: list[int], size: int, seed: int) -> None:
    halting = sampler(solver, Patience(2), seed=seed, steps=8)
    assert_same(run(halting, requests(order), size), run(halting, requests(range(5)), 5))


@every_solver
def test_a_halted_sample_is_the_beginning_of_the_full_one(solver: Solver) -> None:
    full, _ = run(sampler(solver), requests(range(6)), 4)
    halted, _ = run(sampler(solver, Patience(2)), requests(range(6)), 4)
    assert any(len(halted[i]) < len(full[i]) for i in full)
    for i in full:
        assert all(torch.equal(a, b) for a, b in zip(halted[i], full[i], strict=False))


@random_solvers
def test_every_step_and_every_sample_has_fresh_noise_of_its_own(solver: Solver) -> None:
    noises: list[Tensor] = []
    before = None
    walk = diffusion(9, solver=solver, grid=LogT(), seed=4, record=frozenset({"z", "x0"}))
    for step in DiffusionLoop(Oracle(), *walk, 4).steps(requests([0, 3, 6, 9])):
        state = step.state
        if before is not None:
            t, t_next = (s.t[:, None, None] for s in (before, state))
            kept = (t_next / t).square() if solver == Ancestral() else 0
            made = state.z - before.x0 - kept * (before.z - before.x0)
            noises += list(made / (t_next * (1 - kept) ** 0.5))
        before = state
    expected = [drawn("normal", [Key(i, k) for i in (0, 3, 6, 9)], N, 5, seed=4) for k in range(8)]
    torch.testing.assert_close(torch.stack(noises), torch.cat(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "grid", "steps"),
    [(Ancestral(), Warped(), 100), (Ancestral(), UpperEnds(), 100), (Euler(), LogT(), 100), (Heun(), LogT(), 40)],
    ids=repr,
)
def test_samples_reproduce_the_token_frequencies(solver: Solver, grid: Grid, steps: int) -> None:
    oracle, count, rows, length = Oracle(), Counter(), 60, 60
    nothing = torch.zeros(length, dtype=torch.int64)
    asked = [Request(i, nothing, nothing > 0) for i in range(rows)]
    for step in DiffusionLoop(oracle, *diffusion(steps, grid=grid, solver=solver, seed=3), rows).steps(asked):
        count.update(step.tokens.flatten().tolist())
    expected = oracle.frequencies.numpy() * rows * length
    seen = np.array([count[i] for i in range(7)])
    assert ((seen - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


def test_solvers_share_the_start_and_seeds_do_not() -> None:
    one, other = (run(sampler(Ancestral(), seed=seed), requests([0]), 1)[0][0] for seed in (0, 1))
    assert not torch.equal(one[0], other[0])
    still, walked = (run(sampler(solver), requests([0]), 1)[0][0] for solver in (Euler(), Ancestral()))
    assert torch.equal(still[0], walked[0])
    assert not torch.equal(still[1], walked[1])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_replayed_rule_is_the_live_run(rule: Criterion) -> None:
    again = replay(recorded(Ancestral()), rule)
    expected, _ = live(Ancestral(), rule)
    seen = {
        i: (int(again.steps[i]), bool(again.halted[i]), int(again.nfe[i]), again.tokens[i].tolist()) for i in range(M)
    }
    assert seen == expected
