"""ELF's churn and the exact one: what they do to a state, to a whole walk with an exact denoiser, and in the loop."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float, Int
from oracle import Oracle, SelfConditioned, draws, loop
from scipy.stats import kstest
from setups import Setup, diffusion
from test_noise_draws import assert_same, noise, requests, run
from test_replay import M, live, recorded
from torch import Tensor
from toys import with_tokenizer

import cdlm
from cdlm.continuous.denoiser import Denoiser
from cdlm.continuous.grids import Adaptive, Grid, LogT, Truncated, UniformT, UpperEnds, Warped
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.projections import Drawn
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.schedules import LogitNormal
from cdlm.continuous.solvers import SOLVERS, Churn, Euler, Interval, Solver
from cdlm.core.errors import CdlmError
from cdlm.core.rng import CHURN
from cdlm.core.types import Condition, Prediction
from cdlm.halting import Never, NormConvergence, Patience
from cdlm.halting.replay import replay
from cdlm.policies.confidence import Threshold
from cdlm.sampling.requests import Request

Kind = Literal["elf", "exact"]
kinds = pytest.mark.parametrize("kind", ["elf", "exact"])
every_churn = pytest.mark.parametrize("solver", [Churn(), Churn(0.5, "exact", 0.7)], ids=repr)
S = 2.0


def level(tau: float) -> Tensor:
    return torch.tensor([S * (1 - tau) / tau], dtype=torch.float64)


# --- one step back ---


@pytest.mark.parametrize(("kind", "added", "deviation"), [("elf", 0.046875, 0.478862), ("exact", 0.216506, 0.523438)])
def test_the_step_back_is_that_of_elf(kind: Kind, added: float, deviation: float) -> None:
    """At tau = 1/2, with h = 1/32 and gamma = 1.5, deviations in the units of the flow and of its noise s."""
    churn, t, z = Churn(kind=kind), level(0.5), S * noise(1, 3, 4)
    moved, back = churn.before(z, t, level(0.5 + 1 / 32), draws())
    tau = S / (S + float(back))
    assert tau == pytest.approx((1 - 1.5 / 32) * 0.5, rel=1e-12)
    fresh = (moved - z) / draws().normal(z, CHURN)
    torch.testing.assert_close(fresh, torch.full_like(z, added * S / tau), rtol=1e-5, atol=0)
    total = math.hypot(float(fresh[0, 0, 0]), float(t)) * tau / S
    assert total == pytest.approx(deviation, abs=1e-6)
    assert 1 - tau == pytest.approx(0.523438, abs=1e-6)  # what the level says


@kinds
@given(tau=st.floats(1e-3, 0.9), h=st.floats(1e-4, 0.09), gamma=st.floats(0.01, 10), s=st.floats(0.1, 10))
@settings(max_examples=25)
def test_a_step_with_churn_is_the_step_of_the_flow(kind: Kind, tau: float, h: float, gamma: float, s: float) -> None:
    """In the flow's own state Z = tau z: Z_b = a Z + fresh noise, then along the velocity from a tau to tau + h."""
    a, after = 1 - gamma * h, tau + h
    t, t_next = (torch.tensor([s * (1 - x) / x], dtype=torch.float64) for x in (tau, after))
    z, x0 = t * noise(1, 3, 4), noise(1, 3, 4, seed=8)
    churn = Churn(gamma, kind, s)
    moved, back = churn.before(z, t, t_next, draws())
    share = 1 - a if kind == "elf" else math.sqrt(max(0.0, (1 - a * tau) ** 2 - (a * (1 - tau)) ** 2))
    flow = a * tau * z + share * s * draws().normal(z, CHURN)
    small = 1e-9 * s  # by hand, the variances are a small difference
    torch.testing.assert_close(moved * a * tau, flow, rtol=1e-9, atol=small)
    assert float(back) == pytest.approx(s * (1 - a * tau) / (a * tau), rel=1e-9)
    ended = flow + (after - a * tau) * (x0 - flow) / (1 - a * tau)
    torch.testing.assert_close(end_of(churn, moved, x0, back, t_next) * after, ended, rtol=1e-9, atol=small)


