"""Laws of the sampling loop, on the oracle denoiser in float64, bit for bit."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from setups import Setup, diffusion
from torch import Tensor

from cdlm.continuous.grids import LogT, UniformT, Warped
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.continuous.solvers import Euler, Heun, Solver, TorchDiffEq
from cdlm.core.errors import CdlmError
from cdlm.core.types import Condition, Prediction
from cdlm.halting import AngleConvergence, Criterion, FixedSteps, For, FromStep, Never, NormConvergence, Patience
from cdlm.sampling.requests import Request

N = 6
SOLVERS = (Euler(), Heun(), TorchDiffEq("midpoint", double=True), TorchDiffEq("dopri5", 0.05, 0.05, double=True))
CRITERIA = (
    Never(),
    Patience(3),
    NormConvergence(0.02),
    AngleConvergence(0.05),
    FixedSteps(4),
    For(NormConvergence(0.3), 2),
    FromStep(AngleConvergence(0.2), 5),
    Patience(2) & NormConvergence(0.1),
    Patience(6) | NormConvergence(0.01),
)


def requests(indices, prompt: int = 0) -> list[Request]:
    tokens = torch.arange(N) % 7
    return [Request(int(i), tokens, torch.arange(N) < prompt) for i in indices]


def draw(sampler: Setup, asked: list[Request], batch_size: int) -> dict[int, tuple]:
    """Each sample's tokens, calls, halting step and whether a criterion halted it."""
    out = {}
    for step in DiffusionLoop(Oracle(), *sampler, batch_size).steps(asked):
        leaving = step.done.nonzero().squeeze(1)
        for row, tokens in zip(leaving.tolist(), step.tokens, strict=True):
            state = step.state
            out[int(state.row[row])] = (
                tuple(tokens.tolist()), int(state.nfe[row]), int(state.step[row]), bool(step.halted[row])
            )  # fmt: skip
    return out


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_batch_equals_its_members_alone(solver: Solver, criterion: Criterion) -> None:
    sampler = diffusion(steps=9, solver=solver, criterion=criterion, record=frozenset({"switches", "score_cosine"}))
    together = draw(sampler, requests(range(4)), batch_size=3)
    alone = {i: draw(sampler, requests([i]), batch_size=1)[i] for i in range(4)}
    assert together == alone


@cache
def in_order() -> dict[int, tuple]:
    return draw(diffusion(steps=12, criterion=Patience(3)), requests(range(6)), 6)


@settings(max_examples=12)
@given(order=st.permutations(range(6)), batch_size=st.integers(1, 8))
def test_order_and_batch_size_do_not_matter(order: list[int], batch_size: int) -> None:
    assert draw(diffusion(steps=12, criterion=Patience(3)), requests(order), batch_size) == in_order()


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=repr)
def test_a_halted_row_is_a_prefix_of_the_full_run(solver: Solver) -> None:
    def states(criterion: Criterion) -> dict[int, list[Tensor]]:
        seen: dict[int, list[Tensor]] = {}
        sampler = diffusion(steps=20, solver=solver, criterion=criterion, record=frozenset({"logits"}))
        for step in DiffusionLoop(Oracle(), *sampler, 4).steps(requests(range(6))):
            for row, logits in zip(step.state.row.tolist(), step.state.logits, strict=True):
                seen.setdefault(row, []).append(logits)
        return seen

    full, halted = states(Never()), states(Patience(3))
    assert any(len(halted[i]) < len(full[i]) for i in full)
    for i in full:
        assert all(torch.equal(a, b) for a, b in zip(halted[i], full[i], strict=False))


@settings(max_examples=10)
@given(strict=st.floats(0.001, 0.9), factor=st.floats(1, 5), patience=st.integers(1, 8), more=st.integers(0, 5))
def test_a_looser_threshold_never_halts_later(strict: float, factor: float, patience: int, more: int) -> None:
    pairs: list[tuple[Criterion, Criterion]] = [
        (NormConvergence(strict), NormConvergence(strict * factor)),
        (AngleConvergence(strict), AngleConvergence(strict * factor)),
        (Patience(patience + more), Patience(patience)),
        (For(NormConvergence(strict), patience + more), For(NormConvergence(strict), patience)),
    ]
    for tight, loose in pairs:
        late, early = (draw(diffusion(steps=15, criterion=rule), requests(range(3)), 3) for rule in (tight, loose))
        assert all(early[i][2] <= late[i][2] for i in late)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_calls_reported_are_calls_made(solver: Solver, guidance: float) -> None:
    oracle = Oracle()
    sampler = diffusion(steps=7, solver=solver, criterion=Patience(3), guidance=Guidance(scale=guidance))
    reported = 0
    for step in DiffusionLoop(oracle, *sampler, 2).steps(requests(range(5))):
        reported += int(step.state.nfe[step.done].sum())
    assert reported == oracle.calls


