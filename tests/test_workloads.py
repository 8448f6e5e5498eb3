"""Workloads: seeded and named, made of held-out text alone, compared with the same rows, and refused where they are too
long."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_toys import random_judge
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TEXT, autoregressive_with_tokenizer, masked_with_tokenizer, system, tokenizer, with_tokenizer

from cdlm import api
from cdlm.cli import main as cli
from cdlm.core.errors import CdlmError
from cdlm.core.stats import APART
from cdlm.data import arithmetic, sources
from cdlm.data.sources import Source, Stories
from cdlm.data.store import DocumentRows, FilledRows, PackedRows, build_store
from cdlm.data.tokenizer import train_tokenizer
from cdlm.evaluation.bench import OWN_ROWS, Bench, Outcome, check_answers
from cdlm.evaluation.compare import FULL, PLAIN, Comparison, markdown
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.evaluation.metrics.diversity import sample_entropy
from cdlm.evaluation.texts import RealText, read_texts
from cdlm.evaluation.workloads import WORKLOADS, Arithmetic, MixedLengths, MixedPrompts, Work, Workload
from cdlm.halting import FixedSteps, Patience
from cdlm.halting.calibration import Goal
from cdlm.runs import caches
from cdlm.runs.config import parse_run
from cdlm.sampling.recordings import write_recording
from cdlm.sampling.requests import Request
from cdlm.sampling.session import Session

LENGTH = 64
ROWS = {"pack": PackedRows, "document": DocumentRows, "filled": FilledRows}
STORIES, PROBLEMS = Stories(4000), sources.Arithmetic(300, steps=(1, 2, 3), largest=20)


@cache
def speech(source: Source) -> Any:
    return train_tokenizer(source.documents("train"), 430)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real text of a run, by the kind of its rows."""
    folder = tmp_path_factory.mktemp("text")

    def made(rows: str = "pack", source: Source = STORIES, length: int = LENGTH) -> RealText:
        store = build_store(source, "valid", speech(source), folder)
        return RealText(ROWS[rows](store, length), None, speech(source), source)

    return made


def same(a: Request, b: Request) -> bool:
    valid = (a.valid is None and b.valid is None) or bool((a.valid == b.valid).all())  # type: ignore[union-attr]
    return a.index == b.index and bool((a.tokens == b.tokens).all() and (a.given == b.given).all()) and valid


KINDS = [
    (MixedPrompts(), "pack"), (MixedPrompts(), "document"), (MixedPrompts(), "filled"), (MixedLengths(), "pack"),
    (MixedPrompts(0.2, 0.7, "prefix"), "pack"), (MixedLengths(2, 30), "document"), (MixedLengths(), "filled"),
    (Arithmetic(), "document"), (Arithmetic((2, 1)), "filled"),
]  # fmt: skip


def work_of(text: Any, workload: Workload, rows: str, n: int = 8, seed: int = 0) -> Work:
    source = PROBLEMS if isinstance(workload, Arithmetic) else STORIES
    return workload.draw(text(rows, source), n, seed)


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "rows"), KINDS)
def test_fewer_samples_are_the_beginning_of_more_and_a_seed_gives_the_same_ones(
    text: Any, workload: Workload, rows: str
) -> None:
    many, few = work_of(text, workload, rows, 12), work_of(text, workload, rows, 5)
    assert len(few.requests) == len(few.real) == 5
    assert all(same(a, b) for a, b in zip(few.requests, many.requests, strict=False))
    assert np.array_equal(few.real, many.real[:5])
    assert list(few.answers) == list(many.answers[: len(few.answers)])
    other = work_of(text, workload, rows, 12, seed=1)
    assert not all(same(a, b) for a, b in zip(other.requests, many.requests, strict=True))
    assert not np.array_equal(other.real, many.real)


