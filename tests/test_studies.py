"""Studies: what they measure has known answers, and each runs from the command line on a small model."""

import csv
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from oracle import Oracle
from toys import with_tokenizer

from cdlm import studies
from cdlm.cli.main import main
from cdlm.continuous.grids import LogT, UpperEnds
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.projections import Greedy
from cdlm.continuous.sampler import Diffusion, DiffusionLoop
from cdlm.continuous.solvers import Euler, Renoise, Solver
from cdlm.core.errors import CdlmError
from cdlm.evaluation.metrics.aup import aup
from cdlm.evaluation.plots.panels import Line, Panel, draw
from cdlm.masked.sampler import Unmasking
from cdlm.models import hub
from cdlm.policies import Threshold, parse_policy, sweep_policy
from cdlm.recording.file import Recording
from cdlm.recording.record import Record, Switches
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.requests import requests
from cdlm.sampling.session import Session
from cdlm.studies.accuracy import front, with_areas
from cdlm.studies.measures import position_zero_switch, reached, settled_by, zero_switch
from cdlm.studies.more_steps import VANILLA, _shown
from cdlm.studies.norm_causality import UNTOUCHED, Driven, Struck, at_norm, with_noise
from cdlm.studies.norms import trace
from cdlm.studies.stitching import ANY, MEAN, ONE, STITCHED, VOTE, WORST, Trace, stitch
from cdlm.studies.study import Finding, Study
from cdlm.studies.t_max import prior_mismatch, top_level
from cdlm.studies.zero_switch import Cell

