"""Several predictions at a level, each shown the one before, and the rule that reads how far they are from agreeing."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import Oracle, SelfConditioned, loop
from torch import Tensor
from toys import with_tokenizer

import cdlm
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.solvers import Ancestral, Churn, Euler, Heun, Solver, TorchDiffEq, TwoStep
from cdlm.core.errors import CdlmError
from cdlm.halting import Criterion, FixedPoint, Never
from cdlm.policies.confidence import Threshold
from cdlm.sampling.requests import Request

N, ROWS, STEPS = 4, 3, 5
SOLVERS = (Euler(), Heun(), TwoStep(), Ancestral(), Churn(0.5, "exact"), TorchDiffEq("midpoint", double=True))
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


class Told(SelfConditioned):
    """Says that it was trained with self-conditioning."""

    self_conditioning = 0.5


def requests(rows: int = ROWS, prompt: int = 1) -> list[Request]:
    return [Request(i, (torch.arange(N) + i) % 7, torch.arange(N) < prompt) for i in range(rows)]


def outcomes(oracle: Oracle, batch_size: int = ROWS, **settings: Any) -> dict[int, tuple]:
    """Of each sample: tokens, calls, and what every step of it said."""
    said: dict[int, list[tuple[float, float]]] = {}
    out: dict[int, tuple] = {}
    run = loop(oracle, batch_size, **{"steps": STEPS, "record": {"residual"}, **settings})
    for step in run.steps(requests()):
        rows = step.state.row.tolist()
        for row, t, residual in zip(rows, step.state.t.tolist(), step.state.residual.tolist(), strict=True):
            said.setdefault(row, []).append((t, residual))
        for place, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens.tolist(), strict=True):
            out[rows[place]] = (tokens, int(step.state.nfe[place]))
    return {row: (*out[row], said[row]) for row in out}


def test_each_pass_is_shown_the_estimate_of_the_one_before() -> None:
    oracle, newest = Told(), torch.zeros(ROWS, N, 5, dtype=torch.float64)
    for _ in loop(oracle, ROWS, steps=STEPS, passes=3).steps(requests()):
        assert len(oracle.seen) == 3
        assert torch.equal(oracle.seen[0].shown, newest)
        assert all(torch.equal(after.shown, before.x0) for before, after in pairwise(oracle.seen))
        newest = oracle.seen[-1].x0
        oracle.seen.clear()


def test_only_the_last_pass_is_guided() -> None:
    oracle = Told()
    for _ in loop(oracle, ROWS, steps=STEPS, passes=3, guidance=Guidance(scale=2.0)).steps(requests()):
        assert [call.prompted for call in oracle.seen] == [True, True, True, False]
        assert torch.equal(oracle.seen[3].shown, oracle.seen[2].shown)
        oracle.seen.clear()


@every_solver
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_calls_reported_are_calls_made(solver: Solver, scale: float) -> None:
    oracle = Told()
    found = outcomes(oracle, 2, solver=solver, passes=2, guidance=Guidance(scale=scale))
    assert sum(nfe for _, nfe, _ in found.values()) == oracle.calls
    once = outcomes(Told(), 2, solver=solver, guidance=Guidance(scale=scale))
    each = {1.0: 2, 2.0: 1.5}[scale]
    assert {row: nfe for row, (_, nfe, _) in found.items()} == {row: each * nfe for row, (_, nfe, _) in once.items()}


@every_solver
@pytest.mark.parametrize("settings", [{}, {"block": 2}, {"commit": Threshold(0.9)}], ids=str)
def test_rows_alone_equal_the_batch(solver: Solver, settings: dict[str, Any]) -> None:
    settings = {"solver": solver, "passes": 2, "criterion": FixedPoint(1e-3), **settings}
    assert outcomes(Told(), 1, **settings) == outcomes(Told(), 3, **settings)


def test_a_committed_position_is_shown_as_its_token_in_each_pass() -> None:
    oracle, held = Told(), 0
    for step in loop(oracle, ROWS, steps=9, passes=2, commit=Threshold(0.6), record={"tokens"}).steps(requests()):
        decided = ~step.state.open & (torch.arange(N) >= 1)
        for call in oracle.seen:
            held += int(decided.sum())
            assert torch.equal(call.shown[decided], oracle.table[step.state.tokens[decided]])
        oracle.seen.clear()
    assert held


def test_many_passes_come_to_a_fixed_point() -> None:
    """There the estimate that is shown is the estimate that is made, and a further pass changes nothing."""
    few, many = (outcomes(Told(), passes=passes) for passes in (1, 60))
    for row in range(ROWS):
        assert max(residual for _, residual in many[row][2]) < 1e-12
        assert few[row][2][1][1] > 1e-6


# --- the residual ---


@pytest.mark.parametrize("passes", [1, 3])
def test_the_residual_is_the_distance_from_what_was_shown(passes: int) -> None:
    oracle, first = Told(), True
    for step in loop(oracle, ROWS, steps=STEPS, passes=passes, record={"residual", "x0"}).steps(requests()):
        made, shown = oracle.seen[-1].x0, oracle.seen[-1].shown
        expected = ((made - shown).square().sum(-1) / oracle.rho**2)[:, 1:].mean(1).float()
        if first and passes == 1:
            expected = torch.full((ROWS,), torch.inf)
        torch.testing.assert_close(step.state.residual, expected, rtol=1e-5, atol=0)
        first = False
        oracle.seen.clear()


def test_without_self_conditioning_it_is_the_change_since_the_step_before() -> None:
    x0: list[Tensor] = []
    oracle = Oracle()
    for step in loop(oracle, ROWS, steps=STEPS, record={"residual", "x0"}).steps(requests(prompt=0)):
        if x0:
            moved = (step.state.x0 - x0[-1]).square().sum(-1).mean(1) / oracle.rho**2
            torch.testing.assert_close(step.state.residual, moved.float(), rtol=1e-5, atol=0)
        else:
            assert bool(step.state.residual.isinf().all())
        x0.append(step.state.x0)


@pytest.mark.parametrize(("passes", "steps", "first"), [(1, 1, 2), (1, 3, 4), (2, 1, 1), (2, 3, 3)])
def test_the_earliest_halt(passes: int, steps: int, first: int) -> None:
    found = outcomes(Told(), passes=passes, criterion=FixedPoint(1e30, steps))
    assert {nfe for _, nfe, _ in found.values()} == {first * passes}


def test_each_block_begins_without_a_residual() -> None:
    said = outcomes(Told(), block=2, steps=3)[0][2]
    assert [math.isinf(residual) for _, residual in said] == [True, False, False] * 2


def test_it_halts_when_the_residual_stayed_low_for_so_many_steps() -> None:
    full = outcomes(Told(), criterion=Never(), steps=12)
    delta = sorted(r for _, _, said in full.values() for _, r in said)[18]
    rule: Criterion = FixedPoint(delta, 2)
    for row, (_, nfe, _) in outcomes(Told(), criterion=rule, steps=12).items():
        below = [residual < delta for _, residual in full[row][2]]
        expected = next((i + 1 for i in range(1, 12) if below[i] and below[i - 1]), 12)
        assert nfe == expected


def test_a_relative_one_halts_when_the_residual_has_fallen_from_its_largest() -> None:
    full = outcomes(Told(), criterion=Never(), steps=12)
    for delta in (0.9, 0.5, 0.2):
        for row, (_, nfe, _) in outcomes(Told(), criterion=FixedPoint(delta, relative=True), steps=12).items():
            said = [residual for _, residual in full[row][2]]
            expected = next((i + 1 for i in range(2, 12) if said[i] < delta * max(said[1 : i + 1])), 12)
            assert nfe == expected
    first = outcomes(Told(), passes=2, criterion=FixedPoint(0.999, relative=True))
    assert all(nfe > 2 for _, nfe, _ in first.values())  # the first residual is its own largest
    with pytest.raises(CdlmError, match="delta < 1"):
        FixedPoint(1.0, relative=True)


# --- settings, and what is refused ---


def test_passes_of_a_model_without_self_conditioning_are_refused() -> None:
    with pytest.raises(CdlmError, match="leave out passes"):
        loop(Oracle(), passes=2)
    with pytest.raises(CdlmError, match="leave out passes"):
        cdlm.generate(with_tokenizer(self_conditioning=0.0), n=1, steps=2, passes=2)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_passes_that_are_no_count_are_refused(value: Any) -> None:
    with pytest.raises(CdlmError, match="passes"):
        Diffusion(passes=value)


def test_one_pass_is_the_sampler_without_them_and_says_nothing() -> None:
    assert "passes" not in Diffusion().settings
    assert Diffusion().with_flat(passes=3).settings["passes"] == 3
    assert all(way.passes == 1 for ways in Diffusion(passes=4).rivals().values() for way in ways)
    model = with_tokenizer()
    samples = cdlm.generate(model, n=2, steps=4, passes=2)
    assert samples.nfe.tolist() == [8, 8]
    assert samples.texts != cdlm.generate(model, n=2, steps=4).texts


def test_the_rule_runs_on_a_system_and_recordings_keep_the_residual() -> None:
    model = with_tokenizer()
    assert {*cdlm.generate(model, n=3, steps=6, halt="FixedPoint(1e9, 2)").nfe.tolist()} == {3}
    record = cdlm.generate(model, n=2, steps=4, passes=2, record=True).record
    assert record is not None
    assert bool((record.signals["residual"] >= 0).all())