@pytest.mark.parametrize(("workload", "rows"), KINDS)
def test_every_request_has_something_open_its_given_tokens_are_real_and_the_open_ones_are_not_told(
    text: Any, workload: Workload, rows: str
) -> None:
    work = work_of(text, workload, rows, 12)
    for i, (request, real) in enumerate(zip(work.requests, work.real, strict=True)):
        open_, tokens = ~request.given.numpy(), request.tokens.numpy()
        assert request.index == i
        assert open_.any()
        valid = np.ones(LENGTH, bool) if request.valid is None else request.valid.numpy()
        assert not (open_ & ~valid).any()
        assert np.array_equal(tokens[~open_ & valid], real[~open_ & valid])
        assert not tokens[open_].any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("workload", [MixedPrompts(), MixedLengths()])
def test_rows_are_those_of_the_held_out_text_each_once(text: Any, workload: Workload, rows: str) -> None:
    real_text = text(rows)
    there = [row.tokens.tolist() for row in (real_text.held_out[i] for i in range(len(real_text.held_out)))]
    work = workload.draw(real_text, len(there), 3)
    assert sorted(work.real.tolist()) == sorted(there)
    assert work.real.tolist() != there
    with pytest.raises(CdlmError, match=f"has {len(there)} of them, got n={len(there) + 1}: take"):
        workload.draw(real_text, len(there) + 1, 3)


def test_held_out_text_is_no_training_text(text: Any, tmp_path: Path) -> None:
    trained = build_store(STORIES, "train", speech(STORIES), tmp_path)
    seen = DocumentRows(trained, LENGTH)
    known = {tuple(seen[i].tokens.tolist()) for i in range(len(seen))}
    drawn = {tuple(row) for row in MixedPrompts().draw(text("document"), 20, 0).real.tolist()}
    assert not drawn & known
    trained_on = {document.split("\n")[1] for document in PROBLEMS.documents("train")}
    problems = [document_of(r, real) for r, real in pairs(work_of(text, Arithmetic(), "filled", 40))]
    assert not {solution for _, solution in problems} & trained_on


def pairs(work: Work) -> Any:
    return zip(work.requests, work.real, strict=True)


def document_of(request: Request, real: np.ndarray) -> tuple[str, str]:
    """Prompt and solution of a problem, as text."""
    decode, given = speech(PROBLEMS).decode, request.given.numpy()
    solution = decode(real[~given], skip_special_tokens=True)
    return decode(real[given]), solution


@given(
    least=st.floats(0, 0.99), most=st.floats(0, 0.99), where=st.sampled_from(["subset", "prefix"]),
    seed=st.integers(0, 2**40), rows=st.sampled_from(["pack", "document", "filled"]),
)  # fmt: skip
@settings(max_examples=40)
def test_shares_are_in_range(text: Any, least: float, most: float, where: str, seed: int, rows: str) -> None:
    least, most = sorted((least, most))
    for request in MixedPrompts(least, most, where).draw(text(rows), 6, seed).requests:
        valid = np.ones(LENGTH, bool) if request.valid is None else request.valid.numpy()
        fixed, size = request.given.numpy() & valid, int(valid.sum())
        assert int(least * size) <= fixed.sum() <= min(most * size + 1e-9, size - 1)
        if where == "prefix":
            assert fixed[: fixed.sum()].all()


def test_shares_are_spread_evenly_and_subsets_over_all_places(text: Any) -> None:
    real = text(length=16)
    work = MixedPrompts(0.0, 0.95).draw(real, len(real.held_out), 0)
    fixed = np.stack([request.given.numpy() for request in work.requests])
    m = len(fixed)
    assert m > 80
    counts = np.bincount(fixed.sum(1), minlength=16)
    assert set(np.flatnonzero(counts)) == set(range(16))  # 0 to 15 of 16: 0.95 leaves one open
    deviation = 0.95 * 16 / np.sqrt(12 * m)
    assert abs(fixed.sum(1).mean() - (0.95 * 16 / 2 - 0.5)) < 4 * deviation
    assert abs(fixed.mean(0) - fixed.mean()).max() < 4 * 0.5 / np.sqrt(m)


