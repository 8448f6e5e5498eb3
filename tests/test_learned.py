"""Laws of learned halting: labels, the head and its file, the two rules, and whom a head is refused to."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import HEAD, POSITIONS, STEPS, request, runs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from safetensors.torch import load_file, save_file
from setups import diffusion, unmasking
from test_masked_replay import recording as masked
from test_masked_replay import run as masked_run
from toys import with_tokenizer

from cdlm import api
from cdlm.cli import main as cli
from cdlm.continuous.sampler import DiffusionLoop
from cdlm.core.errors import CdlmError
from cdlm.halting import (
    Criterion,
    FixedSteps,
    For,
    FromStep,
    Learned,
    Patience,
    Stop,
    for_transformers,
    parse_criterion,
    sweep,
)
from cdlm.halting.calibration import Calibration, Goal, calibrated_rule, write_calibration
from cdlm.halting.fit import Fitting, auc, examples_of, features_in, fit, kept_by_step, once_each
from cdlm.halting.head import ABOUT, FEATURES, WEIGHTS, Head, read_head, untrained, write_head
from cdlm.halting.replay import replay
from cdlm.policies.confidence import Threshold
from cdlm.policies.llada import LLaDA
from cdlm.recording.file import Recording
from cdlm.sampling.recordings import agreement

PATH = str(HEAD)


@cache
def golden() -> Head:
    return read_head(HEAD)[0]


# --- labels ---


def test_what_is_kept_at_a_step_is_the_agreement_of_a_run_halted_there() -> None:
    for recording in (runs(12), masked(Threshold(0.3, block=4), 0.8)):
        kept = kept_by_step(recording)
        for step in range(recording.record.steps):
            halted = replay(recording, FixedSteps(step + 1))
            there = halted.halted
            assert np.allclose(kept[step, there], agreement(halted.tokens, recording)[there], atol=1e-12)


def test_given_positions_are_no_examples() -> None:
    recording = runs(12)
    assert recording.given.any()
    other = replace(recording, tokens=np.where(recording.given, 99, recording.tokens))
    assert np.array_equal(kept_by_step(recording), kept_by_step(other))
    names = features_in(recording)
    for here, there in zip(examples_of([recording], names), examples_of([other], names), strict=True):
        assert torch.equal(here.nan_to_num(), there.nan_to_num())


def test_a_samples_weights_sum_to_one_and_fall() -> None:
    examples = examples_of([runs(5), runs(3, first=5)], ("progress",))
    assert examples.sample.unique().tolist() == list(range(8))
    for sample in range(8):
        own = examples.of(torch.tensor([sample]))
        assert float(own.weight.sum()) == pytest.approx(1)
        assert (own.weight[own.features[:, 0].argsort()].diff() < 0).all()
        assert len(own.weight) == STEPS - 1  # at the last step there is nothing to decide


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_the_area_is_the_chance_that_a_true_example_scores_higher(pairs: list[tuple[int, bool]]) -> None:
    true, false = ([score for score, truth in pairs if truth is kind] for kind in (True, False))
    if not true or not false:
        return
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in true for b in false]
    scores, truths = torch.tensor([float(s) for s, _ in pairs]), torch.tensor([t for _, t in pairs])
    assert auc(scores, truths) == pytest.approx(sum(wins) / len(wins))


# --- training ---


def told(recording: Recording) -> Recording:
    """The same, with a margin that says what is kept: a head can know all there is to know."""
    told = np.exp(4 * kept_by_step(recording)).astype(np.float32)
    return replace(recording, record=replace(recording.record, signals={"margin": told}))


def test_a_head_that_can_know_everything_learns_it() -> None:
    head = fit([told(runs(64))], Fitting(epochs=150, patience=150, lr=3e-3))
    assert head.report["auc"] > 0.999
    assert head.report["cross_entropy"] < 0.2 * head.report["cross_entropy_of_the_mean"]
    assert head.report["loss_error"] < 0.05


def test_a_head_that_can_know_something_beats_the_mean() -> None:
    report = fit([runs(64)], Fitting(epochs=60)).report
    assert report["auc"] > 0.8
    assert report["cross_entropy"] < report["cross_entropy_of_the_mean"]
    assert report["loss_cross_entropy"] < report["loss_cross_entropy_of_the_mean"]
    assert report["cross_entropy"] <= report["cross_entropy_before_temperature"]
    assert report["held_out"] == 16


def test_a_sample_that_was_recorded_again_counts_once() -> None:
    """Else its copy would be held out, and the head be measured on what it was trained on."""
    once, twice = fit([runs(24)], Fitting(epochs=2)), fit([runs(24), runs(20), runs(24)], Fitting(epochs=2))
    assert once.report == twice.report
    assert all(torch.equal(a[0], b[0]) for a, b in zip(once.layers, twice.layers, strict=True))
    assert once_each([runs(5), runs(3, first=3)]).tolist() == [0, 1, 2, 3, 4, 7]


def test_a_seed_fixes_the_head_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    first, again, other = (fit([runs(24)], Fitting(epochs=2, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.layers, again.layers, strict=True))
    assert not torch.equal(first.layers[0][0], other.layers[0][0])


def test_the_head_has_about_a_thousand_parameters() -> None:
    assert golden().size == sum(part.numel() for layer in untrained(tuple(FEATURES)) for part in layer)
    assert 500 < golden().size < 1500


def spoilt(kind: str) -> list[Recording]:
    recording = runs(24)
    if kind == "few":
        return [runs(12)]
    if kind == "samplers":
        return [recording, runs(24, steps=9)]
    if kind == "models":
        return [recording, replace(recording, weights="1" * 64)]
    early = recording.record.switches
    first = early._replace(step=np.zeros_like(early.step))
    return [replace(recording, record=replace(recording.record, switches=first))]


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("few", "at least 16"),
        ("samplers", "one sampler"),
        ("models", "one model"),
        ("settled", "nothing to learn: each sample has 100% of its tokens at every step"),
    ],
)
def test_recordings_that_a_head_cannot_be_trained_on_are_refused(kind: str, advice: str) -> None:
    with pytest.raises(CdlmError, match=advice) as caught:
        fit(spoilt(kind), Fitting(epochs=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"share": 0.0}, {"share": 1.5}, {"epochs": 0}, {"lr": 0.0}, {"seed": -1}], ids=str)
def test_bad_fittings_are_refused(bad: dict) -> None:
    with pytest.raises(CdlmError, match="a halting head needs"):
        Fitting(**bad)


# --- the head and its file ---


def features(rows: int, seed: int) -> torch.Tensor:
    """Also far away, and not known."""
    drawn = 5 * torch.randn(rows, len(FEATURES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[0, 0], drawn[-1, 1], drawn[-1, 2] = torch.nan, torch.inf, -torch.inf
    return drawn


@given(rows=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_rows_answer_does_not_depend_on_the_rows_beside_it(rows: int, seed: int) -> None:
    head, x = golden(), features(rows, seed)
    answers, together = head(x), head.logits(x)
    assert ((answers > 0) & (answers < 1)).all()
    assert torch.allclose(answers, together.sigmoid())
    assert torch.equal(answers, torch.cat([head(row[None]) for row in x]))
    assert torch.equal(together, torch.cat([head.logits(row[None]) for row in x]))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(head.logits(x[order]), together[order])


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    digest = write_head(tmp_path, golden())
    again, found = read_head(tmp_path)
    assert found == digest
    assert torch.equal(again(features(9, 0)), golden()(features(9, 0)))
    assert (again.features, again.weights, again.settings) == (golden().features, "0" * 64, golden().settings)
    assert again.report == golden().report


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def lose(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def say_otherwise(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / ABOUT).read_text())
        (folder / ABOUT).write_text(json.dumps({**about, **changes}))

    return change


def of_another(folder: Path) -> None:
    write_head(folder.parent / "other", replace(golden(), mean=golden().mean + 1))
    (folder / WEIGHTS).write_bytes((folder.parent / "other" / WEIGHTS).read_bytes())


def not_numbers(folder: Path) -> None:
    write_head(folder, replace(golden(), mean=golden().mean * torch.nan))


def of_other_shapes(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "mean": tensors["mean"][:, None].repeat(1, 3)}, folder / WEIGHTS)
    say_otherwise(digest=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:8])(folder)


def of_no_scale(folder: Path) -> None:
    write_head(folder, replace(golden(), scale=0 * golden().scale))


@pytest.mark.parametrize(
    "damage",
    [cut, lose, of_another, not_numbers, of_other_shapes, of_no_scale,
     say_otherwise(features=["progress"]), say_otherwise(features=["a"] * 11),
     say_otherwise(settings=3), say_otherwise(digest=None)],
)  # fmt: skip
def test_damaged_heads_are_refused_in_one_line(damage: Callable[[Path], None], tmp_path: Path) -> None:
    write_head(tmp_path / "head", golden())
    damage(tmp_path / "head")
    with pytest.raises(CdlmError, match=r"damaged|train it again") as caught:
        Learned(str(tmp_path / "head"), 0.5)
    assert "\n" not in str(caught.value)


def test_other_folders_and_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match="train-halting"):
        Learned(str(tmp_path), 0.5)
    write_head(tmp_path, golden())
    say_otherwise(cdlm_halting_head=9)(tmp_path)
    with pytest.raises(CdlmError, match="version"):
        Stop(str(tmp_path), 0.5)


# --- the rules ---


def live(rule: Criterion, count: int = 12) -> list[tuple[int, bool, list[int]]]:
    loop = DiffusionLoop(Oracle(t_min=0.08, t_max=1.2), *diffusion(STEPS, rule), 5)
    out = {}
    for step in loop.steps(request(i) for i in range(count)):
        for row, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens.tolist(), strict=True):
            out[int(step.state.row[row])] = (int(step.state.step[row]) + 1, bool(step.halted[row]), tokens)
    return [out[i] for i in range(count)]


def replayed(rule: Criterion, count: int = 12) -> list[tuple[int, bool, list[int]]]:
    run = replay(runs(count), rule)
    return list(zip(run.steps.tolist(), run.halted.tolist(), run.tokens.tolist(), strict=True))


@pytest.mark.parametrize(
    "rule", [Learned(PATH, 0.5), Learned(PATH, 0.85), Stop(PATH, 0.08), For(Learned(PATH, 0.6), 2) & Patience(1)]
)
def test_a_replayed_rule_is_the_live_run(rule: Criterion) -> None:
    found = replayed(rule)
    assert found == live(rule)
    assert 1 < sum(steps for steps, *_ in found) / len(found) < STEPS


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_head_of_a_masked_model_replays_too(temperature: float, tmp_path: Path) -> None:
    recording = masked(LLaDA(8), temperature)
    names = features_in(recording)
    assert "noise" not in names
    assert "entropy" in names
    zero, one = torch.zeros(len(names), dtype=torch.float64), torch.ones(len(names), dtype=torch.float64)
    path = str(tmp_path)
    write_head(tmp_path, Head(names, zero, one, untrained(names, 3), recording.weights, {}, {}))
    with pytest.raises(CdlmError, match="other weights"):
        for_transformers(Learned(path, 0.5))
    inside = 0
    for rule in [Learned(path, threshold) for threshold in np.linspace(0.3, 0.7, 21).tolist()]:
        run, samples = replay(recording, rule), masked_run(unmasking(LLaDA(8), rule, temperature))
        assert run.steps.tolist() == samples.steps.tolist()
        assert np.array_equal(run.tokens, samples.tokens)
        inside += 1 < run.steps.mean() < 8
    assert inside


@pytest.mark.parametrize("name", ["Learned", "Stop"])
def test_a_looser_setting_never_halts_later(name: str) -> None:
    steps = np.array([replay(runs(24), rule).steps for rule in sweep(f"{name}(..., path={PATH!r})", STEPS)])
    assert (np.diff(steps, axis=0) <= 0).all()
    assert (steps[0] > steps[-1]).all()


def test_the_ends_of_the_settings() -> None:
    assert not replay(runs(24), Learned(PATH, 1.0)).halted.any()
    assert (replay(runs(24), Learned(PATH, 0.0)).steps == 1).all()
    assert not replay(runs(24), Stop(PATH, 0.0)).halted.any()
    assert (replay(runs(24), Stop(PATH, 1e6)).steps == 1).all()


def test_a_row_halts_where_its_expected_loss_is_worth_the_calls() -> None:
    rule = Stop(PATH, 0.08)
    for step in DiffusionLoop(Oracle(t_min=0.08, t_max=1.2), *diffusion(STEPS, rule), 5).steps([request(2)]):
        left = (STEPS - 1 - int(step.state.step[0])) / STEPS
        assert bool(step.halted[0]) == (float(step.info["expected_loss"][0]) <= 0.08 * left)


# --- whom it is refused to ---


def test_a_head_is_refused_for_other_weights_and_another_sampler() -> None:
    recording = runs(12)
    for rule in (Learned(PATH, 0.9), FromStep(Patience(2) | For(Stop(PATH, 0.1), 2), 3)):
        with pytest.raises(CdlmError, match="other weights"):
            replay(replace(recording, weights="1" * 64), rule)
        with pytest.raises(CdlmError, match="steps=16, and this one has steps=9"):
            replay(runs(12, steps=9), rule)
        more = {**recording.settings, "commit": "Threshold(0.9)"}
        with pytest.raises(CdlmError, match="commit=its default"):
            replay(replace(recording, settings=more), rule)
        replay(replace(recording, settings={**recording.settings, "length": 99}), rule)


def test_a_setting_is_refused_with_a_head_that_was_trained_since(tmp_path: Path) -> None:
    write_head(tmp_path, golden())
    rule = Learned(str(tmp_path), 0.9)
    assert rule == Learned(str(tmp_path), 0.9, rule.digest)
    write_head(tmp_path, replace(golden(), mean=golden().mean + 1))
    with pytest.raises(CdlmError, match="trained since"):
        Learned(str(tmp_path), 0.9, rule.digest)
    assert Learned(str(tmp_path), 0.9) != rule


# --- the command ---


def say(*words: object) -> None:
    cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with recordings of it, and its head."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    with_tokenizer().save_pretrained(folder)
    common = ("--steps", 8, "--length", 10, "--quiet", "true")
    say("sample", folder, "--n", 40, *common, "--record", folder / "kept")
    say("train-halting", folder / "kept", folder, "--n", 32, "--epochs", 30, "--lr", 0.01, "--share", 0.3, "--quiet")
    return folder


def test_train_sample_and_replay_on_the_command_line(run: Path, tmp_path: Path, capsys) -> None:
    say("train-halting", run / "kept", tmp_path / "head", "--n", 32, "--epochs", 3, "--share", 0.3)
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "head" / ABOUT).read_text())["report"]
    assert f"AUC {report['auc']:.4f}" in shown.out
    assert (report["samples"], report["held_out"]) == (32, 8)
    session = api.open_session(run, steps=8)
    (file,) = (run / "kept").glob("*.safetensors")
    recording = Recording.read(file)
    for rule in sweep(f"Learned(..., path={str(run)!r})", 8)[::6]:
        samples = session.with_criterion(rule).run(session.requests(n=40, length=10))
        expected = replay(recording, rule)
        assert samples.nfe.tolist() == expected.nfe.tolist()
        assert np.array_equal(samples.tokens, expected.tokens)


def test_a_calibrated_head_holds_wherever_its_folder_is(run: Path, tmp_path: Path, monkeypatch) -> None:
    model = api.load(run)
    entry = Calibration(
        {"steps": 8}, f"Learned(path={str(run)!r}, threshold=0.9)", "nats", "", Goal(0.1), 9, 0, None, []
    )
    write_calibration(run, model.need_fingerprint(), model.has_weights, entry)
    (moved := tmp_path / "moved").mkdir()
    for name in (ABOUT, WEIGHTS, "halting.json"):
        (moved / name).write_bytes((run / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    rule = calibrated_rule(Path("moved"), model.has_weights, {"steps": 8})
    assert rule == "Learned(path='moved', threshold=0.9)"
    assert isinstance(parse_criterion(rule), Learned)
    outside = replace(entry, rule="Learned(path='.', threshold=0.9)")
    write_calibration(run, model.need_fingerprint(), model.has_weights, outside)
    assert f"path={str(tmp_path)!r}" in calibrated_rule(run, model.has_weights, {"steps": 8})
    (run / "halting.json").unlink()


def test_mistakes_on_the_command_line(run: Path, tmp_path: Path, capsys) -> None:
    other, rule = tmp_path / "other", f"Learned({str(run)!r}, 0.9)"
    with_tokenizer(seed=1).save_pretrained(other)
    swept = f"Stop(..., path={str(run)!r})"
    capsys.readouterr()
    for words, advice in (
        (("sample", other, "--steps", 8, "--halt", rule), "other weights"),
        (("sample", run, "--steps", 9, "--halt", rule), "steps=8, and this one has steps=9"),
        (("sample", run, "--steps", 8, "--grid", "LogT()", "--halt", rule), "grid=LogT()"),
        (("calibrate", other, "--steps", 8, "--rule", swept), "other weights"),
        (("compare", other, "--steps", 8, "--rules", swept, "--out", tmp_path / "c"), "other weights"),
        (("sample", run, "--halt", f"Learned({str(tmp_path)!r}, 0.9)"), "has no halting_head.json"),
        (("sample", run, "--halt", f"Learned({str(run)!r}, 2.0)"), "0 <= threshold <= 1"),
        (("sample", run, "--halt", f"Stop({str(run)!r}, -1.0)"), "price >= 0"),
        (("train-halting", tmp_path, tmp_path / "out"), "holds no recordings"),
        (("train-halting", run / "kept", tmp_path / "out", "--n", 3), "at least 16"),
        (("train-halting", run / "kept", tmp_path / "out", "--n", 0), "must be >= 1"),
        (("train-halting", run / "kept", run / "config.json"), "cannot write"),
        (("train-halting", run / "kept", run / "kept"), "is the folder of the recordings"),
    ):
        with pytest.raises(SystemExit) as caught:
            say(*words)
        said = capsys.readouterr()
        assert caught.value.code == 2
        assert advice in said.err, said.err
        assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert POSITIONS == runs(12).tokens.shape[1]
