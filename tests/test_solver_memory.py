"""A solver with memory: the loop carries it row by row, and starts it anew with each block."""

from dataclasses import dataclass, field

import pytest
import torch
from oracle import SelfConditioned, draws, loop
from test_continuous_solvers import order, walk
from torch import Tensor

from cdlm.continuous.solvers import Advance, Before, Estimate, Interval, TorchDiffEq, TwoStep
from cdlm.halting import Criterion, FixedSteps, Never, Patience
from cdlm.sampling.requests import Request

N, ROWS, STEPS = 6, 7, 14


def requests(rows: range = range(ROWS), prompt: int = 1) -> list[Request]:
    return [Request(i, (torch.arange(N) + i) % 7, torch.arange(N) < prompt) for i in rows]


Sample = tuple[list[int], int, int, list[Tensor]]


def draw(asked: list[Request], batch_size: int, criterion: Criterion, block: int | None = None) -> dict[int, Sample]:
    """Tokens, calls, steps and states of each sample."""
    states: dict[int, list[Tensor]] = {}
    out: dict[int, Sample] = {}
    run = loop(
        SelfConditioned(), batch_size, steps=STEPS, solver=TwoStep(), criterion=criterion, block=block, record={"z"}
    )
    for step in run.steps(asked):
        rows = step.state.row.tolist()
        for row, z in zip(rows, step.state.z, strict=True):
            states.setdefault(row, []).append(z)
        for place, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens.tolist(), strict=True):
            row = rows[place]
            out[row] = (tokens, int(step.state.nfe[place]), len(states[row]), states[row])
    return out


def same(one: Sample, other: Sample) -> bool:
    return one[:3] == other[:3] and all(torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))


def test_two_steps_give_second_order_for_the_calls_of_the_first() -> None:
    reference = walk(TorchDiffEq("rk4", double=True), 400)
    assert order(TwoStep(), reference, (32, 64, 128)) == pytest.approx(2, abs=0.25)
    torch.testing.assert_close(walk(TwoStep(), 512), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("criterion", [Never(), Patience(3)], ids=repr)
def test_a_batch_equals_its_members_alone(criterion: Criterion, block: int | None) -> None:
    """Rows leave, enter beside others that are further on, and are asked for in another order."""
    together = draw(requests(), 3, criterion, block)
    backwards = draw(requests()[::-1], 4, criterion, block)
    alone = {i: draw(requests(range(i, i + 1)), 1, criterion, block)[i] for i in range(ROWS)}
    assert together.keys() == alone.keys()
    assert all(same(together[i], alone[i]) and same(backwards[i], alone[i]) for i in alone)
    assert criterion == Never() or len({sample[2] for sample in alone.values()}) > 1


def test_a_halted_row_is_a_prefix_of_the_full_run() -> None:
    full, halted = draw(requests(), 4, Never()), draw(requests(), 4, Patience(3))
    assert any(halted[i][2] < full[i][2] for i in full)
    for i in full:
        assert all(torch.equal(a, b) for a, b in zip(halted[i][3], full[i][3], strict=False))


@dataclass(frozen=True)
class Watched(TwoStep):
    """Notes for each row of each interval whether its memory was fresh."""

    notes: list[tuple[int, bool]] = field(default_factory=list)

    def advance(self, memory: Before, interval: Interval, estimate: Estimate) -> tuple[Before, Advance]:
        taken = interval.draws.step
        self.notes.extend(zip(taken, memory.t.isinf().tolist(), strict=True))
        return super().advance(memory, interval, estimate)


def test_each_block_starts_with_a_fresh_memory() -> None:
    solver = Watched()
    run = loop(SelfConditioned(), 2, steps=STEPS, solver=solver, criterion=FixedSteps(3), block=2)
    list(run.steps(requests(prompt=0)))
    assert len(solver.notes) == ROWS * 3 * 2  # of three steps of a block the third is read out
    assert all(fresh == (taken % 3 == 0) for taken, fresh in solver.notes)


def test_a_decided_position_is_where_its_token_is_and_not_beyond() -> None:
    """The state of a decided position follows its embedding exactly, also at the step of the decision."""
    z, e = torch.randn(2, 3, 4, dtype=torch.float64), torch.ones(2, 3, 4, dtype=torch.float64)
    t, then = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.8], dtype=torch.float64)
    memory = Before(torch.randn_like(z), torch.tensor([3.0, 1.5], dtype=torch.float64))
    fixed = torch.tensor([[True, False, False], [True, True, True]])
    solver = TwoStep()
    interval = Interval(z, e, t, then, draws(2))
    known = solver.decided(memory, fixed, e)
    _, moved = solver.advance(known, interval, lambda *_: (e, e))
    straight = e + (then / t)[:, None, None] * (z - e)
    torch.testing.assert_close(moved.z[fixed], straight[fixed])
    assert not torch.allclose(moved.z[~fixed], straight[~fixed])


def test_equal_levels_are_no_division_by_zero() -> None:
    z, e = torch.randn(2, 3, 4, dtype=torch.float64), torch.ones(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([2.0, 1.0], dtype=torch.float64)
    for then in (t, t / 2):
        _, moved = TwoStep().advance(Before(0 * e, t), Interval(z, e, t, then, draws(2)), lambda *_: (e, e))
        torch.testing.assert_close(moved.z, e + (then / t)[:, None, None] * (z - e))