@given(least=st.integers(1, LENGTH), most=st.integers(1, LENGTH), seed=st.integers(0, 2**40))
@settings(max_examples=40)
def test_lengths_are_in_range_and_all_of_a_text_is_open(text: Any, least: int, most: int, seed: int) -> None:
    least, most = sorted((least, most))
    for request in MixedLengths(least, most).draw(text(), 6, seed).requests:
        assert request.valid is not None
        size = int(request.valid.sum())
        assert least <= size <= most
        assert request.valid[:size].all()
        assert (request.valid == ~request.given).all()


def test_lengths_reach_both_ends(text: Any) -> None:
    sizes = {int((~r.given).sum()) for r in MixedLengths(4, 7).draw(text(), 40, 0).requests}
    assert sizes == {4, 5, 6, 7}
    real = text(length=16)
    assert max(int((~r.given).sum()) for r in MixedLengths().draw(real, len(real.held_out), 0).requests) == 16


def test_of_a_document_row_the_padding_is_no_text(text: Any) -> None:
    for rows in ("document", "filled"):
        real_text = text(rows)
        for request, real in pairs(MixedPrompts().draw(real_text, 12, 0)):
            assert request.valid is not None
            size = int(request.valid.sum())
            assert real[:size].tolist().count(real_text.eos_id) == (1 if real_text.eos_id in real else 0)
            assert size == LENGTH or real[size - 1] == real_text.eos_id


@pytest.mark.parametrize("rows", ["document", "filled"])
def test_problems_take_turns_in_difficulty_and_their_answers_are_right(text: Any, rows: str) -> None:
    work = work_of(text, Arithmetic((1, 3)), rows, 10)
    for i, ((request, real), answer) in enumerate(zip(pairs(work), work.answers, strict=True)):
        prompt, solution = document_of(request, real)
        assert prompt == request.prompt
        assert prompt.endswith(arithmetic.SEPARATOR)
        assert solution.count("=") == (1, 3)[i % 2]
        assert arithmetic.is_correct(solution, answer)
        assert not request.given[len(request.given) - 1]  # the solution has the rest of the row
    texts = [document_of(*pair)[1] for pair in pairs(work)]
    assert work.right(texts).tolist() == [1.0] * 10
    assert work.right(["#### 0"] * 10).sum() == 0
    assert work.part(slice(2, 5)).right(texts[2:5]).tolist() == [1.0] * 3