THINGS, PLACES = ("hat", "ball", "kite", "bird"), ("mat", "roof", "road", "hill", "farm", "boat")
TEXT = "".join(f"the {a} saw the {b} on the {c}.\n" for a in ("cat", "dog", "fox") for b in THINGS for c in PLACES)
SMALL = (
    "--system.width", "16", "--system.depth", "1", "--system.heads", "2", "--system.dim", "8", "--batch_size", "4",
    "--validation_rows", "4", "--preview", "0", "--training.steps", "2", "--training.accelerator", "cpu", "--quiet",
)  # fmt: skip
TASK = (
    "--source", "Arithmetic", "--source.n", "300", "--rows", "filled", "--masking", "Completion()", "--length", "64",
    "--vocab_size", "280",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained run."""
    place = tmp_path_factory.mktemp("studies")
    text = place / "text.txt"
    text.write_text(TEXT * 3)
    own = ("--text", str(text), "--length", "12", "--vocab_size", "266")
    main(["train", *own, "--out", str(place / "run"), "--cache", str(place / "cache"), *SMALL])
    return str(place / "run")


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked model, trained on a task with answers."""
    place = tmp_path_factory.mktemp("masked")
    own = ("--out", str(place / "run"), "--cache", str(place / "cache"), "--system", "Masked")
    main(["train", *TASK, *own, *SMALL])
    return str(place / "run")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def record_of(switches: list[tuple[int, int, int]], steps: int, samples: int) -> Record:
    """A record with switches (step, sample, position) and nothing else."""
    step, sample, position = (np.array(column) for column in zip(*sorted(switches), strict=True))
    nfe = np.repeat(np.arange(1, steps + 1)[:, None], samples, 1)
    levels = np.repeat(np.linspace(1, 0.1, steps)[:, None], samples, 1)
    return Record(levels, nfe, {}, Switches(step, sample, position, step))


# --- what is measured ---


def test_the_zero_switch_step_is_the_last_switch_counted_from_one() -> None:
    record = record_of([(0, 0, 0), (0, 0, 1), (3, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 0), (9, 1, 0)], 10, 2)
    assert zero_switch(record).tolist() == [4, 10]
    assert position_zero_switch(record, 2).tolist() == [[1, 4], [10, 1]]


def test_a_level_is_reached_when_it_is_kept() -> None:
    values = np.array([[0.2, 1.0, 0.1], [1.0, 1.0, 0.1], [0.5, 1.0, 0.1], [1.0, 1.0, 0.1]])
    assert reached(values, 0.9).tolist() == [4, 1, 5]


def test_shares_of_settled_samples_count_each_sample_once() -> None:
    assert settled_by(np.array([1, 3, 3, 5]), 4).tolist() == [0.25, 0.25, 0.75, 0.75]


@pytest.mark.parametrize(("paper", "nats"), [(300, 0.0014), (50, 0.0512), (10, 1.28)])
def test_the_prior_mismatch_is_the_divergence_of_the_noised_embedding(paper: float, nats: float) -> None:
    made = with_tokenizer(t_max=paper / 16)
    level = top_level(made.schedule, made.rho)
    assert level == pytest.approx(paper / 16)
    assert prior_mismatch(level) == pytest.approx(nats, rel=0.02)
    e = torch.nn.functional.normalize(torch.arange(1.0, 9.0, dtype=torch.float64), dim=0)
    start, noisy = torch.distributions.Normal(0 * e, level), torch.distributions.Normal(e, level)
    divergence = torch.distributions.kl_divergence(noisy, start).sum()
    assert prior_mismatch(level) == pytest.approx(float(divergence))


def test_a_trace_ends_at_its_own_direction_and_knows_both_norms() -> None:
    system = with_tokenizer(length=5)
    session = Session(system, Diffusion(6, grid=LogT()))
    course = trace(session, system.rho, session.requests(n=3))
    for name in ("z_to_final", "score_to_final"):
        assert course[name].shape == (6, 3)
        assert course[name][-1] == pytest.approx(1)
        assert (np.abs(course[name]) <= 1 + 1e-6).all()
    t = course["t"] * system.rho
    assert course["z_scaled"] == pytest.approx(course["z_norm"] / np.sqrt(1 + t**2))
    assert course["z_scaled"][0].mean() == pytest.approx(1, abs=0.4)  # pure noise has about the norm of an embedding


# --- disturbances ---


def states(solver: Solver, n: int = 3, steps: int = 8) -> list[torch.Tensor]:
    """States [n, 4, 5] of the oracle, step by step."""
    loop = DiffusionLoop(Oracle(), Diffusion(steps, solver, LogT()), RunOptions(record=frozenset({"z"})), n)
    return [step.state.z for step in loop.steps(requests(None, n, 4, None))]


def levels(steps: int = 8) -> list[float]:
    return LogT().levels(Oracle().schedule, steps).tolist()


def test_disturbances_of_size_zero_change_nothing() -> None:
    plain = states(Euler())
    level = levels()[3]
    idle = [
        Driven(lambda x0: x0), Struck(level, lambda z, t: z), Struck(1e9, lambda z, t: 2 * z),
        Struck(level, lambda z, t: with_noise(z, t, scale=0.0, seed=0, indices=range(3))),
    ]  # fmt: skip
    for solver in idle:
        assert all(torch.equal(a, b) for a, b in zip(plain, states(solver), strict=True))


def test_a_strike_changes_the_state_it_names_and_none_before() -> None:
    plain, struck = states(Euler()), states(Struck(levels()[3], lambda z, t: 2 * z))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], struck[:3], strict=True))
    assert torch.equal(struck[3], 2 * plain[3])
    assert not torch.equal(struck[4], plain[4])


def test_a_driven_state_goes_where_the_changed_estimate_points() -> None:
    end = states(Driven(lambda x0: 0 * x0))
    ratio = levels()[-1] / levels()[0]
    assert torch.allclose(end[-1], ratio * end[0])


def test_the_estimate_is_put_at_the_norm_of_an_embedding() -> None:
    x0 = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    fixed = at_norm(x0, 2.0)
    assert fixed.norm(dim=-1) == pytest.approx(torch.full((2, 3), 2.0).numpy(), rel=1e-5)
    assert torch.cosine_similarity(fixed, x0, dim=-1).numpy() == pytest.approx(1, rel=1e-5)


