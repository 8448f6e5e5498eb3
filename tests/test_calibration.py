"""Laws of choosing and comparing settings: the bootstrap, the search, the file beside the weights, the commands."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from coverage_of_bounds import Pool, differ, failures, nats, pool
from evaluation_toys import random_judge
from heads import HEAD
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TEXT, VOCAB, tokenizer, with_tokenizer

from cdlm import api
from cdlm.cli import main as cli
from cdlm.continuous.systems.ssd import SSD
from cdlm.core.errors import CdlmError
from cdlm.core.stats import Bootstrap, Scores, bootstrap
from cdlm.evaluation.bench import MEASURES, Bench, Outcome
from cdlm.evaluation.compare import FULL, PLAIN, Comparison, markdown
from cdlm.evaluation.oracles import ORACLES
from cdlm.evaluation.texts import REAL
from cdlm.halting import RULES, Criterion, FixedSteps, For, FromStep, JoT, Never, Patience, parse_criterion, sweep
from cdlm.halting.calibration import (
    Calibration,
    Goal,
    Trial,
    Tried,
    calibrated_rule,
    loosest,
    search,
    write_calibration,
)
from cdlm.halting.losses import Binary, Bounded, Change
from cdlm.runs import caches
from cdlm.runs.config import parse_run
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.recordings import write_recording

# --- the bootstrap ---


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), m=st.integers(20, 60))
def test_the_interval_is_that_of_known_spread(seed: int, m: int) -> None:
    """Of equal weights the bootstrap of a mean has the standard deviation of the sample over the root of its size."""
    total = np.random.default_rng(seed).normal(3, 1, m)
    scores = Scores(total, np.full(m, 2.0))
    found = scores.bootstrap()
    low, high = found.interval95
    assert found.value == pytest.approx(total.mean() / 2)
    assert (high - low) / 2 == pytest.approx(1.96 * total.std() / 2 / m**0.5, rel=0.2)
    assert low < found.value < high
    assert low < found.upper(0.8) < found.upper(0.95) < high


def test_a_run_loses_nothing_against_itself_and_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    full = Scores(rng.uniform(1, 9, 40), rng.uniform(20, 30, 40))
    same = full.relative_to(full)
    assert same.value == 0
    assert np.abs(same.draws).max() < 1e-12
    tenth = Scores(1.1 * full.total, full.weight).relative_to(full)
    assert np.allclose(tenth.draws, 0.1)
    assert full.bootstrap().draws.std() > 0.001


def test_the_same_samples_are_drawn_every_time() -> None:
    scores = Scores(np.arange(9.0), np.ones(9))
    assert np.array_equal(scores.bootstrap().draws, bootstrap(scores, 9).draws)


# --- the search ---


@given(limit=st.floats(0.002, 0.3), confidence=st.floats(0.6, 0.999))
def test_the_fewest_samples_are_those_in_which_ruined_ones_are_seen(limit: float, confidence: float) -> None:
    fewest = Goal(limit, confidence).fewest
    assert (1 - limit) ** fewest <= 1 - confidence + 1e-12
    assert (1 - limit) ** (fewest - 1) > 1 - confidence - 1e-12
    assert Goal(0.5, confidence, agreement=1 - limit).fewest in (fewest, fewest + 1)  # 1 - (1 - limit) is rounded


RULES_OF_STEPS = [FixedSteps(steps) for steps in range(20, 0, -1)]


def one_sided(loss: Bootstrap) -> Change:
    return Change(loss, two_sided=False, samples=1000)


def trials(losses: Sequence[float], goal: Goal, noise: float = 0.0, differ: Sequence[float] = ()) -> list[Trial]:
    def measure(rule: FixedSteps) -> Tried:
        loss = losses[20 - rule.steps]
        change = one_sided(Bootstrap(loss, np.array([loss - noise, loss + noise])))
        other = Bounded(np.full(1000, differ[20 - rule.steps])) if differ else None
        return Tried(float(rule.steps), 1 - rule.steps / 20, change, other)

    return search(RULES_OF_STEPS, measure, goal, 1000)  # type: ignore[arg-type]


@given(losses=st.lists(st.floats(-0.05, 0.3), min_size=20, max_size=20))
def test_the_search_ends_at_the_first_failure(losses: list[float]) -> None:
    goal = Goal(0.1)
    failing = next((i for i, loss in enumerate(losses) if loss > 0.1), 20)
    if failing < 2:  # the first setting saves nothing
        if failing < 20:
            with pytest.raises(CdlmError, match="no setting"):
                trials(losses, goal)
        return
    found = trials(losses, goal)
    assert len(found) == min(failing + 1, 20)
    assert loosest(found).rule == repr(RULES_OF_STEPS[failing - 1])
    assert [trial.passed for trial in found] == [True] * failing + [False] * (len(found) - failing)


def test_the_choice_holds_as_often_as_asked() -> None:
    """The true loss grows along the sweep and is measured on samples; at 90 % it is too large one time in ten."""
    rng, goal, m = np.random.default_rng(1), Goal(0.02, 0.9), 300
    true = np.linspace(0, 0.06, 20)
    wrong = 0
    for _ in range(200):
        base, noise = rng.uniform(1, 2, m), rng.normal(0, 0.15, m)
        full = Scores(base, np.ones(m))

        def measure(rule: FixedSteps, base=base, noise=noise, full=full) -> Tried:
            loss = true[20 - rule.steps]
            rough = base * (1 + loss) + noise * loss / 0.06  # the more is changed, the more it scatters
            return Tried(1.0, 0.5, one_sided(Scores(rough, np.ones(m)).relative_to(full)))

        best = loosest(search(RULES_OF_STEPS, measure, goal, m))  # type: ignore[arg-type]
        wrong += true[20 - parse_criterion(best.rule).steps] > goal.limit  # type: ignore[attr-defined]
    assert wrong / 200 < 0.1 + 3 * (0.1 * 0.9 / 200) ** 0.5


def test_both_limits_must_hold() -> None:
    goal = Goal(0.1, agreement=0.9)
    found = trials([0.0] * 20, goal, differ=[0.01 * k for k in range(20)])
    assert found[-1].passed is False
    assert found[-1].differ_upper is not None
    assert found[-1].differ_upper > 0.1 >= (found[-2].differ_upper or 1)
    with pytest.raises(CdlmError, match=r"no setting keeps within a change of at most 0\.1 at an agreement"):
        trials([0.0] * 20, goal, differ=[0.2] * 20)
    with pytest.raises(CdlmError, match=r"1000 samples cannot show .* about \d+ samples would"):
        trials([0.0] * 20, goal, differ=[0.095] * 20)


def test_a_two_sided_goal_counts_a_gain_as_a_loss() -> None:
    gain = Bootstrap(-0.3, np.full(9, -0.3))
    assert Change(gain, two_sided=True, samples=9).at_most(0.9) == 0.3
    assert Change(gain, two_sided=False, samples=9).at_most(0.9) == -0.3


def test_bounds_of_losses_between_0_and_1_hold_for_few_samples() -> None:
    none, all_ = Binary(np.zeros(59)), Binary(np.ones(59))
    assert none.at_most(0.95) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert all_.at_most(0.95) == 1
    assert Bounded(np.zeros(299)).at_most(0.95) == pytest.approx(0.00997, abs=1e-5)
    assert Bounded(np.full(100, 0.2)).samples_for(0.1, 0.95) is None
    needed = Bounded(np.full(100, 0.02)).samples_for(0.05, 0.95)
    assert needed is not None
    assert Bounded(np.full(needed, 0.02)).at_most(0.95) <= 0.05


@pytest.mark.parametrize("ruined", [1 / 300, 1 / 50])
def test_a_bounded_loss_is_underrated_no_more_often_than_promised(ruined: float) -> None:
    """A loss that ruins few samples wholly, which a bootstrap of 256 samples does not see in 43 % of the sets."""
    rng = np.random.default_rng(0)
    sets = (rng.random((300, 256)) < ruined).astype(np.float64)
    losses = {total: (np.arange(256) < total).astype(np.float64) for total in set(sets.sum(1).tolist())}
    bounds = {total: Bounded(loss).at_most(0.9) for total, loss in losses.items()}
    wrong = np.mean([bounds[total] < ruined for total in sets.sum(1).tolist()])
    exact = {total: Binary(loss).at_most(0.9) for total, loss in losses.items()}
    wrong_exact = np.mean([exact[total] < ruined for total in sets.sum(1).tolist()])
    unseen = np.mean([Scores(one, np.ones(256)).bootstrap().upper(0.9) < ruined for one in sets[:100]])
    assert wrong <= 0.1
    assert wrong_exact <= 0.1 + 3 * (0.09 / 300) ** 0.5
    assert unseen > 0.2 or ruined > 0.01  # why the bound is needed


@pytest.fixture(scope="module")
def oracle_pool() -> Pool:
    return pool(4096)


def test_calibrations_on_the_oracle_fail_no_more_often_than_promised(oracle_pool: Pool) -> None:
    """Ten per cent are promised, and 60 calibrations are made: a binomial law has more than 12 failures once in 200."""
    for of, limit, samples in ((oracle_pool, 0.02, 256), (oracle_pool.ruined(1 / 300), 0.003, 1024)):
        wrong, _ = failures(of, differ, limit, samples, times=60)
        assert wrong <= 0.2
    wrong, _ = failures(oracle_pool, nats, 0.02, 256, times=60)
    assert wrong <= 0.2


def test_a_bootstrap_does_not_see_the_ruin_that_its_samples_do_not_hold(oracle_pool: Pool) -> None:
    """Why nats have no finite-sample bound, and the share of tokens has one."""
    wrong, _ = failures(oracle_pool.ruined(1 / 300), nats, 0.02, 256, times=60)
    assert wrong > 0.2


def test_too_few_samples_say_how_many_are_needed() -> None:
    with pytest.raises(CdlmError, match="needs at least 299 samples, got 100"):
        Goal(0.01).check(100)
    Goal(0.01).check(299)
    assert Goal(1e-17).fewest > 10**17
    with pytest.raises(CdlmError, match="about 9000 samples would"):
        trials([-0.1, 0.05] + [0.2] * 18, Goal(0.1), noise=0.15 / 0.9)  # the bound is three times too far away
    with pytest.raises(CdlmError, match="allow more"):
        trials([0.0, 0.2] + [0.2] * 18, Goal(0.1), noise=0.01)


def test_choices_that_save_nothing_are_refused() -> None:
    def nothing(rule: Criterion) -> Tried:
        return Tried(9.0, 0.0, one_sided(Bootstrap(0.0, np.zeros(9))))

    def unknown(rule: Criterion) -> Tried:
        return Tried(9.0, 0.0, one_sided(Bootstrap(float("nan"), np.zeros(9))))

    with pytest.raises(CdlmError, match="no setting that was tried saves a call"):
        search([Never()], nothing, Goal(0.1), 1000)
    with pytest.raises(CdlmError, match="nothing that can be judged"):
        search([Never()], unknown, Goal(0.1), 1000)


@pytest.mark.parametrize("goal", [(0.0, 0.9), (1.0, 0.9), (-0.1, 0.9), (0.1, 1.0), (0.1, 0.0), (float("nan"), 0.9)])
def test_goals_out_of_range_are_refused(goal: tuple[float, float]) -> None:
    with pytest.raises(CdlmError, match=r"0 < (limit|confidence) < 1"):
        Goal(*goal)


# --- the file ---


def entry(rule: str = "Patience(steps=3)", steps: int = 9) -> Calibration:
    trial = Trial(rule, 5.0, 0.4, 0.001, 0.004, True)
    return Calibration(
        {"steps": steps, "grid": "LogT()"}, rule, "agreement", "binomial", Goal(0.01), 300, 1, None, [trial]
    )


def is_of(weights: str) -> Callable[[str], bool]:
    """Of a model with this fingerprint: whether a file names its weights."""
    return lambda named: named == weights


def test_the_file_gives_each_sampler_its_rule(tmp_path: Path) -> None:
    write_calibration(tmp_path, "w", is_of("w"), entry())
    write_calibration(tmp_path, "w", is_of("w"), entry("Entropy(nats=0.1)", steps=20))
    write_calibration(tmp_path, "w", is_of("w"), entry("Patience(steps=4)"))
    assert calibrated_rule(tmp_path, is_of("w"), {"steps": 9, "grid": "LogT()"}) == "Patience(steps=4)"
    assert calibrated_rule(tmp_path, is_of("w"), {"steps": 20, "grid": "LogT()"}) == "Entropy(nats=0.1)"
    with pytest.raises(CdlmError, match="no rule for steps=10"):
        calibrated_rule(tmp_path, is_of("w"), {"steps": 10, "grid": "LogT()"})
    evidence = json.loads((tmp_path / "halting.json").read_text())["calibrations"][-1]
    assert (evidence["samples"], evidence["goal"]["limit"], evidence["trials"][0]["upper"]) == (300, 0.01, 0.004)


def test_a_choice_for_other_weights_is_void(tmp_path: Path) -> None:
    write_calibration(tmp_path, "old", is_of("old"), entry())
    with pytest.raises(CdlmError, match="other weights"):
        calibrated_rule(tmp_path, is_of("new"), entry().settings)
    write_calibration(tmp_path, "new", is_of("new"), entry("Patience(steps=5)", steps=20))
    with pytest.raises(CdlmError, match="no rule for steps=9"):
        calibrated_rule(tmp_path, is_of("new"), entry().settings)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cdlm_halting": 1}', '{"cdlm_halting": 9}', "\0",
                                     '{"cdlm_halting": 1, "weights": "w", "calibrations": [3]}',
                                     '{"cdlm_halting": 2, "weights": "w", "calibrations": [3]}',
                                     '{"cdlm_halting": 1, "weights": "w", "calibrations": [{"settings": {}}]}',
                                     ])  # fmt: skip
def test_broken_files_are_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "halting.json").write_text(content)
    with pytest.raises(CdlmError) as caught:
        calibrated_rule(tmp_path, is_of("w"), {})
    assert "\n" not in str(caught.value)


def test_a_file_of_version_1_is_read_and_written_anew_with_the_names_of_today(tmp_path: Path) -> None:
    """Version 1 calls FromStep AfterStep."""
    first = asdict(entry("AfterStep(rule=Patience(steps=3), steps=5)"))
    content = {"cdlm_halting": 1, "weights": "w", "calibrations": [first, asdict(entry("Full()", steps=20))]}
    (tmp_path / "halting.json").write_text(json.dumps(content))
    rule = calibrated_rule(tmp_path, is_of("w"), entry().settings)
    assert parse_criterion(rule) == FromStep(Patience(3), 5)
    write_calibration(tmp_path, "w", is_of("w"), entry("Full()", steps=20))
    after = json.loads((tmp_path / "halting.json").read_text())
    assert after["cdlm_halting"] == 3
    assert [item["rule"] for item in after["calibrations"]] == [rule, "Full()"]
    assert after["calibrations"][0]["trials"][0]["rule"] == rule


# --- sweeps as text ---

BY_HEAD = ("Learned", "Stop")


SWEPT = sorted(RULES.keys() - {"EDIT", "Full", "Never", "For", "FromStep", "And", "Or", "VoteDecided"})


@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("budget", [1, 7, 200])
def test_a_name_is_its_sweep(name: str, budget: int) -> None:
    fixed = {"path": str(HEAD)} if name in BY_HEAD else {}
    text = f"{name}(..., path={str(HEAD)!r})" if fixed else name
    assert sweep(text, budget) == list(RULES[name].sweep(budget, **fixed))
    if not fixed:
        assert sweep(name, budget) == sweep(f" {name}(...) ", budget)


@pytest.mark.parametrize("name", BY_HEAD)
def test_a_sweep_by_a_head_needs_the_head(name: str) -> None:
    with pytest.raises(CdlmError, match=rf"cannot sweep '{name}\(\.\.\.\)' .*: it is {name}\(path: str"):
        sweep(name, 20)


def test_what_stands_around_a_sweep_stays() -> None:
    inner = sweep("Patience", 50)
    assert sweep("FromStep(Patience(...), 20)", 50) == [FromStep(rule, 20) for rule in inner]
    assert sweep("For(Patience(...), 2) | FixedSteps(40)", 50) == [For(rule, 2) | FixedSteps(40) for rule in inner]
    assert {rule.warmup for rule in sweep("KL(..., warmup=0.5)", 50)} == {0.5}  # type: ignore[attr-defined]
    assert sweep("Patience(7)", 50) == [Patience(7)]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Patiense(...)", "did you mean Patience"),
        ("KL(..., warm=0.5)", "cannot sweep"),
        ("Never", "no settings to sweep"),
        ("Full", "no settings to sweep"),
        ("Patience(...) | Entropy(...)", "rule at a time"),
        ("Patience(..., 3)", "rule at a time"),
        ("For(..., 3)", "no settings to sweep|rule at a time"),
        ("For(Patience, 3)", r"Patience is written as a call in a halting rule: Patience\(steps"),
        ("Patiense", r"did you mean Patience\?.* written as a call, for example Patience\(steps"),
        ("Patience(...", "cannot read"),
    ],
)
def test_mistakes_in_sweeps_are_named(text: str, advice: str) -> None:
    with pytest.raises(CdlmError, match=advice) as caught:
        sweep(text, 50)
    assert "\n" not in str(caught.value)


# --- on a model ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its text, and a judge; nothing is trained."""
    made = tmp_path_factory.mktemp("bench")
    (made / "text.txt").write_text("\n".join(TEXT * 30))
    with_tokenizer().save_pretrained(made / "toy")
    random_judge().save(made / "judge")
    blocks = SSD(width=16, depth=1, heads=2, dim=8, block=5).build(VOCAB)
    blocks.tokenizer, blocks.length = tokenizer(), 12
    blocks.save_pretrained(made / "blocks")
    argv = [
        "--source", "Files", "--source.paths", json.dumps([str(made / "text.txt")]), "--length", "12",
        "--judge_share=0", "--unread_share=0",
    ]  # fmt: skip

    caches.mark(str(made / "cache"))
    (made / "toy" / "config.yaml").write_text(parse_run([*argv, "--cache", str(made / "cache")]).to_yaml())
    return made