# --- names and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workload", [MixedPrompts(), MixedPrompts(0.1, 0.5, "prefix"), MixedLengths(), MixedLengths(3, 9), Arithmetic((4,))]
)
def test_a_text_is_the_workload(workload: Workload) -> None:
    assert WORKLOADS.parse(repr(workload)) == workload
    assert WORKLOADS.parse(workload) is workload


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("MixedPrompt()", r"no workload 'MixedPrompt' \(did you mean MixedPrompts\?\)"),
        ("MixedPrompts", "written as a call in a workload"),
        ("MixedPrompts(0.5, 1.0)", "share < 1, got 1.0"),
        ("MixedPrompts(-0.1)", "0 <= share < 1, got -0.1"),
        ("MixedPrompts(0.5, 0.2)", "least <= most, got 0.5 and 0.2"),
        ("MixedPrompts(given='all')", "one of subset, prefix"),
        ("MixedLengths(0)", ">= 1, got 0"),
        ("MixedLengths(8, 4)", "most >= 8, got 4"),
        ("Arithmetic(())", "one or more numbers of equations"),
        ("Arithmetic((0,))", ">= 1, got 0"),
    ],
)
def test_mistakes_are_one_line(word: str, advice: str) -> None:
    with pytest.raises(CdlmError, match=advice) as caught:
        WORKLOADS.parse(word)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("workload", "rows", "source", "advice"),
    [
        (MixedLengths(4, 128), "pack", STORIES, "texts of 128 tokens, and the model has 64 positions: set most=64 or"),
        (MixedLengths(65), "pack", STORIES, "the model has 64 positions: set least=64 or less"),
        (Arithmetic(), "filled", STORIES, "this one is on Stories: take another workload"),
        (Arithmetic(), "pack", PROBLEMS, "needs rows of one problem each"),
        (Arithmetic((1, 9)), "filled", PROBLEMS, r"the model has 64 positions: set steps=\(1,\)"),
        (Arithmetic((12,)), "filled", PROBLEMS, "the model has 64 positions: train one with a larger length"),
    ],
)
def test_a_workload_that_does_not_suit_the_model_is_refused(
    text: Any, workload: Workload, rows: str, source: Source, advice: str
) -> None:
    with pytest.raises(CdlmError, match=advice) as caught:
        workload.draw(text(rows, source), 8, 0)
    assert "\n" not in str(caught.value)


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders of one text, and a judge; nothing is trained."""
    made = tmp_path_factory.mktemp("workloads")
    (made / "text.txt").write_text("\n".join(TEXT * 30))
    random_judge().save(made / "judge")
    argv = [
        "--source", "Files", "--source.paths", json.dumps([str(made / "text.txt")]), "--length", "12",
        "--judge_share=0", "--unread_share=0", "--cache", str(made / "cache"),
    ]  # fmt: skip
    models = {"toy": with_tokenizer(), "masked": masked_with_tokenizer(), "left": autoregressive_with_tokenizer()}
    caches.mark(str(made / "cache"))
    for name, model in models.items():
        model.save_pretrained(made / name)
        (made / name / "config.yaml").write_text(parse_run(argv).to_yaml())
    return made


def bench_of(place: Path, workload: Workload | str | None, n: int = 10, model: str = "toy", **more: Any) -> Bench:
    steps: dict[str, Any] = {"steps": 12} if model == "toy" else {}
    session = api.open_session(place / model, device="cpu", **steps)
    return api.open_bench(session, n, workload=workload, judge=str(place / "judge"), **more)


@pytest.fixture(scope="module")
def bench(place: Path) -> Bench:
    return bench_of(place, MixedPrompts(), 20)


def test_samples_keep_what_was_given(bench: Bench) -> None:
    assert bench.work is not None
    full = bench.full_run
    assert full.given.any()
    assert np.array_equal(full.tokens[full.given], bench.work.real[full.given])
    assert (full.tokens != bench.work.real).any()


def test_the_real_text_is_that_of_the_same_rows_in_the_same_places(bench: Bench) -> None:
    assert bench.work is not None
    reference = bench.reference
    assert reference.corpus.name == OWN_ROWS
    scores, speaks, end = reference.scores, tokenizer(), str(tokenizer().eos_token)
    i = int(bench.full_run.given.sum(1).argmax())
    given_, real = bench.full_run.given[i], bench.work.real[i]
    edges = np.flatnonzero(np.diff(given_.astype(int), prepend=0, append=0))
    at = [len(str(speaks.decode(real[:edge])).replace(end, "\n")) for edge in edges]
    line = str(speaks.decode(real)).replace(end, "\n")
    alone = ar_nll(bench.scorer.judge, [line], [list(zip(at[::2], at[1::2], strict=True))])
    assert scores.weight[i] == alone.tokens < ar_nll(bench.scorer.judge, [line]).tokens
    assert scores.total[i] == pytest.approx(alone.text_nats[0])
    assert reference.corpus.tokens[i] == real[~given_].tolist()
    assert bench.described_gap["to"] == OWN_ROWS


def test_the_gap_of_the_real_rows_to_themselves_is_nothing_and_has_no_noise(bench: Bench) -> None:
    """It is paired: of text apart from the samples it would have noise."""
    assert bench.work is not None
    copied = replace(bench, full_run=replace(bench.full_run, tokens=bench.work.real))
    assert copied.gap.interval95 == (0, 0)
    real = bench.reference.scores
    assert (real.bootstrap() - real.bootstrap(APART)).interval95 != (0, 0)


def test_halves_have_their_own_real_rows(bench: Bench) -> None:
    assert bench.work is not None
    first, second = bench.halves()
    assert first.work is not None
    assert second.work is not None
    assert np.array_equal(np.concatenate([first.work.real, second.work.real]), bench.work.real)
    assert np.array_equal(second.reference.scores.total, bench.reference.scores.total[10:])


@pytest.mark.parametrize("workload", [MixedPrompts(), MixedLengths(2)])
def test_the_table_of_a_comparison(place: Path, workload: Workload) -> None:
    made = Comparison(bench_of(place, workload, 12), Goal(0.9), "ar-nll", "toy", live=4, fewer=(3,))
    points = made.table({"FixedSteps": [FixedSteps(11), FixedSteps(4)], "Patience": [Patience(3)]})
    (full,) = (p for p in points if p.family == FULL)
    (real,) = (p for p in points if p.family == OWN_ROWS)
    assert {p.workload for p in points} == {repr(workload)}
    assert not any(p.family.startswith("real text") for p in points if p is not real)
    assert (full.change, full.agreement, full.frechet) == (0, 1, None)
    assert (real.calls, real.right) == (None, None)
    (late, early) = (p for p in points if p.family == "FixedSteps")
    assert (late.calls, early.calls) == (11, 4)
    assert {duel.rival for duel in early.duels} == {"fixed step", "fewer steps", "ancestral"}
    assert all(duel.calls == 4 for duel in early.duels)
    assert PLAIN in {p.family for p in points}
    page = markdown(points, Goal(0.9), "ar-nll")
    assert f"The samples are of {workload!r}." in page
    assert "| right |" not in page


def test_entropy_is_that_of_what_was_generated(bench: Bench) -> None:
    made = Comparison(bench, Goal(0.9), "agreement", "toy", live=0, with_rivals=False)
    half = made.reporting.full_run
    found = made.point(FULL, "Never()", Outcome(half.tokens, half.nfe))
    rows = [row[~fixed].tolist() for row, fixed in zip(half.tokens, half.given, strict=True)]
    assert found.entropy_sample == pytest.approx(sample_entropy(rows))


def test_a_fixed_step_at_equal_calls_where_samples_have_budgets_of_their_own(place: Path) -> None:
    bench = bench_of(place, MixedPrompts(), 20, "masked")
    spent = [bench.under(FixedSteps(step), 0).nfe.mean() for step in range(1, 13)]
    assert len({*bench.full_calls.tolist()}) > 1
    assert spent[-1] == bench.full_calls.mean()
    for calls in (1.0, 2.5, 4.0, float(spent[-1])):
        best = min(abs(each - calls) for each in spent)
        assert abs(spent[bench.step_at(calls) - 1] - calls) == pytest.approx(best)


def test_a_comparison_of_a_masked_model(place: Path) -> None:
    bench = bench_of(place, MixedPrompts(), 16, "masked")
    made = Comparison(bench, Goal(0.9), "agreement", "masked", live=4, fewer=(3,))
    points = made.table({"FixedSteps": [FixedSteps(6), FixedSteps(2)]})
    (full,) = (p for p in points if p.family == FULL)
    open_ = (~bench.part(slice(8, 16)).full_run.given).sum(1)
    assert full.calls == pytest.approx(open_.mean())  # one call for each open position
    assert any(p.duels for p in points)


def test_a_model_that_fills_no_holes_takes_prefixes(place: Path) -> None:
    session = api.open_session(place / "left", device="cpu")
    requests, _ = api.ask(session, 4, workload=MixedPrompts(given="prefix"))
    samples = session.run(requests)
    assert (samples.nfe <= 12).all()
    holes, _ = api.ask(session, 4, workload=MixedPrompts())
    with pytest.raises(CdlmError, match="fills no holes"):
        session.run(holes)


def test_recordings_of_other_requests_are_refused(place: Path, bench: Bench, tmp_path: Path) -> None:
    write_recording(bench.steps_taken, bench.session, tmp_path)
    again = bench_of(place, MixedPrompts(), 9, recordings=tmp_path)
    assert np.array_equal(again.full_run.tokens, bench.full_run.tokens[:9])
    assert np.array_equal(again.under(Patience(2), 0).nfe, bench.under(Patience(2), 0).nfe[:9])
    check_answers("nats", bench.work)
    for work in (bench.work, None):
        with pytest.raises(CdlmError, match="answers is a measure of problems"):
            check_answers("answers", work)
    with pytest.raises(CdlmError, match="answers is a measure of problems"):
        bench.loss(Outcome(bench.full_run.tokens, bench.full_run.nfe), "answers", True)
    for other in (None, MixedPrompts(0.0, 0.9), MixedLengths(), MixedPrompts(given="prefix")):
        with pytest.raises(CdlmError, match="no recording of 9 samples with"):
            bench_of(place, other, 9, recordings=tmp_path)


def test_answers_are_marked_in_the_table(tmp_path: Path) -> None:
    """Of a model of problems: each half has its own answers, and real text has all of them right."""
    argv = [
        "--source", "Arithmetic", "--source.n", "300", "--source.largest", "20", "--length", "64", "--rows", "filled",
        "--judge_share=0", "--unread_share=0", "--masking", "Completion()", "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    with_tokenizer_of(speech(PROBLEMS)).save_pretrained(tmp_path / "toy")
    caches.mark(str(tmp_path / "cache"))
    (tmp_path / "toy" / "config.yaml").write_text(parse_run(argv).to_yaml())
    random_judge().save(tmp_path / "judge")
    session: Session = api.open_session(tmp_path / "toy", device="cpu", steps=4)
    bench = api.open_bench(session, 8, workload="Arithmetic((1, 2))", judge=str(tmp_path / "judge"))
    assert bench.work is not None
    assert bench.right(Outcome(bench.work.real, bench.full_run.nfe)) == 1
    for half in bench.halves():
        assert half.work is not None
        assert half.right(Outcome(half.work.real, half.full_run.nfe)) == 1
        assert half.right(Outcome(half.work.real[::-1].copy(), half.full_run.nfe)) != 1
    all_right = replace(bench, full_run=replace(bench.full_run, tokens=bench.work.real))
    some = bench.work.real.copy()
    some[:3] = bench.full_run.tokens[:3]  # an untrained model's
    lost = all_right.loss(Outcome(some, bench.full_run.nfe), "answers", True)
    assert (lost.value, lost.bound) == (3 / 8, "binomial")
    won = bench.loss(Outcome(bench.work.real, bench.full_run.nfe), "answers", True)
    assert won.value == 0
    made = Comparison(bench, Goal(0.9), "agreement", "toy", live=0, fewer=(2,), with_rivals=False)
    points = made.table({"FixedSteps": [FixedSteps(3)]})
    assert all(p.right == 0 for p in points if p.family != OWN_ROWS)
    assert "| right |" in markdown(points, Goal(0.9), "agreement")


def with_tokenizer_of(speaks: Any) -> Any:
    made = system(len(speaks))
    made.tokenizer, made.length, made.ends = speaks, 64, True
    return made.eval()


# --- the commands -----------------------------------------------------------------------------------------------------


def say(*words: object) -> None:
    cli.main([str(word) for word in words])


def test_sample_files_carry_what_was_given(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    say("sample", place / "toy", "--workload", "MixedPrompts()", "--n", 6, "--steps", 4, "--out", file, "--quiet")
    session = api.open_session(place / "toy", device="cpu", steps=4)
    requests, work = api.ask(session, 6, workload="MixedPrompts()")
    assert work is not None
    entries = read_texts(file)
    for entry, request, real in zip(entries, requests, work.real, strict=True):
        assert entry.tokens is not None
        fixed = request.given.numpy()
        assert np.array_equal(np.array(entry.tokens)[fixed], real[fixed])
        assert bool(entry.given) == fixed.any()
    samples = session.run(requests)
    assert [entry.text for entry in entries] == samples.texts
    assert [entry.given for entry in entries] == samples.spans


def test_a_terminal_marks_what_was_given(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say("sample", place / "toy", "--workload", "MixedPrompts()", "--n", 6, "--steps", 4, "--device", "cpu")
    shown = re.split(r"--- sample .*\n", capsys.readouterr().out)[1:]
    session = api.open_session(place / "toy", device="cpu", steps=4)
    samples = session.run(api.ask(session, 6, workload="MixedPrompts()")[0])
    assert [re.sub(r"[\[\]]", "", text).strip() for text in shown] == [text.strip() for text in samples.texts]
    for text, sample in zip(shown, samples, strict=True):
        assert re.findall(r"\[(.*?)\]", text, re.DOTALL) == [sample.text[start:end] for start, end in sample.given]


def test_compare_on_the_command_line(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    say("compare", place / "toy", "--workload", "MixedLengths(least=3)", "--rules", "Patience", "--steps", 6, "--n", 8,
        "--fewer", 2, "--max-loss", "50%", "--measure", "agreement", "--judge", place / "judge", "--live", 0,
        "--out", tmp_path, "--device", "cpu")  # fmt: skip
    assert "The samples are of MixedLengths(least=3, most=None)." in capsys.readouterr().out
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert {row["workload"] for row in rows} == {"MixedLengths(least=3, most=None)"}


def test_a_calibration_holds_for_its_workload_alone(place: Path, tmp_path: Path) -> None:
    run = place / "toy"
    how = ("--steps", 12, "--device", "cpu", "--quiet")
    say("calibrate", run, "--workload", "MixedPrompts()", "--rule", "FixedSteps", "--max-loss", "99%", "--confidence",
        0.9, "--measure", "agreement", "--n", 20, "--judge", place / "judge", *how)  # fmt: skip
    say("sample", run, "--workload", "MixedPrompts()", "--n", 3, *how, "--halt", "auto", "--out", tmp_path / "a.jsonl")
    assert all(entry.nfe is not None and entry.nfe < 12 for entry in read_texts(tmp_path / "a.jsonl"))
    for other in ([], ["--workload", "MixedLengths()"]):
        with pytest.raises(SystemExit):
            say("sample", run, *other, "--n", 3, *how, "--halt", "auto", "--out", tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("sample", "--workload", "MixedLengths(4, 13)"), "the model has 12 positions: set most=12 or less"),
        (("compare", "--workload", "MixedLengths(4, 13)", "--live", 0), "the model has 12 positions: set most=12"),
        (("calibrate", "--workload", "MixedLengths(4, 13)"), "the model has 12 positions: set most=12"),
        (("sample", "--workload", "Arithmetic()"), "this one is on Files"),
        (("sample", "--workload", "Mixed()"), "there is no workload 'Mixed'"),
        (("sample", "--workload", "MixedPrompts()", "--prompt", "a"), "leave out prompt"),
        (("sample", "--workload", "MixedPrompts()", "--length", 9, "--chat"), "leave out length and chat"),
        (("compare", "--workload", "MixedPrompts()", "--length", 9, "--live", 0), "got length=9"),
        (("sample", "--workload", "MixedPrompts()", "--n", 0), "n >= 1, got 0"),
        (("sample", "--workload", "MixedPrompts()", "--n", 10**6), "take fewer samples"),
    ],
)
def test_mistakes_end_with_one_line(place: Path, words: tuple, advice: str, capsys: Any) -> None:
    command, *rest = words
    with pytest.raises(SystemExit) as caught:
        say(command, place / "toy", "--device", "cpu", *rest)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line != "device: cpu"]
    assert caught.value.code == 2
    assert advice in lines[-1]
    assert all(line.startswith("cdlm: ") for line in lines)
    assert not shown.out


def test_a_model_without_a_run_has_no_workload() -> None:
    session = api.open_session(with_tokenizer(), device="cpu")
    with pytest.raises(CdlmError, match="has no run folder"):
        api.ask(session, 2, workload=MixedPrompts())
    assert len(api.ask(session, 2)[0]) == 2