def end_of(solver: Solver, z: Tensor, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    _, moved = solver.advance(solver.start(z), Interval(z, x0, t, t_next, draws()), lambda z, t, rows: (x0, x0))
    return moved.z


@kinds
@given(t=st.floats(1e-3, 1e5), scale=st.floats(0.1, 10), ratio=st.floats(0.01, 1))
@settings(max_examples=30)
def test_no_churn_and_a_step_of_no_length_change_nothing(kind: Kind, t: float, scale: float, ratio: float) -> None:
    z, now = t * noise(1, 3, 4), torch.tensor([t], dtype=torch.float64)
    for churn, then in ((Churn(0.0, kind, scale), now * ratio), (Churn(5.0, kind, scale), now)):
        moved, back = churn.before(z, now, then, draws())
        assert torch.equal(moved, z)
        assert torch.equal(back, now)


def test_the_noise_of_the_step_back_is_no_other_noise_of_the_step() -> None:
    like = torch.empty(1, 500, 40, dtype=torch.float64)
    back, forth = draws().normal(like, CHURN), draws().normal(like)
    uniform = torch.special.ndtri(draws().uniform(like))
    streams = torch.corrcoef(torch.stack([x.flatten() for x in (back, forth, uniform)]))
    assert float(streams.fill_diagonal_(0).abs().max()) < 5 / math.sqrt(like.numel())


# --- a whole walk on the normal distribution, where the denoiser is exact ---


def spread(kind: str, steps: int, gamma: float = 1.5) -> float:
    """Deviation of the samples of a standard normal distribution, in closed form: every step is linear."""
    levels = UpperEnds().levels(LogitNormal(), steps)
    variance = levels[0].square()
    for i, t in enumerate(levels):
        t_next = levels[min(i + 1, steps - 1)]
        h = S / (S + t_next) - S / (S + t)
        a_tau = (1 - gamma * h) * S / (S + t)
        back = t if kind == "ode" else S * (1 - a_tau) / a_tau
        variance = variance + ((back - t).square() if kind == "elf" else back.square() - t.square())
        kept = 1 / (1 + back.square())
        move = kept if i == steps - 1 else kept + t_next / back * (1 - kept)
        variance = variance * move.square()
    return float(variance.sqrt())


SPREADS = {32: (0.440, 0.437, 0.186), 256: (0.677, 0.667, 0.209)}
"""Of ODE, exact churn and ELF's."""


@pytest.mark.parametrize("steps", SPREADS)
def test_the_churn_of_elf_is_a_temperature_and_the_exact_one_is_none(steps: int) -> None:
    found = [spread(kind, steps) for kind in ("ode", "exact", "elf")]
    assert found == pytest.approx(SPREADS[steps], abs=6e-4)
    assert found[2] < found[1] / 2
    assert spread("elf", steps, 0.0) == pytest.approx(found[0], rel=1e-12)


def test_in_the_limit_the_churn_of_elf_is_an_ode_at_a_temperature_that_falls() -> None:
    """With ever shorter steps no noise is left: the score is divided by 1 / (1 + gamma tau)."""
    tau = torch.linspace(1e-4, 1 - 1e-4, 4000, dtype=torch.float64)
    fine, gamma = S * (1 - tau) / tau, 1.5
    states = {"elf": fine[0], "ode": fine[0]}
    for t, t_next in zip(fine[:-1].split(1), fine[1:].split(1), strict=True):
        back, added = Churn(gamma, "elf", S).back(t, t_next)
        kept = 1 / (1 + back.square())
        states["elf"] = (states["elf"].square() + added.square()).sqrt() * (kept + t_next / back * (1 - kept))
        kept = 1 + (1 / (1 + t.square()) - 1) * (1 + gamma * S / (S + t))
        states["ode"] = states["ode"] * (kept + t_next / t * (1 - kept))
    closed = math.exp(-gamma * (S**2 * math.log(S) + S * math.pi / 2) / (1 + S**2))
    assert float(states["elf"]) == pytest.approx(closed, rel=2e-2)
    assert float(states["ode"]) == pytest.approx(closed, rel=5e-3)


class Normal(Denoiser):
    """Data that are standard normal numbers: the posterior mean is z / (1 + t^2)."""

    rho, dim = 2.0, 4

    def __init__(self) -> None:
        self.schedule = LogitNormal()

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        x0 = z / (1 + t.square()).to(z.dtype)[:, None, None]
        return Prediction(x0, x0)

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return torch.zeros(*tokens.shape, 4, dtype=torch.float64)

    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return weights


@pytest.mark.parametrize("kind", ["ode", "exact", "elf"])
def test_the_loop_draws_the_spread_of_the_closed_form(kind: str) -> None:
    n, steps = 4000, 32
    solver = Euler() if kind == "ode" else Churn(kind="exact" if kind == "exact" else "elf")
    nothing = torch.zeros(n, dtype=torch.int64)
    walk = loop(Normal(), steps=steps, solver=solver, grid=UpperEnds(), record={"x0", "z"}, seed=2)
    states = [step.state for step in walk.steps([Request(0, nothing, nothing > 0)])]
    assert len(states) == steps
    deviation = float(states[-1].x0.std())
    assert deviation == pytest.approx(spread(kind, steps), rel=4 / math.sqrt(2 * 4 * n))


@pytest.mark.parametrize(("tau", "after"), [(0.1, 0.2), (0.2, 0.3), (0.5, 0.6)])
def test_exact_churn_keeps_the_marginal_of_the_data_and_that_of_elf_does_not(tau: float, after: float) -> None:
    """Kolmogorov and Smirnov's test: after a step back the state is normal with the variance that its level says."""
    z = noise(1, 100, 100) + level(tau) * noise(1, 100, 100, seed=8)
    found = {}
    for kind in ("exact", "elf"):
        moved, back = SOLVERS.parse(f"Churn(1.5, {kind!r})").before(z, level(tau), level(after), draws())
        found[kind] = kstest((moved / (1 + back.square()).sqrt()).flatten().numpy(), "norm").pvalue
    assert found["exact"] > 1e-3
    assert found["elf"] < 1e-6


# --- the loop ---


def sampler(solver: Solver, criterion: Any = None, steps: int = 12, **others: Any) -> Setup:
    record = frozenset({"logits", "tokens", "score_cosine"})
    return diffusion(steps, criterion or Never(), solver=solver, record=record, **others)


@kinds
@pytest.mark.parametrize("grid", [Warped(), LogT(), UniformT(), UpperEnds(), Truncated(LogT(), 0.5)], ids=repr)
def test_no_churn_is_euler_bit_for_bit(kind: Kind, grid: Grid) -> None:
    still, plain = (
        run(sampler(s, Patience(3), 8, grid=grid, block=4), requests(range(3)), 3) for s in (Churn(0.0, kind), Euler())
    )
    assert_same(still, plain)


@every_churn
def test_each_sample_is_the_same_in_any_company(solver: Solver) -> None:
    halting = sampler(solver, Patience(2) | NormConvergence(0.05))
    together = run(halting, requests(range(7)), 7)
    assert len({steps for _, steps, _ in together[1].values()}) > 1
    for order, size in ((range(7), 1), ([5, 0, 6, 3, 1, 2, 4], 3)):
        assert_same(run(halting, requests(order), size), together)


@every_churn
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("commit", [None, Threshold(0.9)], ids=repr)
def test_rows_alone_equal_the_batch_with_blocks_and_commits(solver: Solver, block: int | None, commit: Any) -> None:
    guidance = Guidance(projection=Drawn(0.9))
    setup = sampler(solver, Patience(3), 8, block=block, commit=commit, guidance=guidance)
    assert_same(run(setup, requests(range(3)), 1), run(setup, requests(range(3)), 3))


@every_churn
def test_a_halted_sample_is_the_beginning_of_the_full_one(solver: Solver) -> None:
    full, _ = run(sampler(solver), requests(range(6)), 4)
    halted, _ = run(sampler(solver, Patience(2)), requests(range(6)), 4)
    assert any(len(halted[i]) < len(full[i]) for i in full)
    for i in full:
        assert all(torch.equal(a, b) for a, b in zip(halted[i], full[i], strict=False))


class Levels(Oracle):
    """Remembers at which levels it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[Tensor] = []

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        self.at.append(t.clone())
        return super().denoise(z, t, condition)


@every_churn
def test_rows_report_the_level_of_the_call_and_the_last_step_takes_no_churn(solver: Churn) -> None:
    oracle = Levels()
    steps = list(loop(oracle, steps=9, solver=solver, grid=LogT()).steps(requests(range(3))))
    assert all(torch.equal(step.state.t, at) for step, at in zip(steps, oracle.at, strict=True))
    grid = LogT().levels(oracle.schedule, 9)
    reported = torch.stack([step.state.t[0] for step in steps])
    assert bool((reported[:-1] > grid[:-1]).all())
    assert float(reported[-1]) == float(grid[-1])
    tau, s = 1 / (1 + grid / solver.noise_scale), solver.noise_scale
    a = 1 - solver.gamma * tau.diff()
    torch.testing.assert_close(reported[:-1], s * (1 - a * tau[:-1]) / (a * tau[:-1]), rtol=1e-12, atol=0)


@every_churn
def test_given_positions_of_a_blind_network_stay_near_their_embedding(solver: Solver) -> None:
    """Their state is the embedding under noise that falls with the level."""
    oracle = Oracle()
    oracle.sees_given = False
    asked = Request(0, torch.arange(6), torch.arange(6) < 3)
    states = [s.state for s in loop(oracle, steps=40, solver=solver, grid=LogT(), record={"z"}).steps([asked])]
    off = states[-1].z[0, :3] - oracle.table[:3]
    assert float(off.abs().max()) < 5 * float(states[-1].t)


def test_churn_feeds_self_conditioning_as_euler_does() -> None:
    oracle = SelfConditioned()
    list(loop(oracle, steps=5, solver=Churn(kind="exact")).steps(requests(range(2))))
    assert all(torch.equal(after.shown, before.x0) for before, after in pairwise(oracle.seen))


# --- what is refused ---


def test_a_churn_behind_pure_noise_is_refused_before_the_first_step() -> None:
    oracle = Oracle()
    with pytest.raises(CdlmError, match=r"gamma below ([\d.]+)") as caught:
        loop(oracle, steps=4, solver=Churn(50.0), grid=LogT())
    assert oracle.calls == 0
    assert "\n" not in str(caught.value)
    most = float(str(caught.value).split("gamma below ")[1].split(",")[0])
    asked = requests(range(1))
    list(loop(oracle, steps=4, solver=Churn(most), grid=LogT()).steps(asked))
    with pytest.raises(CdlmError, match="behind pure noise"):
        loop(oracle, steps=4, solver=Churn(most + 0.02), grid=LogT())
    list(loop(oracle, steps=1, solver=Churn(50.0), grid=LogT()).steps(asked))  # one step takes none


def test_steps_of_a_rows_own_are_refused_when_the_sampler_is_made() -> None:
    with pytest.raises(CdlmError, match="next level"):
        Diffusion(solver=Churn(), grid=Adaptive())
    with pytest.raises(CdlmError, match="next level"):
        replace(Diffusion(solver=Churn()), grid=Adaptive())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Churn(-1)", "gamma"), ("Churn(1, 'half')", "kind"), ("Churn(1, 'elf', 0)", "noise_scale"),
        ("Churn('much')", "gamma"),
    ],
)  # fmt: skip
def test_a_churn_that_is_none_is_refused(text: str, word: str) -> None:
    with pytest.raises(CdlmError, match=word):
        SOLVERS.parse(text)


def test_it_is_a_setting_of_a_session() -> None:
    text = "Churn(gamma=1.0, kind='exact', noise_scale=2.0)"
    assert Diffusion().with_flat(solver="Churn(1.0, 'exact')").settings["solver"] == text
    model = with_tokenizer()
    named, made = (cdlm.generate(model, n=2, steps=5, solver=solver) for solver in (text, Churn(1.0, "exact")))
    assert named.texts == made.texts
    assert named.nfe.tolist() == [5, 5]


@every_churn
def test_a_replayed_rule_is_the_live_run(solver: Solver) -> None:
    for rule in (Patience(3), NormConvergence(0.1)):
        again = replay(recorded(solver), rule)
        expected, _ = live(solver, rule)
        for i in range(M):
            found = int(again.steps[i]), bool(again.halted[i]), int(again.nfe[i]), again.tokens[i].tolist()
            assert found == expected[i]