@pytest.fixture(scope="module")
def bench(place: Path) -> Bench:
    return api.open_bench(api.open_session(place / "toy", steps=12), 30, judge=str(place / "judge"))


def test_the_full_run_loses_nothing(bench: Bench) -> None:
    full = bench.under(Never(), live=0)
    for measure in MEASURES.keys() - {"answers"}:  # which asks for problems: tests/test_workloads.py
        assert bench.loss(full, measure, True).value == 0, measure
    assert bench.agreement(full) == 1
    assert np.array_equal(full.nfe, bench.full_calls)


def test_the_loss_is_that_of_the_texts(bench: Bench) -> None:
    half = bench.under(FixedSteps(2), live=0)
    changed = (half.tokens != bench.full_run.tokens).mean()
    assert 0 < changed < 1
    assert bench.loss(half, "agreement", True).value == pytest.approx(changed)
    value, full = bench.score(half.tokens).bootstrap().value, bench.full.bootstrap().value
    assert bench.loss(half, "ar-nll", True).value == pytest.approx(value / full - 1)
    assert bench.loss(half, "nats", True).value == pytest.approx(value - full)
    assert abs(bench.loss(half, "gap", True).value) == pytest.approx(abs((value - full) / bench.gap.value))
    texts = (half.tokens != bench.full_run.tokens).any(1).mean()
    assert bench.loss(half, "texts", True).value == pytest.approx(texts)


