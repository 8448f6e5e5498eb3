"""Laws of recordings: a replayed rule is the live run of that rule; a file gives back what was written."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from setups import diffusion
from toys import with_tokenizer

from cdlm import api
from cdlm.cli import main as cli
from cdlm.continuous.sampler import Diffusion, DiffusionLoop
from cdlm.continuous.solvers import Euler, Heun, Solver, TorchDiffEq
from cdlm.core.errors import CdlmError
from cdlm.core.types import Decision, StepState
from cdlm.halting import (
    KL,
    AngleConvergence,
    Criterion,
    Entropy,
    FixedPoint,
    FixedSteps,
    For,
    FromStep,
    JoT,
    Mutual,
    Never,
    NormConvergence,
    Patience,
    Prophet,
    SchED,
    StableAndConfident,
    Stateless,
)
from cdlm.halting.replay import replay
from cdlm.halting.signals import RECORDED
from cdlm.recording.file import Recording, read_folder
from cdlm.recording.record import Record
from cdlm.recording.writer import Recorder
from cdlm.sampling.recordings import recording_of
from cdlm.sampling.requests import Request

M, N, STEPS = 6, 5, 14
RULES = (
    Never(),
    Patience(3),
    Entropy(0.3),
    KL(0.05),
    KL(0.05, warmup=0.5),
    NormConvergence(0.1),
    FixedPoint(0.02, 2),
    AngleConvergence(0.05),
    StableAndConfident(2, 0.5),
    Prophet(3.0, 2.0, 1.0),
    SchED(3.0, 1.0),
    SchED(3.0, 1.0, "exp", 2.0, "paper"),
    Mutual(0.3, 3, 0.3),
    FixedSteps(5),
    For(Entropy(0.8), 2) & Patience(2) | FromStep(NormConvergence(0.3), 9),
)


def requests() -> list[Request]:
    """Open rows, a prompt, and a padded row."""
    tokens, place = torch.arange(N) % 7, torch.arange(N)
    prompts = [0, 0, 2, 0, 1, 0]
    return [Request(i, tokens, (place < prompts[i]) | (place > 3) & (i == 5), (place < 4) | (place >= 0) & (i != 5))
            for i in range(M)]  # fmt: skip


@cache
def recorded(solver: Solver) -> Recording:
    asked = requests()
    tokens = torch.stack([request.tokens for request in asked])
    tape = Recorder(RECORDED, STEPS, tokens)
    for step in DiffusionLoop(Oracle(), *diffusion(STEPS, solver=solver, record=Diffusion.recorded), 4).steps(asked):
        tape.write(step, step.state.row.numpy())
        tokens[step.state.row[step.done]] = step.tokens
    given, valid = (np.stack([getattr(r, name).numpy() for r in asked]) for name in ("given", "valid"))
    about = {"steps": STEPS, "solver": repr(solver)}
    return Recording(tape.record(), tokens.numpy(), given, valid, np.arange(M), 0, "oracle", "0" * 64, about)


def live(solver: Solver, rule: Criterion) -> tuple[dict[int, tuple], Recorder]:
    out, asked = {}, requests()
    tape = Recorder(RECORDED, STEPS, torch.stack([request.tokens for request in asked]))
    for step in DiffusionLoop(Oracle(), *diffusion(STEPS, rule, solver=solver, record=Diffusion.recorded), 4).steps(
        asked
    ):
        tape.write(step, step.state.row.numpy())
        for row, tokens in zip(step.done.nonzero().squeeze(1).tolist(), step.tokens.tolist(), strict=True):
            state = step.state
            out[int(state.row[row])] = (int(state.step[row]) + 1, bool(step.halted[row]), int(state.nfe[row]), tokens)
    return out, tape


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("solver", [Euler(), Heun(), TorchDiffEq("midpoint", double=True)], ids=repr)
def test_a_replayed_rule_is_the_live_run(solver: Solver, rule: Criterion) -> None:
    again = replay(recorded(solver), rule)
    expected, _ = live(solver, rule)
    seen = {
        i: (int(again.steps[i]), bool(again.halted[i]), int(again.nfe[i]), again.tokens[i].tolist()) for i in range(M)
    }
    assert seen == expected


def test_the_rules_above_halt_between_the_ends() -> None:
    """Otherwise the law above would say little."""
    recording = recorded(Euler())
    inside = [rule for rule in RULES if 1 < replay(recording, rule).steps.mean() < STEPS]
    assert len(inside) >= len(RULES) - 2


@settings(max_examples=20)
@given(step=st.lists(st.integers(0, STEPS - 1), min_size=M, max_size=M))
def test_tokens_at_a_step_are_those_of_a_run_halted_there(step: list[int]) -> None:
    recording = recorded(Euler())
    tokens = recording.record.tokens_at(np.array(step), recording.tokens)
    for i, k in enumerate(step):
        assert tokens[i].tolist() == halted_after(k + 1)[i][3]


@cache
def halted_after(steps: int) -> dict[int, tuple]:
    return live(Euler(), FixedSteps(steps))[0]


def test_a_record_of_a_halted_run_is_the_beginning_of_the_full_one() -> None:
    full, (_, tape) = recorded(Euler()).record, live(Euler(), Patience(2))
    short = tape.record()
    there = short.nfe > 0
    assert not there.all()
    assert np.array_equal(short.switch_counts()[there], full.switch_counts()[there])
    for name, values in short.signals.items():
        assert np.array_equal(values[there], full.signals[name][there], equal_nan=True), name


@settings(max_examples=20)
@given(order=st.permutations(range(M)), cut=st.integers(1, M - 1))
def test_selecting_and_joining_are_inverse(order: list[int], cut: int) -> None:
    record, places = recorded(Euler()).record, np.array(order)
    mixed = record.select(places)
    back = Record.join([mixed.select(np.arange(cut)), mixed.select(np.arange(cut, M))]).select(np.argsort(places))
    assert np.array_equal(back.nfe, record.nfe)
    assert np.array_equal(back.switch_counts(), record.switch_counts())
    for k in range(STEPS):
        at, start = np.full(M, k), np.zeros((M, N), np.int64)
        assert np.array_equal(back.tokens_at(at, start), record.tokens_at(at, start))
        assert all(np.array_equal(back.signals[n][k], record.signals[n][k], equal_nan=True) for n in record.signals)


@settings(max_examples=20)
@given(places=st.lists(st.integers(-M, M - 1), max_size=2 * M))
def test_a_sample_that_is_selected_twice_is_there_twice(places: list[int]) -> None:
    record = recorded(Euler()).record
    chosen = record.select(np.array(places, np.int64))
    assert len(chosen) == len(places)
    assert (np.diff(chosen.switches.step.astype(np.int64)) >= 0).all()
    for k in range(STEPS):
        tokens = record.tokens_at(np.full(M, k), np.zeros((M, N), np.int64))
        at, start = np.full(len(places), k), np.zeros((len(places), N), np.int64)
        assert chosen.tokens_at(at, start).tolist() == [tokens[place].tolist() for place in places]


# --- files ---


def test_a_file_gives_back_what_was_written_and_stays_on_disk(tmp_path: Path) -> None:
    recording = recorded(Heun())
    recording.write(tmp_path / "a.safetensors")
    again = Recording.read(tmp_path / "a.safetensors")
    assert not any(a.flags.owndata for a in (again.tokens, again.record.nfe, again.record.signals["margin"]))
    for rule in RULES:
        assert all(np.array_equal(a, b) for a, b in zip(replay(recording, rule), replay(again, rule), strict=True))
    assert (again.seed, again.model, again.weights, again.settings) == (0, "oracle", "0" * 64, recording.settings)
    assert np.array_equal(again.index, recording.index)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    recorded(Euler()).write(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CdlmError, match="truncated") as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused(tmp_path: Path) -> None:
    recorded(Euler()).write(tmp_path / "a.safetensors")
    old = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(old.replace(b'"cdlm_recording":"1"', b'"cdlm_recording":"9"'))
    with pytest.raises(CdlmError, match="version 9"):
        read_folder(tmp_path)


def test_other_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(CdlmError, match="no recordings"):
        read_folder(tmp_path)
    save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CdlmError, match="no recording"):
        read_folder(tmp_path)


def damage(path: Path, header: dict[str, str], columns: dict[str, np.ndarray]) -> None:
    """The recording with other values in its header and columns; None leaves a value out."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, "np") as file:
        old, kept = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    changed = {key: value for key, value in {**old, **header}.items() if value}
    save_file({**kept, **columns}, path, changed)


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ({"seed": ""}, {}),
        ({"seed": "x"}, {}),
        ({"settings": "{"}, {}),
        ({"settings": "3"}, {}),
        ({"prompts": "3"}, {}),
        ({"prompts": '["the"]'}, {}),
        ({"made_by": "["}, {}),
        ({}, {"nfe": np.ones((3, 2), np.int32)}),
        ({}, {"signal.margin": np.ones((3, 2), np.float32)}),
        ({}, {"given": np.zeros((1, N), bool)}),
        ({}, {"switch.sample": np.full(9, 99, np.uint32)}),
        ({}, {"switch.position": np.full(9, 99, np.uint16)}),
        ({"seed": "-1"}, {}),
        ({"seed": "1.5"}, {}),
        ({"prompts": "[1]"}, {}),
        ({"made_by": '{"a": 1}'}, {}),
        ({"vocab": "2"}, {}),
        ({"vocab": "0"}, {}),
        ({}, {"tokens": np.full((M, N), -1)}),
        ({}, {"tokens": np.full((M, N), 2**31)}),
        ({}, {"tokens": np.zeros((M, N), np.int32)}),
        ({}, {"tokens": np.zeros((M, N), np.float64)}),
        ({}, {"valid": np.zeros((M, N), bool), "given": np.zeros((M, N), bool)}),
        ({}, {"given": np.ones((M, N), bool)}),
        ({}, {"index": np.zeros(M, np.int64)}),
        ({}, {"index": -1 - np.arange(M)}),
        ({}, {"nfe": np.full((STEPS, M), -2, np.int32)}),
        ({}, {"nfe": np.full((STEPS, M), 2, np.int32)}),
        ({}, {"nfe": np.ones((STEPS, M), np.float32)}),
        ({}, {"t": np.full(STEPS, np.nan)}),
        ({}, {"t": np.full(STEPS, -1.0)}),
        ({}, {"t": np.ones(STEPS, np.float32)}),
        ({}, {"other": np.zeros(3)}),
        ({}, {"budget": np.full(M, STEPS + 1)}),
        ({}, {"ended": np.ones(M, np.int8)}),
    ],
    ids=str,
)
def test_damaged_recordings_are_refused_in_one_line(header: dict, columns: dict, tmp_path: Path) -> None:
    recorded(Euler()).write(tmp_path / "a.safetensors")
    damage(tmp_path / "a.safetensors", header, columns)
    with pytest.raises(CdlmError, match="damaged") as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_equal_recordings_are_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        recorded(Euler()).write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_switches_out_of_order_or_of_given_positions_are_refused(tmp_path: Path) -> None:
    recording = recorded(Euler())
    switches, given = recording.record.switches, recording.given.copy()
    given[switches.sample[0], switches.position[0]] = True
    backwards = type(switches)(*(part[::-1] for part in switches))
    for odd, what in (
        (replace(recording, record=replace(recording.record, switches=backwards)), "not in order of step"),
        (replace(recording, given=given), "switches or commits of given positions"),
    ):
        odd.write(tmp_path / "a")
        with pytest.raises(CdlmError, match=what):
            Recording.read(tmp_path / "a")


