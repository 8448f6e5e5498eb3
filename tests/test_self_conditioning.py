"""What the sampling loop shows a denoiser as its own previous estimate: the plain prediction, never what steers."""

import pytest
import torch
from oracle import SelfConditioned, loop
from torch import Tensor

from cdlm.continuous.guidance import Control, Guidance, Term
from cdlm.continuous.projections import Greedy
from cdlm.continuous.solvers import Ancestral, Euler, Heun, Renoise, Solver, TorchDiffEq
from cdlm.core.types import Decision, StepState
from cdlm.halting import Stateless
from cdlm.sampling.requests import Request

N, ROWS, STEPS = 4, 2, 4
SOLVERS = (
    Euler(), Heun(), Ancestral(), Renoise(), TorchDiffEq("midpoint", double=True), TorchDiffEq("rk4", double=True),
    TorchDiffEq("dopri5", 0.05, 0.05, double=True),
)  # fmt: skip
STEERED = (
    Guidance(),
    Guidance(scale=2.5),
    Guidance(scale=0.0),
    Guidance(score_temperature=0.7),
    Guidance(softmax_temperature=0.5),
    Guidance(projection=Greedy()),
    Guidance(control=Control((Term(3),))),
    Guidance(scale=1.5, softmax_temperature=0.8, score_temperature=0.9, projection=Greedy()),
)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


def requests(prompt: int = 2) -> list[Request]:
    return [Request(i, (torch.arange(N) + i) % 7, torch.arange(N) < prompt) for i in range(ROWS)]


def is_of(shown: Tensor, estimate: Tensor) -> bool:
    """Whether a call was shown this estimate, or that of some of its rows."""
    if len(shown) == len(estimate):
        return torch.equal(shown, estimate)
    return any(torch.equal(shown, row[None]) for row in estimate)


@every_solver
@pytest.mark.parametrize("guidance", STEERED, ids=repr)
def test_the_estimate_shown_is_the_plain_prediction_before(solver: Solver, guidance: Guidance) -> None:
    """Of the step before, or of a solver's own later call; a call within an interval is shown that of its start."""
    oracle, newest, inner = SelfConditioned(), torch.zeros(ROWS, N, 5, dtype=torch.float64), []
    for step in loop(oracle, ROWS, steps=STEPS, solver=solver, guidance=guidance).steps(requests()):
        first = oracle.seen[-guidance.calls :]
        inner = oracle.seen[: -guidance.calls]
        assert [call.prompted for call in first] == [True, False][: guidance.calls]
        if solver == Heun() and inner:
            newest = inner[0].x0
        assert all(torch.equal(call.shown, newest) for call in first)
        newest = first[0].x0
        oracle.seen.clear()
        assert len(step.done) == ROWS
    assert not inner or isinstance(solver, Heun | TorchDiffEq)


@every_solver
@pytest.mark.parametrize("guidance", STEERED[:4], ids=repr)
def test_calls_within_an_interval_are_shown_the_prediction_at_its_start(solver: Solver, guidance: Guidance) -> None:
    oracle, start = SelfConditioned(), None
    for _ in loop(oracle, ROWS, steps=STEPS, solver=solver, guidance=guidance).steps(requests()):
        if start is not None:
            assert all(is_of(call.shown, start) for call in oracle.seen[: -guidance.calls])
        start = oracle.seen[-guidance.calls].x0
        oracle.seen.clear()


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=repr)
def test_each_block_begins_without_an_estimate(solver: Solver) -> None:
    oracle, steps = SelfConditioned(), []
    for step in loop(oracle, ROWS, steps=4, solver=solver, block=2, guidance=Guidance(scale=2.0)).steps(requests(1)):
        steps.append((int(step.state.step[0]), bool(oracle.seen[-1].shown.any())))
    assert steps == [(i, i > 0) for i in (0, 1, 2, 3, 0, 1, 2, 3)]


class FreezeFirst(Stateless):
    """Freezes the first open position at the second step."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens"})

    @property
    def freezes(self) -> bool:
        return True

    def decide(self, state: StepState) -> Decision:
        never = torch.zeros(len(state.row), dtype=torch.bool)
        place = state.open.long().argmax(1)
        first = torch.arange(state.open.shape[1]) == place[:, None]
        return Decision(never, first & (state.step == 1)[:, None])


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=repr)
def test_a_frozen_position_is_shown_as_its_token(solver: Solver) -> None:
    oracle, tokens = SelfConditioned(), []
    run = loop(oracle, ROWS, steps=8, solver=solver, criterion=FreezeFirst(), record={"tokens"})
    for step in run.steps(requests(2)):
        tokens.append(step.state.tokens)
        if len(tokens) > 2:
            assert torch.equal(oracle.seen[-1].shown[:, 2], oracle.table[tokens[1][:, 2]])
        if len(tokens) == 3:  # the prediction itself is not that sure
            assert not torch.equal(oracle.seen[-2].x0[:, 2], oracle.table[tokens[1][:, 2]])


class Blind(SelfConditioned):
    """Takes given tokens for noisy ones."""

    sees_given = False


def test_a_network_that_cannot_tell_given_tokens_is_shown_them_as_they_are() -> None:
    oracle = Blind()
    list(loop(oracle, ROWS, steps=STEPS, guidance=Guidance(score_temperature=0.7)).steps(requests(2)))
    given = torch.stack([request.tokens for request in requests()])[:, :2]
    assert all(torch.equal(call.shown[:, :2], oracle.table[given]) for call in oracle.seen[1:])