def test_replayed_and_live_runs_score_alike(bench: Bench) -> None:
    replayed = bench.under(FixedSteps(5), live=0)
    live = bench.run(bench.session.with_criterion(FixedSteps(5)), 30)
    assert np.array_equal(replayed.nfe, live.nfe)
    assert (replayed.tokens == live.tokens).mean() > 0.99  # float32: a tie may fall either way in another batch


def test_each_text_is_judged_once(bench: Bench) -> None:
    bench.score(bench.full_run.tokens)
    before = len(bench.scorer.known)
    doubled = np.concatenate([bench.full_run.tokens[:15]] * 2)
    scores = bench.scorer(doubled, bench.full_run.given, bench.full_run.valid)
    assert len(bench.scorer.known) == before
    assert np.array_equal(scores.total[:15], bench.full.total[:15])
    assert np.array_equal(scores.total[15:], bench.full.total[:15])


def test_halves_are_the_samples_of_the_whole(bench: Bench) -> None:
    first, second = bench.halves()
    assert len(first.full_run) == len(second.full_run) == 15
    assert np.array_equal(np.concatenate([first.full_run.tokens, second.full_run.tokens]), bench.full_run.tokens)
    rule = Patience(2)
    parts = [half.under(rule, 0) for half in (first, second)]
    assert np.array_equal(np.concatenate([part.nfe for part in parts]), bench.under(rule, 0).nfe)
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), bench.under(rule, 0).tokens)
    live = second.run(second.session.with_criterion(rule), 15)
    assert np.array_equal(live.nfe, parts[1].nfe)
    with pytest.raises(CdlmError, match="take two or more"):
        bench.part(slice(1)).halves()