def test_another_version_with_other_columns_is_one_too(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"other": np.zeros(3)}, tmp_path / "a.safetensors", {"cdlm_recording": "2"})
    with pytest.raises(CdlmError, match="version 2"):
        read_folder(tmp_path)


def test_recordings_of_two_models_do_not_mix(tmp_path: Path) -> None:
    recording = recorded(Euler())
    recording.write(tmp_path / "a.safetensors")
    replace(recording, weights="1" * 64, model="other").write(tmp_path / "b.safetensors")
    with pytest.raises(CdlmError, match="one folder for each model"):
        read_folder(tmp_path)


def test_a_halted_run_is_no_recording() -> None:
    recording = recorded(Euler())
    _, tape = live(Euler(), Patience(2))
    with pytest.raises(CdlmError, match="halted early"):
        replace(recording, record=tape.record())


@dataclass(frozen=True)
class Sharp(Stateless):
    """Reads what no recording keeps."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"top1"})

    def decide(self, state: StepState) -> Decision:
        return Decision(state.top1.amin(1) > 0)


@pytest.mark.parametrize("rule", [JoT(), JoT() | Patience(3), For(JoT(), 2), FromStep(JoT(), 2) & Never()], ids=repr)
def test_rules_that_freeze_cannot_be_replayed(rule: Criterion) -> None:
    with pytest.raises(CdlmError, match="freezes positions"):
        replay(recorded(Euler()), rule)


@pytest.mark.parametrize("rule", [Sharp(), Prophet(region=(0, 2)), Patience(2) & Sharp()], ids=repr)
def test_rules_that_read_more_than_is_kept_are_refused(rule: Criterion) -> None:
    with pytest.raises(CdlmError, match="does not keep"):
        replay(recorded(Euler()), rule)


# --- the commands ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "toy"
    with_tokenizer().save_pretrained(folder)
    return folder


def say(*words: object) -> None:
    cli.main([str(word) for word in words])


def test_sample_record_and_replay_on_the_command_line(run: Path, tmp_path: Path, capsys) -> None:
    common = ("--n", 3, "--steps", 8, "--prompt", "the cat", "--length", 10, "--quiet", "true")
    say("sample", run, *common, "--record", tmp_path / "kept")
    say("sample", run, *common, "--halt", "FixedSteps(4)", "--out", tmp_path / "live.jsonl")
    capsys.readouterr()
    say(
        "replay",
        tmp_path / "kept",
        "--halt",
        "FixedSteps(4)",
        "Never()",
        "--halt",
        "Patience(3)",
        "--out",
        tmp_path / "o",
    )
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in table[1:]] == ["FixedSteps(4)", "Never()", "Patience(3)"]
    assert table[1].split()[3:6] == ["4.0", "50.0%", "100.0%"]
    files = sorted((tmp_path / "o").iterdir())
    assert len(files) == 3
    again, expected = ([json.loads(x) for x in f.read_text().splitlines()] for f in (files[0], tmp_path / "live.jsonl"))
    assert again == expected


def test_recordings_that_differ_in_anything_have_files_of_their_own(run: Path, tmp_path: Path, capsys) -> None:
    common = ("--n", 2, "--steps", 4, "--record", tmp_path / "kept", "--quiet", "true")
    for more in ((), ("--prompt", "the"), ("--prompt", "a"), ("--grid", "LogT()"), ("--length", 9)):
        say("sample", run, *common, *more)
    assert len(read_folder(tmp_path / "kept")) == 5
    say("replay", tmp_path / "kept", "--halt", "Patience(2)", "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 5
    capsys.readouterr()


def test_mistakes_on_the_command_line(run: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    with_tokenizer(seed=1).save_pretrained(other)
    kept = tmp_path / "kept"
    say("sample", run, "--n", 2, "--steps", 3, "--record", kept, "--quiet", "true")
    capsys.readouterr()
    for words, advice in (
        (("sample", run, "--record", kept, "--halt", "Patience(2)"), "leave out --halt"),
        (("sample", other, "--n", 2, "--steps", 3, "--record", kept, "--quiet", "true"), "another model"),
        (("replay", kept), "needs rules"),
        (("replay", kept, "--halt", "JoT()"), "freezes positions"),
        (("replay", kept, "--halt", "Patiense(3)"), "did you mean Patience"),
        (("replay", tmp_path, "--halt", "Never()"), "holds no recordings"),
        (("replay", kept, "--halt", "auto"), "name the rule itself"),
        (("replay", kept, "--halt"), "needs at least one value"),
    ):
        with pytest.raises(SystemExit) as caught:
            say(*words)
        said = capsys.readouterr()
        assert caught.value.code == 2
        assert advice in said.err
        assert said.err.count("\n") == 1
        assert not said.out


def test_a_recording_needs_recorded_samples(run: Path) -> None:
    session = api.open_session(run, steps=2)
    samples = session.run(session.requests())
    with pytest.raises(CdlmError, match="record=True"):
        recording_of(samples, session)
