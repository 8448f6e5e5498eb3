"""The signs of a comparison: what a rule changes, which half chooses, and which way of spending calls is better."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_toys import random_judge
from jaxtyping import Bool, Int
from toys import with_tokenizer

from cdlm.api import open_session
from cdlm.core.errors import CdlmError
from cdlm.core.stats import Bootstrap, Scores
from cdlm.evaluation.bench import Bench, FullRun, Outcome, Scorer, fewest
from cdlm.evaluation.compare import FULL, PLAIN, Comparison, Point, areas, markdown, save_json, terminal, write_csv
from cdlm.evaluation.metrics.aup import aup
from cdlm.evaluation.metrics.diversity import sample_entropy
from cdlm.evaluation.oracles import ORACLES
from cdlm.evaluation.rivals import Duel, Rivals, verdict
from cdlm.evaluation.texts import RealText
from cdlm.halting import Criterion, FixedSteps, Patience
from cdlm.halting.calibration import Goal
from cdlm.halting.losses import Change
from cdlm.sampling.session import Session

M, N = 400, 12
GOAL = Goal(0.05)


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


@dataclass(frozen=True)
class Toy(Bench):
    """A full run of 20 calls that scores 2, where real text scores 1.

    Args:
        rules: what rules make of it.
        gap_noise: half the width of the gap's interval.
        sign: of the gap.
    """

    rules: Any = None
    gap_noise: float = 0.1
    sign: int = 1

    @cached_property
    def gap(self) -> Bootstrap:
        return Bootstrap(self.sign * 1.0, self.sign * np.linspace(1 - self.gap_noise, 1 + self.gap_noise, 2000))

    @cached_property
    def splits(self) -> None:
        return None

    def under(self, criterion: Criterion, live: int) -> Outcome:
        return self.rules[repr(criterion)]

    def part(self, rows: slice) -> Bench:
        found = super().part(rows)
        second = rows.start is not None
        return replace(
            found, rules={k: v[second] if isinstance(v, tuple) else v for k, v in (self.rules or {}).items()}
        )


def bench(rules: Mapping[str, object] | None = None, m: int = M, gap_noise: float = 0.1) -> Toy:
    """Two halves of m samples."""
    session = open_session(with_tokenizer(length=N), device="cpu")
    no = np.zeros((2 * m, N), bool)
    full = outcome(2, 20, 2 * m)
    run = FullRun(full.tokens, no, ~no, full.nfe, 20)
    scorer = Valued(random_judge(), session.model.need_tokenizer())
    return Toy(session, session.requests(n=2 * m), run, None, scorer, RealText.__new__(RealText), rules, gap_noise)


def comparison(goal: Goal = GOAL, m: int = M, measure: str = "nats", **more: Any) -> Comparison:
    return Comparison(bench(m=m, **more), goal, measure, "toy", live=m, with_rivals=False)


def point(nats: int, calls: int, other: int | None = None) -> Point:
    return comparison().point("Patience", "Patience(3)", outcome(nats, calls, other=other))


# --- a point ----------------------------------------------------------------------------------------------------------


def test_changes_and_savings_have_their_signs() -> None:
    found = point(3, 5)
    assert found.change == found.change_low == pytest.approx(1)  # three nats in place of two
    assert found.loss == pytest.approx(0.5)
    assert found.gap_share == pytest.approx(1)  # as far again as real text is away
    assert found.saved == pytest.approx(0.75)
    assert found.step_speedup == pytest.approx(4)
    assert found.agreement == 0
    assert point(1, 5).gap_share == pytest.approx(-1)
    assert point(2, 5, other=3).agreement == pytest.approx(0.5)


def test_a_gap_within_noise_gives_no_share_and_no_choice_by_it() -> None:
    made = comparison(measure="gap", gap_noise=1.5)
    assert replace(made, measure="nats").point("Patience", "Patience(3)", outcome(3, 5)).gap_share is None
    with pytest.raises(CdlmError, match="no share of a gap that is within noise") as caught:
        made.table({})
    assert "\n" not in str(caught.value)


def test_where_samples_are_easier_than_real_text_to_become_easier_still_is_further_away() -> None:
    made = comparison(measure="gap")
    easier = replace(made.bench, sign=-1)  # type: ignore[arg-type]
    for nats, share in ((1, 1.0), (3, -1.0)):
        found = replace(made, bench=easier).point("Patience", "Patience(3)", outcome(nats, 5))
        assert found.gap_share == pytest.approx(share)
        assert easier.loss(outcome(nats, 5, 2 * M), "gap", two_sided=False).value == pytest.approx(share)


def test_empty_samples_have_no_score_and_are_not_chosen() -> None:
    nothing = np.zeros((M, N))
    scores = Scores(nothing[:, 0], nothing[:, 0])
    assert np.isnan(scores.bootstrap().value)
    assert not np.isfinite(Change(scores.bootstrap(), two_sided=True, samples=M).at_most(0.95))


# --- the choice -------------------------------------------------------------------------------------------------------

LOOSE, STRICT = Patience(2), Patience(9)


def chosen(first: Outcome, second: Outcome, goal: Goal = GOAL, measure: str = "nats") -> int | None:
    """Which of two settings is chosen: the strict one changes nothing, the loose one makes these halves."""
    rules = {repr(STRICT): outcome(2, 18), repr(LOOSE): (first, second)}
    made = Comparison(bench(rules), goal, measure, "toy", live=M, with_rivals=False)
    return made.choice([STRICT, LOOSE])


def test_one_half_chooses_and_the_other_reports() -> None:
    assert chosen(outcome(2, 5), outcome(9, 5)) == 1
    assert chosen(outcome(9, 5), outcome(2, 5)) == 0


def test_a_gain_is_no_saving_unless_the_limit_is_of_losses() -> None:
    better = outcome(1, 5)
    assert chosen(better, better) == 0
    assert chosen(better, better, Goal(0.05, two_sided=False)) == 1


def test_tokens_that_differ_are_limited_too() -> None:
    """Half of the rows score one more and half one less: the same AR-NLL, other texts."""
    same_score = outcome(1, 5, other=3)
    assert chosen(same_score, same_score, Goal(0.3)) == 1
    assert chosen(same_score, same_score, Goal(0.3, agreement=0.99)) == 0


def test_too_few_samples_are_chosen_by_the_mean_and_marked() -> None:
    few = 20
    rules = {repr(STRICT): outcome(2, 18, few), repr(LOOSE): outcome(3, 5, few)}
    made = Comparison(bench(rules, few), GOAL, "nats", "toy", live=few, with_rivals=False)
    assert few < fewest(GOAL, "nats")
    assert made.choice([STRICT]) == 0
    assert made.choice([STRICT, LOOSE]) == 0
    found = made.point("Patience", "Patience(9)", outcome(2, 18, few))
    assert not found.bounded
    text = markdown([replace(found, chosen=True), replace(found, family=PLAIN)], GOAL, "nats")
    assert "Patience(9) †" in text
    assert f"† Fewer than {fewest(GOAL, 'nats')} samples" in text
    enough = comparison().point("Patience", "Patience(9)", outcome(2, 18))
    assert enough.bounded
    assert "†" not in markdown([replace(enough, chosen=True)], GOAL, "nats")


def test_a_rule_that_saves_nothing_is_not_chosen() -> None:
    made = Comparison(bench({repr(STRICT): outcome(2, 20)}), GOAL, "nats", "toy", live=M, with_rivals=False)
    assert made.choice([STRICT]) is None


# --- rivals -----------------------------------------------------------------------------------------------------------


class Known(Rivals):
    """Rivals whose samples are known: by name, and by the factor of their temperature."""

    made: Mapping[str, Callable[[float], Outcome]] = {}

    def _at(self, outcome: Outcome) -> Iterator[tuple[str, Session]]:
        for name in self.made:
            yield name, self.reporting.session.with_criterion(FixedSteps(1 + list(self.made).index(name)))

    def drawn(self, rival: Session, m: int) -> Outcome:
        name = list(self.made)[rival.criterion.steps - 1]  # type: ignore[attr-defined]
        return self.made[name](rival.settings["score_temperature"])


def duels(rule: Outcome, **drawn: Outcome | Callable[[float], Outcome]) -> list[Duel]:
    known = Known(*bench().halves())
    Known.made = {name: made if callable(made) else lambda _, made=made: made for name, made in drawn.items()}
    return known.duels(rule)


def test_a_duel_has_the_sign_of_the_rule() -> None:
    found = duels(outcome(3, 10), weak=outcome(5, 10), strong=outcome(2, 10))
    assert [(duel.rival, duel.difference) for duel in found] == [("weak", -2), ("strong", 1)]


def duel(rival: str, low: float, high: float, **more: Any) -> Duel:
    return Duel(rival, "", 10.0, 1.0, more.pop("entropy", 2.0), (low + high) / 2, low, high, **more)


@pytest.mark.parametrize(
    ("fought", "word", "rival"),
    [
        ([duel("a", -0.3, -0.2), duel("b", -0.2, -0.1)], "better", "b"),
        ([duel("a", -0.007, -0.001), duel("b", -0.03, 0.02)], "unclear", "b"),
        ([duel("a", 0.001, 0.011), duel("b", -0.03, 0.05)], "worse", "a"),
        ([duel("a", 0.1, 0.2), duel("b", 0.3, 0.4)], "worse", "b"),
        ([duel("a", 0.1, 0.2), duel("a", -0.2, -0.1, matched=True)], "better", "a"),
        ([duel("a", -0.2, -0.1), duel("a", 0.1, 0.2, matched=True)], "worse", "a"),
        ([duel("a", -0.2, -0.1, entropy=2.02)], "unclear", "a"),
        ([duel("a", 0.1, 0.2, entropy=2.02)], "worse", "a"),
    ],
)
def test_better_is_better_than_all_and_worse_is_worse_than_one(fought: list[Duel], word: str, rival: str) -> None:
    found = verdict(fought, entropy=2.0, samples=100)
    assert found is not None
    assert (found.word, found.duel.rival) == (word, rival)
    few = verdict(fought, entropy=2.0, samples=19)
    assert few is not None
    assert few.word == "unclear"


def test_without_rivals_there_is_no_verdict() -> None:
    assert verdict([], 2.0, 100) is None


def mixed(nats: int, spread: int) -> Outcome:
    """Rows whose entropy grows with the number of different tokens, and whose mean is `nats`."""
    row = nats + np.arange(N) % (2 * spread + 1) - spread
    row[-1] += nats * N - row.sum()
    return Outcome(np.tile(row, (M, 1)), np.full(M, 10))


def test_a_rival_of_another_entropy_is_tried_at_the_rules_own() -> None:
    """The rule is sharper than the rival, which a lower temperature makes as sharp, and then as good."""

    def rival(temperature: float) -> Outcome:
        return mixed(5, 2) if temperature > 0.98 else mixed(3, 1)

    found = duels(mixed(4, 1), rival=rival)
    assert [(duel.matched, duel.difference) for duel in found] == [(False, -1), (True, 1)]
    found_out = verdict(found, sample_entropy(mixed(4, 1).tokens.tolist()), M)
    assert found_out is not None
    assert (found_out.word, found_out.duel.matched) == ("worse", True)


def test_an_entropy_that_no_temperature_reaches_leaves_the_rival_as_it_is() -> None:
    found = duels(mixed(4, 1), rival=mixed(5, 2))
    assert [duel.matched for duel in found] == [False]


def test_rivals_of_a_real_model_spend_as_many_calls_on_the_same_samples() -> None:
    session = open_session(with_tokenizer(length=N), device="cpu", steps=8)
    requests = session.requests(n=8)
    made = Bench.of(session, requests, random_judge(), RealText.__new__(RealText))
    rivals = Rivals(*made.halves())
    found = rivals.duels(rivals.reporting.under(FixedSteps(4), 0))
    plain = [duel for duel in found if not duel.matched]
    assert [duel.rival for duel in plain] == ["fixed step", "fewer steps", "ancestral"]
    assert all(duel.calls == 4 for duel in found)
    assert plain[0].difference == 0  # the rule is that rival itself
    assert "Ancestral()" in plain[2].setting


def test_a_solver_that_cannot_take_long_steps_has_rivals_that_take_as_many_as_it_needs() -> None:
    """Churn on two levels of LogT would go back behind pure noise, and so it would on four of Warped."""
    session = open_session(with_tokenizer(length=N), device="cpu", steps=8, solver="Churn(1.5)", grid="LogT()")
    requests = session.requests(n=8)
    assert session.fewer_steps([1, 2, 4], requests[0]) == [1, 3, 4]
    rivals = Rivals(*Bench.of(session, requests, random_judge(), RealText.__new__(RealText)).halves())
    assert "Warped" not in str(rivals.plain[0].session.settings["grid"])
    found = rivals.duels(rivals.reporting.under(FixedSteps(2), 0))
    assert {duel.rival for duel in found} == {"fixed step", "fewer steps", "ancestral"}


# --- accuracy under parallelism ---------------------------------------------------------------------------------------

FULL_ROW = replace(point(2, 20), family=FULL)


def marked(family: str, tpf: float, right: float, **more: Any) -> Point:
    """A row with that share of right answers."""
    return replace(FULL_ROW, **{"family": family, "tpf": tpf, "right": right, **more})


def test_tokens_per_forward_are_sums_of_the_whole_run() -> None:
    assert point(2, 5).tpf == N / 5
    uneven = replace(outcome(2, 5), nfe=np.arange(1, M + 1))
    assert comparison().point("Patience", "Patience(3)", uneven).tpf == pytest.approx(M * N / np.arange(1, M + 1).sum())


def test_the_area_of_a_rule_is_over_its_settings_and_the_full_run() -> None:
    rows = [
        marked(FULL, 1.0, 0.8), marked("KL", 4.0, 0.6), marked("KL", 2.0, 0.78), marked("Full()", 1.5, 0.8),
        marked(PLAIN, 3.0, 0.84), marked("the last change", 9.0, 0.99), marked("real text, held out", 9.0, 1.0),
    ]  # fmt: skip
    rows[5] = replace(rows[5], family=next(iter(ORACLES)))
    found = {area.family: area for area in areas(rows)}
    assert list(found) == [FULL, "KL", "Full()", PLAIN], "oracles and real text are no methods"
    assert {area.y_max for area in found.values()} == {84.0}
    assert found["KL"].aup == aup([(1.0, 80.0), (2.0, 78.0), (4.0, 60.0)], 84.0)
    assert found[FULL].aup == pytest.approx(80)
    assert found["KL"].tpf == 4


def test_areas_by_ar_nll_are_relative_to_the_best_of_the_model() -> None:
    rows = [FULL_ROW, replace(point(1, 5), model="other"), replace(point(2, 5), family="KL"), point(3, 10)]
    found = {(area.model, area.family): area for area in areas(rows)}
    assert found["toy", "KL"].best_ar_nll == 2
    assert found["other", "Patience"].best_ar_nll == 1
    assert found["toy", "KL"].aup_ar_nll == pytest.approx(100 * N / 5)
    assert found["toy", "Patience"].aup_ar_nll == pytest.approx(100 * N / 20)  # 100 / e is more than 5 points less
    assert all(area.aup is None and area.y_max is None for area in found.values())
    assert areas([replace(FULL_ROW, ar_nll=float("nan"))])[0].aup_ar_nll is None


def test_areas_stand_in_the_files_and_on_a_terminal_where_there_are_answers(tmp_path: Path) -> None:
    plain, answered = [FULL_ROW, point(2, 10)], [marked(FULL, 1.0, 0.8), marked("KL", 4.0, 0.8, steps=7)]
    save_json(answered, GOAL, "nats", tmp_path / "compare.json")
    stored = json.loads((tmp_path / "compare.json").read_text())["aup"]
    assert [(row["family"], row["aup"], row["y_max"]) for row in stored] == [(FULL, 80.0, 80.0), ("KL", 320.0, 80.0)]
    assert "AUP" not in terminal(plain, GOAL, "nats")
    last = [re.split(r"\s{2,}", line) for line in terminal(answered, GOAL, "nats").split("\n") if line][-4:]
    assert last[0] == ["steps", "rule", "most TPF", "AUP"]
    assert last[2:] == [["20", FULL, "1.00", "80.0"], ["7", "KL", "4.00", "320.0"]]
    assert "| rule | model | steps | most TPF | AUP by AR-NLL |" in markdown(plain, GOAL, "nats")
    assert "| KL | toy | 7 | 4.00 | 320.0 |" in markdown(answered, GOAL, "nats")


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_files_hold_every_point_and_the_verdict(tmp_path: Path) -> None:
    lost = Duel("ancestral", "10, LogT()", 10.0, 2.5, 0.0, -0.5, -0.6, -0.4)
    points = [replace(point(2, 15), chosen=True, duels=(lost,)), point(3, 5)]
    write_csv(points, tmp_path / "compare.csv")
    save_json(points, GOAL, "nats", tmp_path / "compare.json")
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["verdict"], row["rival_rival"]) for row in rows] == [("better", "ancestral"), ("", "")]
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["goal"]["limit"] == 0.05
    assert content["rows"][0]["verdict"]["word"] == "better"
    assert content["rows"][1]["verdict"] is None
    assert "better: -0.500 [-0.600, -0.400], ancestral (10, LogT())" in markdown(points, GOAL, "nats")


def test_a_terminal_shows_the_columns_that_decide() -> None:
    points = [replace(point(2, 15), chosen=True), replace(point(3, 5), family=PLAIN)]
    head, _, *lines = terminal(points, GOAL, "nats").split("\n")
    assert re.split(r"\s{2,}", head) == [
        "rule", "calls", "TPF", "saved", "AR-NLL", "change, nats", "agreement", "beside its hardest rival",
    ]  # fmt: skip
    assert [re.split(r"\s{2,}", line)[0] for line in lines[:2]] == [one.setting for one in points]
    assert re.split(r"\s{2,}", terminal([*points, replace(points[0], steps=7)], GOAL, "nats"))[0] == "steps"
