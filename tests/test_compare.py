"""The signs of a comparison: which way of spending calls is the better one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation_toys import random_judge
from jaxtyping import Bool, Int
from toys import with_tokenizer

from cdlm.api import open_session
from cdlm.core.stats import Scores
from cdlm.data.store import PackedRows
from cdlm.evaluation.bench import Bench, FullRun, Outcome, Scorer
from cdlm.evaluation.compare import PLAIN, Comparison, Plain, Point, markdown
from cdlm.halting import Patience
from cdlm.halting.calibration import Goal

M, N = 400, 12


class Valued(Scorer):
    """Nats per token that are the tokens themselves: a row of 3s scores 3."""

    def __call__(
        self, tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
    ) -> Scores:
        return Scores(tokens.sum(1).astype(np.float64), np.full(len(tokens), float(tokens.shape[1])))


def outcome(nats: int, calls: int, m: int = M, other: int | None = None) -> Outcome:
    """Samples of that score and cost; half of the rows of another score, if one is given."""
    tokens = np.full((m, N), nats)
    tokens[::2] = nats if other is None else other
    return Outcome(tokens, np.full(m, calls))


def comparison(goal: Goal | None = None, m: int = M) -> Comparison:
    """A full run of 20 calls that scores 2, and a plain sampler of 10 calls that scores 4."""
    session = open_session(with_tokenizer(length=N), device="cpu")
    no = np.zeros((m, N), bool)
    full = outcome(2, 20, m)
    run = FullRun(full.tokens, no, ~no, full.nfe, 20)
    scorer = Valued(random_judge(), session.model.need_tokenizer())
    bench = Bench(session, session.requests(n=m), run, None, scorer, PackedRows.__new__(PackedRows))

    class Known(Comparison):
        @property
        def plain(self) -> Plain:  # pyright: ignore[reportIncompatibleVariableOverride]
            drawn = [outcome(4, 10, m), full]
            return Plain([10, 20], drawn, [bench.score(d.tokens) for d in drawn])

    return Known(bench, goal or Goal(0.01), "toy")


def point(nats: int, calls: int, other: int | None = None) -> Point:
    return comparison().point("Patience", "Patience(3)", outcome(nats, calls, other=other))


def test_a_rule_that_scores_lower_at_equal_calls_is_better_and_the_gap_is_negative() -> None:
    found = point(2, 15)  # where the plain sampler scores 3
    assert found.against_plain == pytest.approx(-1)
    assert found.verdict == "better"
    assert "better: -1.000" in markdown([replace(found, chosen=True)], Goal(0.01))


def test_a_rule_that_scores_higher_at_equal_calls_is_worse_and_the_gap_is_positive() -> None:
    found = point(5, 15)
    assert found.against_plain == pytest.approx(2)
    assert found.verdict == "worse"


def test_a_rule_that_scores_the_same_within_the_noise_is_neither() -> None:
    found = point(2, 15, other=4)  # 3 in the mean
    assert found.against_plain == pytest.approx(0)
    assert found.against_low is not None
    assert found.against_high is not None
    assert found.against_low < 0 < found.against_high
    assert found.verdict == "unclear"


def test_losses_and_savings_have_their_signs() -> None:
    found = point(3, 5)
    assert found.loss == pytest.approx(0.5)  # three nats in place of two
    assert found.saved == pytest.approx(0.75)
    assert found.step_speedup == pytest.approx(4)
    assert found.against_plain is None  # fewer calls than any that the plain sampler was drawn with


def test_too_few_samples_give_a_row_without_a_bound_that_is_marked() -> None:
    goal, few = Goal(0.01), 20
    made = comparison(goal, few)
    assert few < goal.fewest
    found = made.point("Patience", "Patience(3)", outcome(2, 15, few))
    assert not found.bounded
    assert made.choice([found]) == 0
    assert made.choice([made.point("Patience", "Patience(1)", outcome(3, 15, few))]) is None
    text = markdown([replace(found, chosen=True), replace(found, family=PLAIN)], goal)
    assert "Patience(3) †" in text
    assert f"† Fewer than {goal.fewest} samples" in text


def test_enough_samples_are_chosen_by_the_bound_and_not_marked() -> None:
    made = comparison()
    found = made.point(repr(Patience(3)), "Patience(3)", outcome(2, 15))
    assert found.bounded
    assert made.choice([found]) == 0
    assert "†" not in markdown([replace(found, chosen=True)], Goal(0.01))