def test_the_table_of_a_comparison(bench: Bench) -> None:
    goal = Goal(0.9, 0.95)
    rules = {"FixedSteps": [FixedSteps(11), FixedSteps(4)], "JoT": [JoT(1e6)], "Never": [Never()]}
    comparison = Comparison(bench, goal, "ar-nll", "toy", live=8, fewer=(3, 6))
    points = comparison.table(rules)
    held_out = REAL["held out"]
    by = {name: [p for p in points if p.family == name] for name in (FULL, held_out, PLAIN, *rules)}
    (full,) = by[FULL]
    assert (full.saved, full.change, full.loss, full.agreement, full.qps) == (0, 0, 0, 1, 1)
    assert [p.calls for p in by[PLAIN]] == [3, 6]
    assert by[held_out][0].calls is None
    late, early = by["FixedSteps"]
    assert (late.calls, early.calls) == (11, 4)
    assert late.saved == pytest.approx(1 / 12)
    assert early.step_speedup == early.step_speedup_each == pytest.approx(3)
    assert early.qps == pytest.approx(3 * (full.ar_nll / early.ar_nll) ** 4)
    assert early.chosen
    assert {duel.rival for duel in early.duels} == {"fixed step", "fewer steps", "ancestral"}
    assert all(duel.calls == 4 for duel in early.duels)
    assert by["JoT"][0].samples == 8
    assert by["JoT"][0].frechet is None  # fewer samples than a side of real text has
    assert not by["Never"][0].chosen  # it saves nothing
    assert {p.samples for p in points if p.family not in ("JoT", held_out)} == {15}
    assert full.frechet_change is None  # 15 samples are too few
    assert "| Never | 15 | - | - | saves no call within the goal |" in markdown(points, goal, "ar-nll")