def test_injected_noise_is_the_samples_own_and_scales_with_the_level() -> None:
    z, t = torch.zeros(2, 400, 8), torch.tensor([1.0, 3.0], dtype=torch.float64)
    both = with_noise(z, t, scale=0.5, seed=1, indices=[4, 9])
    alone = with_noise(z[1:], t[1:], scale=0.5, seed=1, indices=[9])
    assert torch.equal(both[1:], alone)
    assert both.std(dim=(1, 2)).tolist() == pytest.approx([0.5, 1.5], rel=0.05)
    assert not torch.equal(with_noise(z, t, scale=0.5, seed=2, indices=[4, 9]), both)


def test_the_causality_study_strikes_at_steps_that_are_walked() -> None:
    system = with_tokenizer()
    for share in (0.0, 0.5, 1.0):
        study = studies.make("norm-causality", n=1, steps=4, at=[share])
        struck = [s for s in study.solvers(system, [0]).values() if isinstance(s, Struck)]  # type: ignore[attr-defined]
        walked = LogT().levels(system.schedule, 4).tolist()[1:]
        assert struck
        assert all(s.level in walked for s in struck)


# --- the command line ---

SETTINGS: dict[str, tuple[str, ...]] = {
    "zero-switch": ("--n", "3", "--steps", "5", "--prompts", "", "the cat", "--seeds", "0", "1"),
    "patience-sweep": (
        "--n",
        "6",
        "--steps",
        "5",
        "7",
        "--patience",
        "1",
        "3",
        "--max-change",
        "0.5",
        "--judge-steps",
        "1",
    ),
    "t-max": ("--n", "4", "--steps", "5", "--patience", "2", "--judge-steps", "1"),
    "norms": ("--n", "3", "--steps", "5", "--grids", "LogT()", "UniformT()"),
    "norm-causality": ("--n", "3", "--steps", "5", "--factors", "0.5", "2", "--noise", "1", "--at", "0.5"),
    "more-steps": ("--n", "4", "--steps", "8", "--vanilla", "2", "4", "--judge-steps", "1"),
    "accuracy": tuple(
        "--n 3 --new-tokens 6 --block 3 --steps 1 2 --rules Full() Patience JoT(3.0)"
        " --policies Threshold(0.5) EntropyBound".split()
    ),
    "stitching": tuple("--n 3 --new-tokens 6 --steps 1 2 --samples 2 1 --judge-steps 1".split()),
    "ladder": tuple("--n 20 --splits 2 --features NGrams() LastState() --judge-steps 1".split()),
}
MASKED = {"accuracy", "stitching"}
"""Studies of masked models."""
LINES = {  # lines of the table
    "zero-switch": 3, "patience-sweep": 4, "t-max": 1, "norms": 2, "norm-causality": 1 + 2 + 1 + 2 + 1, "more-steps": 3,
    "accuracy": 1, "ladder": 2, "stitching": 3 + 1 + 2 * 5,
}  # fmt: skip


def test_every_study_is_tried_here_and_has_its_page() -> None:
    assert sorted(SETTINGS) == studies.names()
    pages = Path(__file__).parent.parent / "docs" / "studies"
    index = (pages / "README.md").read_text(encoding="utf-8")
    for name in studies.names():
        assert f"({name}.md)" in index
        assert f"cdlm study {name}" in (pages / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_study_leaves_a_table_its_numbers_and_a_picture(
    name: str, run: str, masked_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = masked_run if name in MASKED else run
    main(["study", name, "--models", run, "--out", str(tmp_path), *SETTINGS[name]])
    printed = capsys.readouterr().out
    table = (tmp_path / f"{name}.md").read_text()
    assert table.startswith(printed.rstrip("\n"))
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) - 2 >= LINES[name]
    assert all(row["model"] == "run" for row in rows_of(tmp_path / f"{name}.csv"))
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / f"{name}.json").read_text())
    cells = [[cell.replace("|", "\\|") for cell in row.values()] for row in content["table"]]
    assert lines[2:] == [f"| {' | '.join(row)} |" for row in cells]
    assert content["note"] in table
    assert len(content["rows"]) == len(rows_of(tmp_path / f"{name}.csv"))
    settings = yaml.safe_load(table.split("```yaml\n")[1].split("```")[0])
    assert settings["models"] == [run]


