"""Steps of each row's own: short where the estimate moves, long where it does not."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from setups import Setup, diffusion
from torch import Tensor
from toys import with_tokenizer

from cdlm.api import open_session
from cdlm.continuous.grids import GRIDS, Adaptive, Grid, LogT, Truncated
from cdlm.continuous.sampler import Diffusion, DiffusionLoop
from cdlm.continuous.schedules import Schedule
from cdlm.continuous.solvers import Ancestral, Euler, Heun, Solver, TorchDiffEq, TwoStep
from cdlm.core.errors import CdlmError
from cdlm.halting import Criterion, Entropy, FixedSteps, Never, Patience
from cdlm.policies.confidence import Threshold
from cdlm.recording.file import Recording
from cdlm.sampling.recordings import recording_of, replayed
from cdlm.sampling.requests import Request

N, V, MOST = 6, 7, 400
SOLVERS: tuple[Solver, ...] = (Euler(), TwoStep(), Heun(), Ancestral())


@dataclass(frozen=True)
class Equal(Grid):
    """Steps of one length in ln t."""

    length: float

    def levels(self, schedule: Schedule, steps: int) -> Tensor:
        return schedule.t_max * torch.exp(-self.length * torch.arange(steps, dtype=torch.float64))


def requests(indices, prompt: int = 0) -> list[Request]:
    return [Request(int(i), torch.arange(N) % V, torch.arange(N) < prompt) for i in indices]


def steps_of(setup: Setup, asked: list[Request], batch_size: int = 4) -> dict[int, list[tuple[float, Tensor, int]]]:
    """Levels, states and calls of each row, step by step."""
    found: dict[int, list[tuple[float, Tensor, int]]] = {}
    for step in DiffusionLoop(Oracle(), *setup.but(record={"z"}), batch_size).steps(asked):
        state = step.state
        for row, t, z, nfe in zip(state.row.tolist(), state.t.tolist(), state.z, state.nfe.tolist(), strict=True):
            found.setdefault(row, []).append((t, z, nfe))
    return found


def setup(grid: Grid, steps: int = MOST, **settings: Any) -> Setup:
    return diffusion(**{"steps": steps, "grid": grid, "criterion": Never(), **settings})


# --- the controller ---


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_of_no_tolerance_all_steps_are_the_least(solver: Solver) -> None:
    adaptive = Adaptive(1e-9, end=0.5, first=0.05, smallest=0.05)
    own, fixed = (steps_of(setup(g, solver=solver), requests(range(3))) for g in (adaptive, Equal(0.05)))
    for row, path in own.items():
        for (t, z, _), (level, state, _) in zip(path[:-1], fixed[row], strict=False):
            assert t == pytest.approx(level, rel=1e-9)
            torch.testing.assert_close(z, state)


def test_a_smaller_tolerance_comes_nearer_to_a_fine_grid_and_costs_more() -> None:
    asked = requests(range(8))
    fine = steps_of(setup(LogT(), 2000), asked)
    errors, calls = [], []
    for tolerance in (0.2, 0.05, 0.0125):
        path = steps_of(setup(Adaptive(tolerance, first=0.02, smallest=0.002)), asked)
        errors.append(np.mean([float((path[i][-1][1] - fine[i][-1][1]).norm()) for i in fine]))
        calls.append(np.mean([p[-1][2] for p in path.values()]))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_rows_know_nothing_of_one_another(solver: Solver) -> None:
    run = setup(Adaptive(0.1), solver=solver)
    alone = {i: steps_of(run, requests([i]), 1)[i] for i in range(5)}
    for order, size in (([0, 1, 2, 3, 4], 5), ([3, 1, 4, 0, 2], 2)):
        for row, path in steps_of(run, requests(order), size).items():
            assert [(t, calls) for t, _, calls in path] == [(t, calls) for t, _, calls in alone[row]]
            assert all(torch.equal(a[1], b[1]) for a, b in zip(path, alone[row], strict=True))


def test_steps_stay_within_their_limits() -> None:
    grid = Adaptive(0.05, first=0.3, smallest=0.1, largest=0.4, shrink=0.5, grow=1.5)
    taken = set()
    for path in steps_of(setup(grid), requests(range(6))).values():
        lengths = [math.log(a / b) for (a, *_), (b, *_) in itertools.pairwise(path)]
        assert lengths[0] == pytest.approx(0.3)
        for before, after in itertools.pairwise(lengths[:-1]):  # the last goes to the end
            assert 0.1 - 1e-9 <= after <= 0.4 + 1e-9
            assert min(0.5 * before, 0.1) - 1e-9 <= after <= max(1.5 * before, 0.1) + 1e-9
        taken.add(len(lengths))
    assert len(taken) > 1  # rows differ


def test_the_budget_and_the_end_are_kept() -> None:
    oracle = Oracle()
    for path in steps_of(setup(Adaptive(1e-6), steps=7), requests(range(3))).values():
        assert len(path) == 7
    for path in steps_of(setup(Adaptive(0.1, end=0.5)), requests(range(3))).values():
        assert path[-1][0] == 0.5 * oracle.rho
        assert all(t > 0.5 * oracle.rho for t, *_ in path[:-1])
    for path in steps_of(setup(Adaptive(0.1)), requests(range(3))).values():
        assert path[0][0] == oracle.schedule.t_max
        assert path[-1][0] == oracle.schedule.t_min


def test_every_block_begins_anew() -> None:
    path = steps_of(setup(Adaptive(0.2), block=3), requests([1]))[1]
    top = Oracle().schedule.t_max
    assert [t for t, *_ in path].count(top) == 2


# --- with everything else ---


@pytest.mark.parametrize("rule", [Never(), Patience(2), FixedSteps(5), Entropy(0.5)], ids=repr)
@pytest.mark.parametrize("commit", [None, Threshold(0.5)], ids=repr)
def test_rules_are_replayed_on_rows_of_their_own_levels(
    rule: Criterion, commit: Threshold | None, tmp_path: Path
) -> None:
    session = open_session(with_tokenizer(), steps=40, grid=Adaptive(0.05), commit=commit)
    asked = session.requests(["the", "the cat sat on"], 3)
    full = session.recorded().run(asked)
    assert full.record is not None
    recording_of(full, session).write(tmp_path / "run.safetensors")
    recording = Recording.read(tmp_path / "run.safetensors")
    assert np.array_equal(recording.record.t, full.record.t, equal_nan=True)
    made = replayed(recording, rule, session.model.need_tokenizer())
    live = session.with_criterion(rule).run(asked)
    assert np.array_equal(made.tokens, live.tokens)
    assert np.array_equal(made.nfe, live.nfe)
    assert made.reason == live.reason
    if rule == Never() and commit is None:
        left = np.isnan(full.record.t).any(1)
        assert (np.nanstd(full.record.t[~left], 1)[1:] > 0).any()  # rows stand at different levels


def test_the_plain_rivals_of_adaptive_steps_take_all_their_steps() -> None:
    rivals = Diffusion(grid=Adaptive()).rivals()
    assert len(rivals) == 2
    assert all(not isinstance(way.grid, Adaptive) for ways in rivals.values() for way in ways)


def test_settings_that_make_no_sense_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"tolerance": 0.0}, {"tolerance": -1.0}, {"tolerance": math.nan}, {"end": 0.0},
        {"smallest": 0.5, "largest": 0.4},
        {"shrink": 1.0}, {"grow": 1.0}, {"first": 0.0},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(CdlmError, match="Adaptive needs"):
            Adaptive(**settings)
    with pytest.raises(CdlmError, match="end of its own"):
        Truncated(Adaptive(), 0.5)
    with pytest.raises(CdlmError, match="no levels that all rows share"):
        Adaptive().levels(Oracle().schedule, 5)
    assert GRIDS.parse("Adaptive(0.03, end=0.3)") == Adaptive(0.03, end=0.3)


@pytest.mark.parametrize("solver", [Euler(), TwoStep(), Heun(), TorchDiffEq("heun2")], ids=repr)
def test_a_step_changes_the_estimate_by_about_the_tolerance(solver: Solver) -> None:
    """Whatever further calls a solver makes: the changes are those between the estimates at two levels."""
    states: dict[int, list[Tensor]] = {}
    run = setup(Adaptive(0.02, largest=5.0), 400, solver=solver).but(record={"x0"})
    for step in DiffusionLoop(Oracle(), *run, 4).steps(requests(range(8))):
        for row, x0 in zip(step.state.row.tolist(), step.state.signals["x0"], strict=True):
            states.setdefault(row, []).append(x0)
    moves = [after - before for path in states.values() for before, after in itertools.pairwise(path)]
    changes = torch.stack(moves).square().sum(-1).mean(1).sqrt() / Oracle().rho
    assert float(changes.mean()) == pytest.approx(0.02, abs=0.008)