def test_the_distance_to_real_text_is_that_of_the_full_run_and_its_change(bench: Bench) -> None:
    more = replace(bench, session=bench.session, requests=bench.session.requests(n=60))
    whole = Bench.of(more.session, more.requests, more.scorer.judge, more.text)
    made = Comparison(whole, Goal(0.9), "ar-nll", "toy", live=0, fewer=(3,), with_rivals=False)
    points = {p.setting or p.family: p for p in made.table({"FixedSteps": [FixedSteps(11), FixedSteps(2)]})}
    full, early = points["Never()"], points["FixedSteps(steps=2)"]
    assert (full.frechet_change, full.frechet_change_sd) == (0, 0)
    assert early.frechet_change == pytest.approx(early.frechet - full.frechet)  # type: ignore[operator]
    real = points[REAL["held out"]]
    assert 0 < real.frechet < full.frechet  # type: ignore[operator]


def test_rules_that_freeze_are_left_out_when_nothing_may_run(bench: Bench) -> None:
    made = Comparison(bench, Goal(0.2), "agreement", "toy", live=0, fewer=(6,), with_rivals=False)
    points = made.table({"JoT": [JoT()], "Patience": [Patience(3)]})
    assert {p.family for p in points} == {FULL, REAL["held out"], *ORACLES, PLAIN, "Patience"}