@pytest.mark.parametrize(
    ("name", "settings", "advice"),
    [
        ("more-steps", {"rule": "Patiense"}, "did you mean Patience"),
        ("norms", {"grids": ["LogT()", "LogTee()"]}, "did you mean LogT"),
        ("patience-sweep", {"grid": "LogTee()"}, "did you mean LogT"),
        ("accuracy", {"rules": ["Patiense"]}, "did you mean Patience"),
        ("accuracy", {"policies": ["Treshold(0.9)"]}, "did you mean Threshold"),
        ("stitching", {"policy": "Treshold(0.9)"}, "did you mean Threshold"),
        ("stitching", {"solver": "Treshold(0.9)"}, "did you mean Threshold"),
        ("stitching", {"samples": []}, "stitching needs numbers of samples, got none"),
        ("stitching", {"samples": [2, 0]}, "stitching needs a whole number samples >= 1, got 0"),
        ("stitching", {"temperature": -1.0}, "stitching needs a finite number temperature >= 0"),
        ("stitching", {"judge_steps": 0}, "stitching needs a whole number judge_steps >= 1, got 0"),
        *((name, {"models": ["nowhere"]}, "nowhere is not a model folder") for name in sorted(SETTINGS)),
    ],
)
def test_what_does_not_exist_is_told_before_any_work(
    name: str, settings: dict[str, Any], advice: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _ = studies.find(name)
    monkeypatch.setattr(kind, "find", lambda self: pytest.fail("at work"))
    models = [run, *settings.get("models", [])]
    with pytest.raises(CdlmError, match=advice):
        studies.make(name, **{"n": 3, "out": tmp_path, **settings, "models": models}).run(name)


def test_every_file_of_defaults_belongs_to_a_listed_study() -> None:
    folder = Path(studies.__file__).parent
    assert sorted(file.stem for file in folder.glob("*.yaml")) == studies.names()
    assert all(issubclass(studies.find(name)[0], Study) for name in studies.names())


SEVERAL: dict[str, dict[str, Any]] = {
    "zero-switch": {"steps": 3, "prompts": ["", "the cat"], "seeds": [0, 1]},
    "norms": {"steps": 3, "grids": ["LogT()", "Warped()", "UniformT()"]},
    "norm-causality": {"steps": 3, "factors": [2.0], "noise": [1.0], "at": [0.5]},
    "more-steps": {"steps": [4, 6], "vanilla": [2, 3], "judge_steps": 1},
    "t-max": {"steps": 3, "judge_steps": 1},
    "stitching": {"new_tokens": 4, "steps": [1], "samples": [1, 2], "judge_steps": 1},
    "accuracy": {"new_tokens": 4, "steps": [1], "rules": ["Patience"], "policies": ["EntropyBound"]},
}
"""Settings with several grids, seeds, prompts, steps or rules for each model."""


@pytest.mark.parametrize("name", sorted(SEVERAL))
def test_a_study_loads_each_model_once_and_closes_it(
    name: str, run: str, masked_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = masked_run if name in MASKED else run
    copy = shutil.copytree(run, tmp_path / "copy")
    read, closed = [], []
    monkeypatch.setattr(hub, "read", lambda path, *rest, inner=hub.read: read.append(path) or inner(path, *rest))
    monkeypatch.setattr(Session, "close", lambda self: closed.append(self.model.folder))
    study = studies.make(name, models=[run, str(copy)], n=4, out=tmp_path, quiet=True, **SEVERAL[name])
    study.run(name)
    assert sorted(read) == sorted(closed) == sorted([Path(run), copy])


def test_a_study_that_fails_closes_its_models(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(Session, "close", lambda self: closed.append(self.model.folder))
    study: Any = studies.make("zero-switch", models=[run], n=2, steps=3, prompts=["the cat " * 20], out=tmp_path)
    with pytest.raises(CdlmError, match="shorten it"):
        study.run("zero-switch")
    assert closed == [Path(run)]


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - MASKED - {"ladder"}))
def test_a_masked_model_is_refused_before_any_work(
    name: str, run: str, masked_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _ = studies.find(name)
    monkeypatch.setattr(kind, "find", lambda self: pytest.fail("at work"))
    with pytest.raises(CdlmError, match=r"is a masked model and has no .* leave it out") as caught:
        studies.make(name, models=[run, masked_run], n=3, out=tmp_path).run(name)
    assert "\n" not in str(caught.value)


def test_a_continuous_model_answers_beside_a_masked_one(run: str, masked_run: str, tmp_path: Path) -> None:
    """Its policies say what it commits; a rule and a policy of one name are two lines."""
    short = tmp_path / "short.jsonl"
    short.write_text(2 * (json.dumps({"question": "2 + 2", "answer": "2 + 2 = 4.\n#### 4"}) + "\n"), encoding="utf-8")
    names: dict[str, Any] = {
        "problems": short,
        "rules": ["FixedSteps(2)", "Mutual"],
        "policies": ["Mutual", "Threshold(0.5)"],
    }
    study: Any = studies.make("accuracy", models=[masked_run, run], n=2, new_tokens=4, budget=5, **names)
    exam = study.exam(run)
    assert exam.decoded(Threshold(0.5)).session.sampling.commit == Threshold(0.5)
    assert exam.session.sampling.steps == 5
    found = study.find()
    lines = [row["rule or policy"] for row in found.table]
    assert lines == ["full budget", "FixedSteps(2)", "Mutual", "Mutual (policy)", "Threshold(0.5)"] * 2
    assert all(0.0 <= row["voted"] <= 1.0 for row in found.rows)


@pytest.mark.parametrize("base", ["LLaDA", "Dream"])
def test_answers_are_decoded_at_temperature_zero(base: str, masked_run: str) -> None:
    study: Any = studies.make("accuracy", models=[masked_run], n=2, new_tokens=4, block=2, steps=[1], base=base)
    exam = study.exam(masked_run)
    assert exam.session.settings == Unmasking(parse_policy(f"{base}(4, block=2)"), temperature=0.0).settings
    assert exam.decoded(Threshold(0.5)).session.settings == Unmasking(Threshold(0.5), temperature=0.0).settings


def test_a_policy_that_takes_tokens_back_has_no_votes(masked_run: str) -> None:
    names: dict[str, Any] = {"rules": [], "policies": ["CORE(..., every=1, begin=0.0, end=1.0)", "Threshold(0.5)"]}
    study: Any = studies.make("accuracy", models=[masked_run], n=4, new_tokens=4, steps=[1], **names)
    found = study.find()
    by = {row["rule or policy"]: row for row in found.table}
    core = by["CORE(..., every=1, begin=0.0, end=1.0)"]
    assert core["voted"] == "-" != by["Threshold(0.5)"]["voted"]
    assert core["counted"].startswith("revised ")
    assert len([row for row in found.rows if row["family"].startswith("CORE")]) == len(sweep_policy("CORE"))


def test_the_front_is_what_no_setting_beats() -> None:
    rows = [
        {"setting": name, "calls": calls, "accuracy": accuracy}
        for name, calls, accuracy in (("a", 9, 0.9), ("b", 4, 0.9), ("c", 4, 0.5), ("d", 2, 0.6), ("e", 1, 0.0))
    ]
    assert [line.partition(" ")[0] for line in front(rows)] == ["`e`", "`d`", "`b`"]


def test_an_area_is_over_the_settings_of_a_family_and_the_full_budget() -> None:
    def row(family: str, tpf: float, accuracy: float) -> dict[str, Any]:
        return {"family": family, "tpf": tpf, "accuracy": accuracy}

    first = [row("full budget", 1.0, 0.8), row("KL", 4.0, 0.7), row("KL", 2.0, 0.78), row("JoT(3.0)", 6.0, 0.8)]
    second = [row("full budget", 1.0, 0.9), row("KL", 3.0, 0.88)]
    one, two = with_areas([first, second])
    assert [{**found, "aup": 0, "y_max": 0} for found in one] == [{**given, "aup": 0, "y_max": 0} for given in first]
    assert {found["y_max"] for found in (*one, *two)} == {90.0}
    assert [found["aup"] for found in one[:1] + two[:1]] == [80.0, 90.0]
    assert one[1]["aup"] == one[2]["aup"] == pytest.approx(aup([(1.0, 80.0), (2.0, 78.0), (4.0, 70.0)], 90.0))
    assert one[3]["aup"] == pytest.approx(aup([(1.0, 80.0), (6.0, 80.0)], 90.0))
    assert two[1]["aup"] == pytest.approx(aup([(1.0, 90.0), (3.0, 88.0)], 90.0))


def stitching_of(run: str, **settings: Any) -> Any:
    """Problems put to a model, for stitching."""
    small = {"n": 12, "new_tokens": 6, "steps": [1, 2], "samples": [5], "judge_steps": 1, "quiet": True}
    study: Any = studies.make("stitching", models=[run], **{**small, **settings})
    return study.exam(run)


def test_no_choice_of_a_sample_beats_that_any_is_right_and_of_one_sample_all_are_that(masked_run: str) -> None:
    exam = stitching_of(masked_run)
    rng = np.random.default_rng(0)
    said = [[f"1 = 1. #### {int(task.answer) + k}" for k in rng.choice([0, 1, 2], 5)] for task in exam.tasks]
    vars(exam)["pools"] = [[Trace.of(text) for text in pool] for pool in said]  # in place of what it would draw
    first = exam.results(1)
    assert 0 < first[0].right.sum() < 12
    assert [result.way for result in first] == [ONE, VOTE, MEAN, WORST, STITCHED, ANY]
    chosen = [result for result in first if result.way != STITCHED]
    assert all(result.right.tolist() == first[0].right.tolist() for result in chosen)
    assert all(result.calls.tolist() == exam.drawn.nfe[::5].tolist() for result in chosen)
    for count in (2, 5):
        *chosen, _, any_right = exam.results(count)
        one = chosen[0].right
        assert one.tolist() == [
            np.mean([x.endswith(f" {t.answer}") for x in p[:count]]) for p, t in zip(said, exam.tasks, strict=True)
        ]
        assert all((result.right <= any_right.right).all() for result in chosen)
        assert any_right.right.tolist() == np.ceil(one).tolist()


def test_samples_at_temperature_zero_are_stitched_to_themselves(masked_run: str) -> None:
    exam = stitching_of(masked_run, temperature=0.0)
    made = stitch(exam.read, exam.prompts, exam.pools)
    assert [one.text for one in made] == ["".join(pool[0].parts) for pool in exam.pools]
    assert len({tuple(pool) for pool in exam.pools}) > 1
    assert all(len(set(pool)) == 1 for pool in exam.pools)


def test_the_answer_behind_a_reasoning_takes_the_positions_that_are_left(masked_run: str) -> None:
    exam = stitching_of(masked_run, n=3, solver="Threshold(1.0)")
    lengths = [
        len(exam.encode(prompt + text)) - len(exam.encode(prompt))
        for prompt, text in zip(exam.prompts, ("", "1 + 1", "1 " * 9), strict=True)
    ]
    assert 0 == lengths[0] < lengths[1] < 6 < lengths[2]
    answers, calls = exam.solve(["", "1 + 1", "1 " * 9])
    assert calls.tolist() == [6, 6 - lengths[1], 0]
    assert answers[2] is None
    assert exam.solve(["", "", "#### 7 " + "1 " * 9])[0][2] is None
    assert exam.solve(["", "", "1 " * 9 + "#### 7"])[0][2] == "7"


def test_stitching_needs_a_judge_that_is_there(masked_run: str, tmp_path: Path) -> None:
    study: Any = studies.make("stitching", models=[masked_run], n=2, judge=str(tmp_path / "none"), out=tmp_path)
    with pytest.raises(CdlmError, match="causal language model") as caught:
        study.run("stitching")
    assert "\n" not in str(caught.value)


def test_stitching_refuses_a_model_without_policies_of_masks(run: str, tmp_path: Path) -> None:
    study: Any = studies.make("stitching", models=[run], n=2, judge_steps=1, out=tmp_path)
    with pytest.raises(CdlmError, match="policy is a setting of masked models"):
        study.run("stitching")


def test_continuous_studies_take_euler_steps_whatever_a_paper_does(run: str) -> None:
    study: Any = studies.make("norms", models=[run], score_temperature=0.8)
    session = study.session(run)
    study._sessions[run] = session.with_sampling(Diffusion(7, Renoise(), UpperEnds(), Guidance(projection=Greedy())))
    drawn = study.flow(run, 5, 2, "LogT()")
    assert drawn.sampling == Diffusion(5, Euler(), LogT(), Guidance(score_temperature=0.8))
    assert drawn.seed == 2


def test_a_judged_study_needs_the_text_of_every_run(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("config.yaml"))
    for name in ("more-steps", "t-max"):
        kind, _ = studies.find(name)
        monkeypatch.setattr(kind, "find", lambda self: pytest.fail("at work"))
        with pytest.raises(CdlmError, match=r"no config\.yaml"):
            studies.make(name, models=[run, str(tmp_path / "bare")], n=3).run(name)


@pytest.mark.parametrize("flag", [["--quiet"], ["--quiet", "true"], ["--quiet=true"], ["--quiet", "false"], []])
def test_a_flag_alone_is_true(flag: list[str], run: str, tmp_path: Path) -> None:
    own = ["--out", str(tmp_path), "--n", "2", "--steps", "3", "--grids", "LogT()"]
    main(["study", "norms", *flag, "--models", run, *own])
    settings = yaml.safe_load((tmp_path / "norms.md").read_text().split("```yaml\n")[1].split("```")[0])
    assert settings["quiet"] is (bool(flag) and "false" not in flag)


def test_defaults_come_from_the_file_then_a_given_file_then_the_command_line(run: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("n: 2\nsteps: 3\n")
    main(
        ["study", "norms", "--models", run, "--out", str(tmp_path), "--quiet", "true", "--n", "4", "--config", str(own)]
    )
    settings = yaml.safe_load((tmp_path / "norms.md").read_text().split("```yaml\n")[1].split("```")[0])
    assert (settings["n"], settings["steps"]) == (4, 3)
    assert settings["grids"] == yaml.safe_load(studies.find("norms")[1].read_text())["grids"]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_defaults_are_settings_of_the_study(name: str) -> None:
    study, file = studies.find(name)
    assert set(yaml.safe_load(file.read_text())) <= {f.name for f in fields(study)}
    assert isinstance(studies.make(name, n=1), study)


@pytest.mark.parametrize("argv", [[], ["zeroswitch"], ["norms", "--nix", "3"], ["norms", "--n", "two"]])
def test_bad_calls_end_with_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["study", *argv])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("cdlm: ")
    if argv[:1] != ["norms"]:
        assert all(name in shown.err for name in studies.names())


def test_the_numbers_of_the_zero_switch_study_are_those_of_its_samples(run: str, tmp_path: Path) -> None:
    study: Any = studies.make("zero-switch", models=[run], n=3, steps=5, prompts=["the cat"], seeds=[3], quiet=True)
    drawn: Recording = study.draw(Cell(run, "the cat", 3))
    counts = drawn.record.switch_counts()
    expected = [max(k + 1 for k in range(5) if counts[k, i]) for i in range(3)]
    assert [row["zero_switch"] for row in study.find().rows] == expected


def test_untouched_rows_of_the_causality_study_agree_with_themselves(run: str) -> None:
    found = studies.make("norm-causality", models=[run], n=3, steps=5, batch_size=2).find()
    untouched = [row for row in found.rows if row["disturbance"] == UNTOUCHED]
    assert [row["as_untouched"] for row in untouched] == [1.0] * 3


def test_results_do_not_depend_on_the_batch(run: str) -> None:
    def table(batch_size: int) -> list[dict[str, str]]:
        study = studies.make("norm-causality", models=[run], n=4, steps=4, at=[0.5], batch_size=batch_size)
        return [dict(row) for row in study.find().table]

    assert table(4) == table(3)


# --- parts of single studies ---


def test_the_boundary_is_the_least_patience_before_the_first_failure_from_above() -> None:
    study: Any = studies.make("patience-sweep", max_change=0.01)
    upper = {1: 0.5, 2: 0.005, 3: 0.02, 4: 0.009, 5: 0.001}
    sweep = [{"patience": p, "share_most": u} for p, u in upper.items()]
    assert study.boundary(sweep) == 4  # 2 passes by chance, behind 3 that fails
    assert study.boundary(sweep[:3]) is None


def test_too_few_samples_cannot_show_the_boundary(run: str) -> None:
    with pytest.raises(CdlmError, match="at least"):
        studies.make("patience-sweep", models=[run], n=20, max_change=0.01).find()


def test_of_each_sweep_the_settings_nearest_to_the_budgets_and_the_best_are_shown() -> None:
    rows: list[dict[str, Any]] = [{"rule": VANILLA, "steps": s, "calls": float(s)} for s in (10, 40)]
    gaps = {90: None, 60: None, 30: 0.2, 20: -0.1, 12: 0.5, 2: None}
    rows += [{"rule": f"P({c})", "steps": 100, "calls": float(c), "beside_vanilla": gap} for c, gap in gaps.items()]
    assert [row["calls"] for row in _shown(rows)] == [10, 40, 30, 20, 12]


def test_pictures_refuse_to_be_empty_and_draw_bands_and_categories(tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match="at least one panel"):
        draw([], tmp_path / "nothing.png")
    x = np.arange(3.0)
    panels = [
        Panel("curves", "x", "y", [Line("a", x, x, (x - 1, x + 1)), Line("b", x, x, dashed=True)], levels=[("1", 1.0)]),
        Panel("places", "x", "", [Line("a", x, x, (x - 1, x + 1), dots=True)], ticks=("p", "q", "r")),
    ]  # fmt: skip
    assert draw(panels, tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_a_finding_is_a_table_in_markdown() -> None:
    found = Finding([{"a": 1}], [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}], "What it says.", [])
    assert found.markdown == "| a | b |\n| --: | --: |\n| 1 | 2 |\n| 3 | 4 |\n\nWhat it says.\n"


def test_padding_before_a_prompt_is_no_end_of_its_answer(masked_run: str) -> None:
    """Prompts of several lengths stand behind padding, which may read as an end of text."""
    study: Any = studies.make("accuracy", models=[masked_run], n=6, new_tokens=5, steps=[1, 3], rules=[], policies=[])
    exam = study.exam(masked_run)
    samples = exam.session.run(exam.requests)
    assert not samples.valid.all()
    assert exam.full.made.tolist() == samples.output_tokens.tolist()