def test_euler_spends_one_call_a_step() -> None:
    assert all(sample[1] == 13 for sample in draw(diffusion(steps=13), requests(range(3)), 2).values())


def test_one_step_is_a_run() -> None:
    for solver in SOLVERS:
        assert all(sample[1] == 1 for sample in draw(diffusion(steps=1, solver=solver), requests(range(3)), 2).values())


def test_prompts_keep_their_tokens() -> None:
    for tokens, *_ in draw(diffusion(steps=5), requests(range(4), prompt=3), 2).values():
        assert tokens[:3] == (0, 1, 2)


def test_fixed_steps_and_patience_halt_where_they_say() -> None:
    fixed = draw(diffusion(steps=30, criterion=FixedSteps(4)), requests(range(3)), 2)
    assert all(sample[2] == 3 and sample[3] for sample in fixed.values())
    patient = draw(diffusion(steps=30, criterion=Patience(29)), requests(range(3)), 2)
    assert all(sample[2] == 29 for sample in patient.values())
    never = draw(diffusion(steps=30, criterion=Patience(30)), requests(range(3)), 2)
    assert all(sample[2] == 29 and not sample[3] for sample in never.values())


def test_switches_are_what_a_reader_of_the_tokens_counts() -> None:
    sampler = diffusion(steps=12, record=frozenset({"switches", "tokens"}))
    before: dict[int, Tensor] = {}
    for step in DiffusionLoop(Oracle(), *sampler, 3).steps(requests(range(5), prompt=2)):
        for row, tokens, count in zip(
            step.state.row.tolist(), step.state.tokens, step.state.switches.tolist(), strict=True
        ):
            expected = N - 2 if row not in before else int((tokens != before[row])[2:].sum())
            assert count == expected
            before[row] = tokens


def test_finished_rows_leave_and_waiting_ones_enter_at_once() -> None:
    sizes = [
        len(s.done)
        for s in DiffusionLoop(Oracle(), *diffusion(steps=20, criterion=Patience(2)), 3).steps(requests(range(9)))
    ]
    assert set(sizes[: len(sizes) // 2]) == {3}
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("grid", [Warped(), LogT(), UniformT()], ids=repr)
def test_samples_reproduce_the_token_frequencies(grid) -> None:
    oracle, count = Oracle(), Counter()
    for step in DiffusionLoop(oracle, *diffusion(steps=200, grid=grid), 600).steps(requests(range(600))):
        count.update(step.tokens.flatten().tolist())
    expected = oracle.frequencies.numpy() * 600 * N
    seen = np.array([count[i] for i in range(7)])
    assert ((seen - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


def test_the_loop_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    draw(diffusion(steps=4), requests(range(3)), 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_signals_must_be_asked_for() -> None:
    step = next(DiffusionLoop(Oracle(), *diffusion(steps=3), 1).steps(requests([0])))
    with pytest.raises(CdlmError, match="list it in the criterion's `needs`"):
        _ = step.state.switches


@pytest.mark.parametrize(
    "settings_", [{"steps": 0}, {"seed": -1}, {"record": frozenset({"speed"})}, {"init_scale": -1.0}], ids=str
)
def test_bad_settings_are_refused(settings_: dict) -> None:
    with pytest.raises(CdlmError):
        diffusion(**settings_)


def test_a_prompt_that_fills_the_row_is_refused() -> None:
    with pytest.raises(CdlmError, match="nothing to generate"):
        next(DiffusionLoop(Oracle(), *diffusion(steps=3), 1).steps(requests([0], prompt=N)))


@pytest.mark.parametrize("given", [0, 2])
def test_logits_that_are_not_numbers_are_refused_where_they_would_be_text(given: int) -> None:
    class Broken(Oracle):
        def denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Prediction:
            made = super().denoise(z, t, condition)
            made.logits[:, 1, 3] = torch.nan
            return made

    steps = DiffusionLoop(Broken(), *diffusion(steps=2), 1).steps(requests([0], prompt=given))
    if given:  # position 1 is given
        assert len(list(steps)) == 2
        return
    with pytest.raises(CdlmError, match="not numbers"):
        list(steps)