def test_recordings_serve_a_bench(place: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "kept"
    write_recording(bench.steps_taken, bench.session, folder)
    session, judge = bench.session, str(place / "judge")
    again = api.open_bench(session, 20, recordings=folder, judge=judge)
    assert np.array_equal(again.full_run.tokens, bench.full_run.tokens[:20])
    assert np.array_equal(again.under(Patience(2), 0).nfe, bench.under(Patience(2), 0).nfe[:20])
    for other in (session.with_steps(13), replace(session, options=RunOptions(seed=1))):
        with pytest.raises(CdlmError, match="no recording of 20 samples"):
            api.open_bench(other, 20, recordings=folder, judge=judge)
    monkeypatch.setattr(api, "open_judge", lambda *_, **__: pytest.fail("a judge was opened before the recording"))
    with pytest.raises(CdlmError, match="no recording of 31 samples"):
        api.open_bench(session, 31, recordings=folder, judge=judge)


# --- the commands ---


def say(*words: object) -> None:
    cli.main([str(word) for word in words])


def test_calibrate_then_sample_with_auto(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = place / "toy"
    settings_ = ("--steps", 12, "--device", "cpu")
    say("calibrate", run, "--rule", "FixedSteps", "--max-loss", "99%", "--confidence", 0.9, "--measure", "agreement",
        "--n", 20, "--judge", place / "judge", *settings_)  # fmt: skip
    shown = capsys.readouterr()
    assert "is now --halt auto" in shown.err
    rule = json.loads((run / "halting.json").read_text())["calibrations"][0]["rule"]
    say("sample", run, "--n", 3, *settings_, "--halt", "auto", "--out", tmp_path / "auto.jsonl")
    say("sample", run, "--n", 3, *settings_, "--halt", rule, "--out", tmp_path / "rule.jsonl")
    assert (tmp_path / "auto.jsonl").read_text() == (tmp_path / "rule.jsonl").read_text()
    system = api.load(run)
    assert api.generate(system, n=3, steps=12, halt="auto").nfe.max() < 12
    with pytest.raises(CdlmError, match="no rule for steps=13"):
        api.generate(system, n=3, steps=13, halt="auto")
    with pytest.raises(CdlmError, match="loaded from a folder"):
        api.generate(with_tokenizer(), n=1, steps=12, halt="auto")


OTHER_PLAIN = ("plain sampler, fewer steps", "plain sampler, ancestral")


def test_compare_on_the_command_line(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    say("compare", place / "toy", "--rules", "Patience", "FromStep(Entropy(...), 3)", "--steps", 6, 8, "--n", 10,
        "--fewer", 2, 4, "--max-loss", "50%", "--measure", "agreement", "--judge", place / "judge", "--live", 4,
        "--out", tmp_path, "--device", "cpu")  # fmt: skip
    assert capsys.readouterr().out.split()[:2] == ["steps", "rule"]
    assert (tmp_path / "compare.md").read_text().startswith("| model |")
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["steps"] for row in rows} == {"6", "8"}
    assert {row["family"] for row in rows} == {
        FULL, REAL["held out"], *ORACLES, PLAIN, *OTHER_PLAIN, "Patience", "FromStep(Entropy(...), 3)",
    }  # fmt: skip
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "QPS" in (tmp_path / "compare.md").read_text()


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("calibrate", "--n", 20), "needs at least 299 samples, got 20"),
        (("calibrate", "--max-loss", "much"), "a share such as 1%"),
        (("calibrate", "--rule", "Patiense"), "cannot read|Patiense|did you mean"),
        (("compare", "--rules", "Patience", "Zzz(...)"), "no halting rule 'Zzz'"),
        (("compare", "--rules", "Patience", "Patiense"), r"no halting rule 'Patiense' \(did you mean Patience\?\)"),
        (("compare", "--recordings", "nowhere", "--live", 0), "no recordings"),
        (("compare", "--rules", "Prophet(..., region=(0, 5))"), "no recording keeps"),
        (("calibrate", "--rule", "Prophet(..., region=(0, 5))"), "no recording keeps"),
        (("calibrate", "--max-loss", "1%", "--max-change", "1%"), "not both"),
        (("calibrate", "--min-agreement", "2"), "agreement < 1"),
        (("compare", "--rules"), "needs at least one value"),
        (("compare", "--n", 4, "--steps", 4, "--live", -1), "live >= 0|expected one argument"),
    ],
)
def test_mistakes_end_with_one_line(place: Path, words: tuple, advice: str, capsys, tmp_path: Path) -> None:
    import re

    command, *rest = words
    with pytest.raises(SystemExit) as caught:
        say(command, place / "toy", "--device", "cpu", *rest)
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.err.replace("device: cpu\n", "").count("\n") == 1
    assert re.search(advice, shown.err), shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("model", "words", "warning"),
    [
        ("blocks", (), "32 samples in each half, and .* needs 299: raise --live, or ask for less$"),
        ("blocks", ("--n", 200), "100 samples in each half, and .* needs 299: raise --n, or ask for less$"),
        ("blocks", ("--live", 298), "298 samples"),
        ("blocks", ("--live", 299), None),
        ("blocks", ("--max-loss", "10%", "--min-agreement", "90%", "--live", 100), None),
        ("blocks", ("--live", 0), None),
        ("toy", ("--rules", "Patience", "Entropy"), None),
        ("toy", ("--rules", "JoT(3.0)"), r"^cdlm: JoT\(3.0\) on .* 32 samples"),
        ("toy", (), "^cdlm: JoT on .* 32 samples"),
    ],
)
def test_too_few_samples_for_a_bound_are_named_before_any_work(
    place: Path, model: str, words: tuple, warning: str | None, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    def work(*_: object, **__: object) -> None:
        raise CdlmError("at work")

    monkeypatch.setattr(api, "open_bench", work)
    with pytest.raises(SystemExit) as caught:
        say("compare", place / model, "--device", "cpu", *words)
    *lines, end = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("device:")]
    assert caught.value.code == 2
    assert end == "cdlm: at work"
    assert len(lines) == (warning is not None)
    assert all(re.search(warning or "", line) for line in lines), lines


def test_drawn_samples_keep_their_order(bench: Bench) -> None:
    drawn = bench.under(FixedSteps(12), live=0)
    assert isinstance(drawn, Outcome)
    assert np.array_equal(drawn.tokens, bench.full_run.tokens)


def test_agreement_needs_no_judge(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("a judge was opened")

    monkeypatch.setattr(api, "open_judge", trained)
    say("calibrate", place / "toy", "--rule", "FixedSteps", "--max-loss", "99%", "--confidence", 0.9, "--measure",
        "agreement", "--n", 20, "--steps", 7, "--device", "cpu", "--quiet")  # fmt: skip
    assert json.loads((place / "toy" / "halting.json").read_text())["calibrations"][-1]["judge"] is None
