"""What could be saved at most: known answers, the best of all ways to end, and the rows of a comparison."""

import itertools
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from evaluation_toys import random_judge
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compare import Valued
from test_masked_replay import recording as masked
from test_replay import STEPS, M, recorded
from toys import with_tokenizer

from cdlm.api import open_session
from cdlm.continuous.solvers import Euler
from cdlm.core.stats import Bootstrap
from cdlm.evaluation.bench import Bench
from cdlm.evaluation.compare import Comparison, Point, markdown, panels
from cdlm.evaluation.oracles import HINDSIGHT, LAST_CHANGE, losses_by_step, oracles
from cdlm.evaluation.texts import RealText
from cdlm.halting import Criterion, FixedSteps, sweep
from cdlm.halting.calibration import Goal
from cdlm.halting.oracles import hindsight, last_change
from cdlm.policies import LLaDA
from cdlm.recording.record import Record, Switches

LOSSES = np.array([[1.0, 1.0, 0.5], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
"""Of three samples of two tokens: one that comes back to its last text and leaves it again, two that settle."""
CALLS = np.arange(1, 6)[:, None] * np.array([1, 1, 3])


def test_the_last_change_is_the_step_that_makes_the_last_text() -> None:
    assert last_change(LOSSES).tolist() == [4, 3, 3]
    assert last_change(np.zeros((4, 2))).tolist() == [0, 0]
    assert (hindsight(LOSSES, CALLS, 0.0, 2) <= last_change(LOSSES)).all()


@pytest.mark.parametrize(
    ("wrong", "ends"),
    [
        (0, [2, 1, 3]),  # both texts that come back are taken when they are there first
        (1, [2, 1, 0]),  # the token that saves nine calls, and not the ones that save one
        (2, [1, 1, 0]),
        (6, [0, 0, 0]),
    ],
)
def test_hindsight_spends_tokens_where_they_save_most(wrong: int, ends: list[int]) -> None:
    assert hindsight(LOSSES, CALLS, wrong / 6, 2).tolist() == ends


def test_hindsight_is_better_than_greedy() -> None:
    """One token of the first sample saves the most for a token, and then the second sample's pair no longer fits."""
    losses = np.array([[1 / 3, 2 / 3], [0.0, 0.0]])
    calls = np.array([[1, 1], [6, 10]])
    assert hindsight(losses, calls, 2 / 6, 3).tolist() == [1, 0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Losses in units, calls, the units of a whole loss, and how many may be lost in all."""
    steps, m, grain = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cells = draw(st.lists(st.integers(0, grain), min_size=steps * m, max_size=steps * m))
    losses = np.array(cells).reshape(steps, m)
    losses[-1] = 0
    more = draw(st.lists(st.integers(1, 4), min_size=steps * m, max_size=steps * m))
    return losses, np.array(more).reshape(steps, m).cumsum(0), grain, draw(st.integers(0, m * grain))


@given(problem=problems())
@settings(max_examples=200)
def test_no_other_ends_within_the_limit_take_fewer_calls(problem: Any) -> None:
    losses, calls, grain, limit = problem
    steps, m = losses.shape
    ends = hindsight(losses / grain, calls, limit / (m * grain), grain)
    columns = np.arange(m)
    assert losses[ends, columns].sum() <= limit
    every = [np.array(way) for way in itertools.product(range(steps), repeat=m)]
    fewest = min(calls[way, columns].sum() for way in every if losses[way, columns].sum() <= limit)
    assert calls[ends, columns].sum() == fewest


@given(problem=problems(), coarser=st.integers(1, 4))
def test_a_coarser_grain_keeps_the_limit(problem: Any, coarser: int) -> None:
    losses, calls, grain, limit = problem
    ends = hindsight(losses / grain, calls, limit / (losses.shape[1] * grain), coarser)
    assert losses[ends, np.arange(losses.shape[1])].sum() <= limit


@pytest.mark.parametrize("kind", ["continuous", "masked"])
def test_a_walk_visits_the_tokens_of_each_step(kind: str) -> None:
    recording = recorded(Euler()) if kind == "continuous" else masked(LLaDA(steps=4), 0.7)
    record = recording.record
    assert (record.commits is not None) == (kind == "masked")
    walked = list(record.walk(recording.tokens))
    assert len(walked) == record.steps
    for step, tokens in enumerate(walked):
        assert np.array_equal(tokens, record.tokens_at(np.full(len(recording), step), recording.tokens))


# --- rows of a comparison ---


class Unread(Bench):
    """A bench without real text, one nat from whatever it would be."""

    @cached_property
    def gap(self) -> Bootstrap:
        return Bootstrap(1.0, np.ones(2000))

    @cached_property
    def splits(self) -> None:
        return None


class Unreal(Comparison):
    """A comparison without rows of real text."""

    def real(self) -> list[Point]:
        return []


def bench(n: int = 60, steps: int = 12) -> Bench:
    session = open_session(with_tokenizer(length=12), device="cpu", steps=steps)
    made = Bench.of(session, session.requests(n=n), random_judge(), RealText.__new__(RealText))
    scorer = Valued(random_judge(), session.model.need_tokenizer())
    return Unread(session, made.requests, made.full_run, made.recording, scorer, made.text)


def test_oracles_of_a_record_with_a_known_answer() -> None:
    """Two samples of two tokens: one is right from its second step on, one changes a token at the third of four."""
    made = bench(n=2, steps=4)
    switches = Switches(
        *map(np.array, ([0, 0, 0, 0, 1, 2], [0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0], [5, 5, 6, 6, 7, 8]))
    )
    nfe = np.tile(np.arange(1, 5, dtype=np.int32)[:, None], (1, 2))
    record = Record(np.ones((4, 2)), nfe, {}, switches)
    tokens = np.array([[5, 7], [8, 6]])
    no = np.zeros((2, 2), bool)
    assert made.recording is not None
    recording = replace(made.recording, record=record, tokens=tokens, given=no, valid=~no)
    full = replace(made.full_run, tokens=tokens, given=no, valid=~no, nfe=nfe.max(0))
    made = replace(made, recording=recording, full_run=full)
    assert losses_by_step(made).tolist() == [[0.5, 0.5], [0, 0.5], [0, 0], [0, 0]]

    def calls(goal: Goal, measure: str) -> dict[str, list[int]]:
        return {o.name: o.outcome.nfe.tolist() for o in oracles(made, goal, measure)}

    assert calls(Goal(0.05), "nats") == {LAST_CHANGE: [2, 3]}
    assert calls(Goal(0.05, agreement=0.99), "nats") == {LAST_CHANGE: [2, 3], HINDSIGHT: [2, 3]}
    assert calls(Goal(0.25), "agreement")[HINDSIGHT] == [2, 1]  # the token that saves two calls
    assert calls(Goal(0.5), "agreement")[HINDSIGHT] == [1, 1]
    assert calls(Goal(0.5), "texts")[HINDSIGHT] == [2, 1]
    halted = oracles(made, Goal(0.25), "agreement")[1].outcome
    assert halted.tokens.tolist() == [[5, 7], [6, 6]]


def test_no_rule_beats_hindsight_at_its_own_agreement() -> None:
    made = bench()
    for rule in [*sweep("FixedSteps", 12), *sweep("Patience", 12), *sweep("Entropy", 12)]:
        drawn = made.under(rule, 0)
        agreement = made.agreement(drawn)
        if 0 < agreement < 1:
            best = oracles(made, Goal(1 - agreement), "agreement")[1].outcome
            assert best.nfe.mean() <= drawn.nfe.mean()
            assert made.agreement(best) >= agreement - 1e-9


def test_oracles_are_rows_of_every_comparison_and_no_rules() -> None:
    made = bench(n=40)
    comparison = Unreal(made, Goal(0.5, agreement=0.9), "nats", "toy", live=0, fewer=(4,), with_rivals=False)
    points = comparison.table({"FixedSteps": [FixedSteps(11)]})
    known = {point.family: point for point in points}
    assert list(known)[1:3] == [LAST_CHANGE, HINDSIGHT]
    assert known[LAST_CHANGE].agreement == 1
    assert known[LAST_CHANGE].change == 0
    assert (known[HINDSIGHT].agreement or 0) >= 0.9
    text = markdown(points, comparison.goal, "nats")
    assert f"| {LAST_CHANGE} |" in text
    assert f"| {HINDSIGHT}: 0.9 of the tokens kept |" in text
    assert f"{HINDSIGHT} | saves no call" not in text
    (panel,) = panels(points)
    drawn = {curve.label: curve for curve in panel.curves}
    assert not drawn[LAST_CHANGE].rival
    assert len(drawn[LAST_CHANGE].calls) == 1
    assert list(drawn)[-2:] == [LAST_CHANGE, HINDSIGHT], "single points are drawn over the rest"


@pytest.mark.parametrize("other", [{}, {"FixedSteps(..., path='b')": [FixedSteps(7)]}])
def test_the_picture_names_a_family_as_shortly_as_it_can(other: dict[str, list[Criterion]]) -> None:
    comparison = Unreal(bench(n=40), Goal(0.5), "nats", "toy", live=0, fewer=(), with_rivals=False)
    (panel,) = panels(comparison.table({"FixedSteps(..., path='a')": [FixedSteps(11)], **other}))
    labels = [curve.label for curve in panel.curves if curve.label.startswith("FixedSteps")]
    assert labels == (["FixedSteps(..., path='a')", *other] if other else ["FixedSteps"])


def test_a_run_without_a_record_has_no_oracles() -> None:
    assert oracles(replace(bench(4, 4), recording=None), Goal(0.1), "nats") == []


def test_the_record_of_the_toys_says_something() -> None:
    assert 0 < losses_by_step(bench(4, 6)).mean() < 1
    assert (M, STEPS) == recorded(Euler()).record.nfe.shape[::-1]
