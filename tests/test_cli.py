"""The command line: a run from text to samples, and bad input, which is one line and exit code 2."""

import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import cdlm
from cdlm.cli import completion
from cdlm.cli.commands import COMMANDS
from cdlm.cli.main import main
from cdlm.continuous.grids import GRIDS
from cdlm.continuous.projections import PROJECTIONS
from cdlm.continuous.solvers import SOLVERS
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.plaid import Plaid
from cdlm.models.hub import read_tokenizer
from cdlm.policies import POLICIES
from cdlm.runs.config import read_run
from cdlm.training.folder import CHECKPOINT
from cdlm.training.options import TrainOptions
from rebuild.tiny_gguf import write_gguf

SUBJECTS = ("the cat", "the dog", "a bird", "a mouse", "the old man", "my sister", "a small fox", "the king")
PLACES = ("on the mat", "by the river", "in the garden", "under a tree", "near the house", "on the roof")
TEXT = "".join(f"{s} sat {p} and {q} saw it.\n" for s in SUBJECTS for p in PLACES for q in SUBJECTS)
VOCAB, LENGTH = 270, 16
ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "numpy", "transformers", "jsonargparse", "lightning", "yaml"}
"""What takes long to import."""
QUIET = ("--training.accelerator", "cpu", "--quiet")
SMALL = (
    "--system.width", "16", "--system.depth", "1", "--system.heads", "2", "--system.dim", "8",
    "--length", str(LENGTH), "--vocab_size", str(VOCAB), "--batch_size", "4",
    "--validation_rows", "4", "--preview", "1", "--training.steps", "3", *QUIET,
)  # fmt: skip


class Place:
    """A folder with a text and its cache."""

    def __init__(self, path: Path):
        self.path, self.text, self.run = path, path / "text.txt", path / "run"
        self.text.write_text(TEXT)

    def train(self, *more: str, text: Path | None = None, out: str = "run", small: tuple[str, ...] = SMALL) -> None:
        cache = ("--cache", str(self.path / "cache"))
        main(["train", "--text", str(text or self.text), "--out", str(self.path / out), *cache, *small, *more])

    def sample(self, *more: str) -> None:
        main(["sample", str(self.run), "--steps", "6", *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained run."""
    made = Place(tmp_path_factory.mktemp("cli"))
    made.train()
    return made


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained run of a masked model."""
    made = Place(tmp_path_factory.mktemp("masked"))
    made.train("--system", "Masked", *SMALL, small=())
    return made


@pytest.fixture
def fresh(tmp_path: Path) -> Place:
    """A text and no run."""
    return Place(tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a call that must end with exit code 2 and one line on standard error, which is returned."""

    def check(call: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            call(*arguments, **settings)
        shown = capsys.readouterr()
        assert caught.value.code == 2
        assert shown.err.count("\n") == 1, shown.err
        assert shown.err.startswith("cdlm: ")
        assert "Traceback" not in shown.err
        assert shown.out == ""
        return shown.err

    return check


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- a run from text to table ---


def test_a_run_folder_is_a_model_with_its_history(place: Place) -> None:
    names = {path.name for path in place.run.iterdir()}
    assert names >= {"config.yaml", "config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.csv"}
    assert (place.run / "checkpoints" / "last.ckpt").exists()
    assert len(list((place.run / "samples").iterdir())) == 1
    config = json.loads((place.run / "config.json").read_text())
    assert config["length"] == LENGTH
    assert config["model"]["width"] == 16
    assert "width: 16" in (place.run / "README.md").read_text()


def test_samples_are_json_lines(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "new" / "samples.jsonl"
    place.sample("--n", "3", "--seed", "5", "--halt", "FixedSteps(2)", "--prompt", "the cat", "--out", str(out))
    lines = read(out)
    assert len(lines) == 3
    for index, line in enumerate(lines):
        made_by = {"prompt", "given", "generated", "length", "model", "weights", "sampling", "halt", "version"}
        assert set(line) == {"text", "tokens", "nfe", "steps", "budget", "reason", "seed", "index"} | made_by
        assert (line["prompt"], line["halt"], line["version"]) == ("the cat", "FixedSteps(steps=2)", cdlm.__version__)
        assert line["text"].startswith("the cat")
        assert (line["nfe"], line["steps"], line["budget"], line["reason"]) == (2, 2, 6, "criterion")
        assert (line["seed"], line["index"]) == (5, index)
        assert line["given"] == [[0, len("the cat")]]
        assert len(line["tokens"]) == LENGTH
        assert all(0 <= token < VOCAB for token in line["tokens"])


def test_a_page_is_written_of_models_side_by_side(
    place: Place, masked: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    small = ("--n", "2", "--prompt", "the cat", "--device", "cpu")
    main(
        ["watch", str(place.run), str(masked.run), "--out", str(out), "--rules", "Patience(2)", "--steps", "6", *small]
    )
    shown = capsys.readouterr()
    assert f"{out}: {out.stat().st_size:,} bytes" in shown.err
    assert shown.out == ""
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', out.read_text(encoding="utf-8"))
    panels = json.loads(data)["panels"]
    assert [panel["family"] for panel in panels] == ["continuous", "masked"]
    assert [panel["rules"] for panel in panels] == [["Patience(steps=2)"]] * 2
    place.sample(*small, "--out", str(tmp_path / "samples.jsonl"), "--quiet")
    first, second = read(tmp_path / "samples.jsonl")
    assert [sample["calls"] for sample in panels[0]["samples"]] == [first["nfe"], second["nfe"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "page.pdf"), "end its name in .html"),
        ((), "--out must be given"),
        (("--out", "page.html", "--rules", "Patience("), "Patience("),
        (("--out", "page.html", "--rules", "SchEDD()"), "SchED"),
        (("--out", "page.html", "--rules", "JoT()"), "has to run: leave it out"),
    ],
)
def test_a_page_that_cannot_be_is_refused(
    words: tuple[str, ...], message: str, place: Place, refused: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, ["watch", str(place.run), "--n", "1", "--steps", "2", *words, "--quiet"])
    assert not list(tmp_path.iterdir())


def test_where_nobody_watches_the_terminal_nothing_is_drawn(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--n", "2", "--device", "cpu")
    place.sample(*small)
    plain = capsys.readouterr()
    place.sample(*small, "--watch")
    assert capsys.readouterr() == plain


def test_samples_of_several_processes_are_not_drawn(place: Place, refused: Callable) -> None:
    call = [
        "sample",
        str(place.run),
        "--n",
        "2",
        "--steps",
        "2",
        "--devices",
        "2",
        "--device",
        "cpu",
        "--watch",
        "--quiet",
    ]
    assert "--watch draws the samples of one process" in refused(main, call)


def test_samples_do_not_depend_on_the_batch(place: Place, tmp_path: Path) -> None:
    for size in ("1", "3"):
        place.sample("--n", "4", "--batch_size", size, "--out", str(tmp_path / f"{size}.jsonl"))
    assert [x["tokens"] for x in read(tmp_path / "1.jsonl")] == [x["tokens"] for x in read(tmp_path / "3.jsonl")]


def test_prompts_from_a_file_and_texts_on_the_terminal(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n\na [3] sat\n")
    place.sample("--n", "1", "--prompts", str(tmp_path / "prompts.txt"))
    shown = capsys.readouterr().out
    assert shown.count("--- sample") == 2
    assert "the cat" in shown


def test_a_masked_model_is_sampled_with_policies(masked: Place, tmp_path: Path) -> None:
    positions = LENGTH - len(read_tokenizer(masked.run).encode("the cat"))
    expected = {"": positions, "LLaDA(3)": 3, "Threshold(1.0)": positions, "Threshold(0.0)": 1}
    for number, (policy, steps) in enumerate(expected.items()):
        out, more = tmp_path / f"{number}.jsonl", ["--policy", policy] if policy else []
        main(["sample", str(masked.run), "--n", "2", "--prompt", "the cat", "--out", str(out), "--seed", "3", *more])
        for index, line in enumerate(read(out)):
            assert line["text"].startswith("the cat")
            assert line["nfe"] == line["steps"] == steps, policy
            assert (line["seed"], line["index"], line["given"]) == (3, index, [[0, len("the cat")]])
            assert len(line["tokens"]) == LENGTH
            assert 2 not in line["tokens"]  # no mask is left


def test_samples_of_a_masked_model_do_not_depend_on_the_batch(masked: Place, tmp_path: Path) -> None:
    for size in ("1", "3"):
        main(["sample", str(masked.run), "--n", "4", "--batch_size", size, "--out", str(tmp_path / f"{size}.jsonl")])
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()


def test_recordings_of_a_masked_model_are_replayed(
    masked: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rule = str(masked.run), "FixedSteps(5)"
    main(["sample", run, "--n", "3", "--record", str(tmp_path / "kept")])
    capsys.readouterr()
    main(["replay", str(tmp_path / "kept"), "--halt", rule, "--out", str(tmp_path / "replayed")])
    assert rule in capsys.readouterr().out
    main(["sample", run, "--n", "3", "--halt", rule, "--out", str(tmp_path / "live.jsonl")])
    (replayed,) = (tmp_path / "replayed").iterdir()
    assert read(replayed) == read(tmp_path / "live.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("n", ["1", "5"])
def test_two_processes_write_what_one_writes(place: Place, tmp_path: Path, n: str) -> None:
    for devices in ("1", "2"):
        place.sample(
            "--n", n, "--devices", devices, "--halt", "Patience(2)", "--out", str(tmp_path / f"{devices}.jsonl")
        )
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_processes_that_were_launched_write_what_one_writes(place: Place, tmp_path: Path) -> None:
    what = ("--n", "5", "--halt", "Patience(2)", "--device", "cpu", "--out")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "cdlm", "sample", str(place.run), "--steps", "6", *what, str(tmp_path / "2.jsonl")]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **meeting, "RANK": rank},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    place.sample(*what, str(tmp_path / "1.jsonl"))
    (_, said), nothing = (process.communicate(timeout=200) for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    assert "device: cpu, the first of 2 processes on one machine\n" in said
    assert nothing == ("", "")
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG\r\n"), (".pdf", b"%PDF-"), (".svg", b"<?xml")])
def test_a_plot_is_what_its_name_says(suffix: str, head: bytes, place: Place, tmp_path: Path) -> None:
    plot = tmp_path / f"plot{suffix}"
    place.sample("--n", "2", "--plot", str(plot), "--out", str(tmp_path / "out.jsonl"))
    assert plot.read_bytes().startswith(head)


def test_evaluation_writes_its_table(place: Place, tmp_path: Path) -> None:
    place.sample("--n", "4", "--out", str(tmp_path / "mine.jsonl"))
    main(
        [
            "evaluate",
            str(place.run),
            str(tmp_path / "mine.jsonl"),
            "--judge_steps",
            "3",
            "--mauve",
            "false",
            "--out",
            str(tmp_path / "table"),
        ]
    )
    table = (tmp_path / "table" / "evaluation.md").read_text()
    assert "mine" in table
    assert "real text" in table
    json.loads((tmp_path / "table" / "evaluation.json").read_text())


def test_without_its_package_mauve_is_left_out_with_a_line(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdlm.evaluation.metrics.mauve.is_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "mauve", None)
    place.sample("--n", "20", "--out", str(tmp_path / "mine.jsonl"))
    call = ["evaluate", str(place.run), str(tmp_path / "mine.jsonl"), "--judge_steps", "3"]
    main([*call, "--out", str(tmp_path / "table")])
    assert capsys.readouterr().out.count("note: MAUVE is left out") == 1
    found = json.loads((tmp_path / "table" / "evaluation.json").read_text())
    assert found["rows"][0]["mauve"] is None
    assert [note for note in found["notes"] if "pip install" in note]
    with pytest.raises(SystemExit, match="2"):
        main([*call, "--mauve"])  # who asks for it gets it, or is refused
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--solver", "Ancestral()", "--commit", "Threshold(0.1)"], "by their commits"),
        (["--grid", "Warped()", "--commit", "none"], "try --grid"),
        (["--grid", "LogT()", "--commit", "none"], "a looser setting"),
    ],
)
def test_a_rule_that_halts_nothing_says_why(
    words: list[str], why: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.sample("--n", "2", *words, "--halt", "Patience(99)")
    said = next(line for line in capsys.readouterr().err.splitlines() if "halted no sample" in line)
    assert why in said
    place.sample("--n", "2", *words[-2:], "--halt", "FixedSteps(1)")
    assert "halted no sample" not in capsys.readouterr().err


def test_training_says_how_often_it_reads_the_text_and_where_the_model_is(
    fresh: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh.train(small=SMALL[:-1])  # without --quiet
    err = capsys.readouterr().err
    assert re.search(r"\d+ rows of \d+ tokens, read [\d.]+ times; 33% of the text is kept for a judge; 10% of", err)
    assert err.rstrip().endswith(f"has the model: cdlm sample {fresh.run}")


def test_any_text_can_be_evaluated(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside samples: lines of JSON with a text alone, and a plain file with one text a line."""
    place.sample("--n", "2", "--out", str(tmp_path / "mine.jsonl"))
    (tmp_path / "theirs.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "a bird saw it."}\n')
    (tmp_path / "plain.txt").write_text("the dog sat by the river\nthe king saw it.\n")
    for name in ("theirs.jsonl", "plain.txt"):
        rest = ["--judge_steps", "3", "--mauve", "false", "--out", str(tmp_path / "table")]
        main(["evaluate", str(place.run), str(tmp_path / "mine.jsonl"), str(tmp_path / name), *rest])
        mine, other = json.loads((tmp_path / "table" / "evaluation.json").read_text())["rows"][:2]
        assert (mine["mean_nfe"], mine["steps"], mine["halted"]) == (6, 6, 0)
        assert (other["mean_nfe"], other["steps"], other["halted"]) == (None, None, None)
        assert other["n"] == 2
        assert other["ar_nll"] > 0
        assert other["mean_tokens"] > 3
        assert "nan" not in capsys.readouterr().out.lower()


def test_several_judges_read_the_same_samples(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="gguf is optional")
    pytest.importorskip("accelerate", reason="accelerate is optional")
    place.sample("--n", "3", "--out", str(tmp_path / "mine.jsonl"))
    other = write_gguf(tmp_path / "neutral.gguf")
    rest = ["--judge_steps", "3", "--splits", "0", "--judge", "own", str(other), "--out", str(tmp_path / "table")]
    main(["evaluate", str(place.run), str(tmp_path / "mine.jsonl"), *rest])
    found = json.loads((tmp_path / "table" / "evaluation.json").read_text())
    assert [judge["name"][:7] for judge in found["judges"]] == ["own GPT", "neutral"]
    assert all(row["judged"]["neutral"]["ar_nll"] > 0 for row in found["rows"])
    assert "AR-NLL (neutral)" in capsys.readouterr().out


def test_ways_to_sample_are_compared(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ways at two temperatures, of two seeds each, from files of samples to table and picture."""
    for way, steps in (("few", "3"), ("many", "6")):
        for temperature in ("0.9", "1"):
            for seed in ("0", "1"):
                out = tmp_path / way / f"{temperature}-{seed}.jsonl"
                rest = ["--n", "3", "--score-temperature", temperature, "--seed", seed, "--out", str(out), "--quiet"]
                main(["sample", str(place.run), "--steps", steps, *rest])
    ways, out = [str(tmp_path / "few"), str(tmp_path / "many")], tmp_path.parent / "frontier"
    for given in (ways, [str(tmp_path)]):
        main(["frontier", str(place.run), *given, "--rivals", "ma*", "--judge_steps", "3", "--out", str(out)])
    found = json.loads((out / "frontier.json").read_text())
    assert [(row["way"], row["n"], row["calls"]) for row in found["rows"]] == [("few", 6, 3)] * 2 + [("many", 6, 6)] * 2
    assert {row["point"] for row in found["rows"]} == {"score_temperature=0.9", "score_temperature=1.0"}
    assert [saving["way"] for saving in found["savings"]] == ["few"] * 2
    assert all(row["copied"] is None or 0 <= row["copied"] <= 1 for row in (*found["rows"], *found["real"]))
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "hardest rival" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["frontier", str(place.run), *ways, "--rivals", "mani"])
    assert "there is no way 'mani' (did you mean many?) to compare with: there is few, many" in capsys.readouterr().err


def test_commits_of_a_model_that_was_not_trained_for_them_are_warned_of(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "prefixes"
    shutil.copytree(place.run, other)
    settings = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"masking: .*", "masking: Prefix()", settings))
    words = ["--n", "1", "--steps", "2", "--commit", "Threshold(0.9)"]
    for run, more, warned in ((other, [], True), (other, ["--quiet"], False), (place.run, [], False)):
        main(["sample", str(run), *words, *more])
        assert ("masking Prefix(), under which it never saw single tokens given" in capsys.readouterr().err) == warned
    with pytest.warns(UserWarning, match="masking Prefix\\(\\), under which"):
        cdlm.generate(cdlm.load(other), n=1, steps=2, commit="Threshold(0.9)")
    cdlm.generate(cdlm.load(other), n=1, steps=2)
    cdlm.generate(cdlm.load(place.run), n=1, steps=2, commit="Threshold(0.9)")


def test_what_the_model_recommends_is_said_and_can_be_replaced(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "with-commits"
    shutil.copytree(place.run, other)
    config = json.loads((other / "config.json").read_text())
    config["sampling"] = {"steps": 3, "solver": "Ancestral()", "commit": "Threshold(0.7)"}
    (other / "config.json").write_text(json.dumps(config))
    for words, recommended in (([], True), (["--score-temperature", "0.9"], True), (["--steps", "3"], False)):
        main(["sample", str(other), "--n", "1", *words])
        said = capsys.readouterr().err
        assert ("as the model recommends; steps 3, grid Warped(), solver Ancestral()" in said) == recommended
        assert ("commit Threshold(tau=0.7)\n" in said) == recommended
        assert "of 3 steps" in said
    main(["sample", str(other), "--n", "1", "--quiet"])
    assert capsys.readouterr().err == ""
    config["sampling"] = {"solver": "Ancestral()  # \x1b[31m of a text only what it means is shown"}
    (other / "config.json").write_text(json.dumps(config))
    main(["sample", str(other), "--n", "1"])
    said = capsys.readouterr().err
    assert "as the model recommends; steps 200, grid Warped(), solver Ancestral()\n" in said
    assert "\x1b" not in said


def test_compare_samples_as_in_the_paper_whatever_a_model_recommends(place: Place, tmp_path: Path) -> None:
    other, out = tmp_path / "with-commits", tmp_path / "comparison"
    shutil.copytree(place.run, other)
    config = json.loads((other / "config.json").read_text())
    config["sampling"] = {"steps": 3, "solver": "Ancestral()", "commit": "Threshold(0.7)"}
    (other / "config.json").write_text(json.dumps(config))
    words = ["--rules", "FixedSteps(3)", "--n", "8", "--steps", "4", "--live", "0", "--fewer", "2", "--measure", "nats"]
    main(["compare", str(other), *words, "--judge_steps", "3", "--quiet", "--out", str(out)])
    rows = json.loads((out / "compare.json").read_text())["rows"]
    plain = [(row["family"], row["setting"]) for row in rows if row["family"] == "plain sampler, the same grid"]
    assert plain == [("plain sampler, the same grid", "2 steps, Warped(), Euler()")]


def test_a_model_without_a_grid_has_one_plain_sampler(masked: Place, tmp_path: Path) -> None:
    words = ["--rules", "FixedSteps(3)", "--n", "8", "--live", "0", "--fewer", "2", "4", "--measure", "nats"]
    main(["compare", str(masked.run), *words, "--judge_steps", "3", "--quiet", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    plain = [row["setting"] for row in rows if row["family"].startswith("plain sampler")]
    assert plain == ["2 steps", "4 steps"]


def test_a_judge_that_read_the_training_text_is_named(place: Place, tmp_path: Path) -> None:
    """Of an old run, whose text was not divided, and which has no real text like its training text to show."""
    old = tmp_path / "old"
    shutil.copytree(place.run, old)
    settings = (old / "config.yaml").read_text()
    settings = re.sub(r"(judge|unread)_share: .*", r"\1_share: 0.0", settings)
    (old / "config.yaml").write_text(settings)
    place.sample("--n", "2", "--out", str(tmp_path / "mine.jsonl"))
    for run, says in ((place.run, False), (old, True)):
        main(["evaluate", str(run), str(tmp_path / "mine.jsonl"), "--judge_steps", "3", "--splits", "0", "--quiet"])
        found = json.loads((run / "evaluation.json").read_text())
        assert any("copying that text is rewarded" in note for note in found["notes"]) == says
        assert all("copied" in row for row in found["rows"])
        assert ("like the training text" in str(found["rows"])) != says


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "Grams()"], "did you mean NGrams?"),
        (["--features", "NGrams(most=0)"], "most >= 1"),
        (["--splits", "-1"], "splits >= 0"),
        (["--mauve-seeds", "3"], "has no setting --mauve-seeds"),
        (["--judge", "missing.gguf"], "there is no file missing.gguf"),
        (["--judge", "own", "own"], "judges of different names"),
        (["--judge_steps", "0"], "judge_steps >= 1"),
    ],
    ids=" ".join,
)
def test_bad_settings_of_an_evaluation(
    more: list[str], message: str, place: Place, refused: Callable, tmp_path: Path
) -> None:
    place.sample("--n", "2", "--out", str(tmp_path / "mine.jsonl"))
    call = ["evaluate", str(place.run), str(tmp_path / "mine.jsonl"), "--judge_steps", "3", "--quiet"]
    assert message in refused(main, [*call, *more])


def test_a_run_can_be_resumed_with_more_steps(fresh: Place) -> None:
    fresh.train("--training.steps", "1")
    main(["train", "--resume", str(fresh.run), "--training.steps", "2", *QUIET])
    assert (fresh.run / "metrics.csv").read_text().splitlines()[-1].startswith("2,")


def test_short_names_are_those_of_the_settings(fresh: Place) -> None:
    short = ("--steps", "2", "--lr=1e-2", "--batch-size", "3", "--seed", "4", "--device", "cpu", "--devices", "1",
             "--width", "16", "--depth", "1", "--heads=2", "--dim", "8", "--length", "12", "--vocab-size", "271",
             "--validation-rows", "2", "--preview", "0", "--precision", "bf16", "--gates=true",
             "--final-lr-ratio", "0.5", "--quiet")  # fmt: skip
    fresh.train(small=short)
    made = read_run(fresh.run)
    assert made.system == CDCD(width=16, depth=1, heads=2, dim=8, gates=True)
    assert (made.batch_size, made.length, made.vocab_size, made.validation_rows) == (3, 12, 271, 2)
    options = made.training
    assert (options.steps, options.lr, options.seed, options.precision) == (2, 0.01, 4, "bf16")
    assert (options.accelerator, options.devices, options.final_lr_ratio) == ("cpu", 1, 0.5)


def test_training_says_on_which_device_it_runs_unless_it_is_quiet(
    fresh: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = tuple(word for word in SMALL if word != "--quiet")
    fresh.train("--log_every", "1", out="loud", small=loud)
    shown = capsys.readouterr()
    text, device, *_ = shown.err.splitlines()
    assert "rows of 16 tokens" in text
    assert device == "training on cpu"
    assert shown.out == ""
    fresh.train(out="quiet")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    shown = capsys.readouterr().out
    assert "usage: cdlm COMMAND" in shown
    for command in COMMANDS:
        assert f"  {command.name} " in shown
        assert command.help in shown


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"cdlm {cdlm.__version__}\n"
    assert cdlm.__version__ == version("cdlm")


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder of the project, with environment variables that are unset where they are empty."""
    environment = {key: value for key, value in {**os.environ, **variables}.items() if value}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", ["cdlm", "cdlm.cli"])
def test_the_package_is_a_program(module: str) -> None:
    done = python("-m", module, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cdlm {cdlm.__version__}\n", "")
    done = python("-m", module, "smaple")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cdlm: there is no command 'smaple' (did you mean sample?)")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_command_line_is_light_until_it_knows_its_command(arguments: list[str]) -> None:
    program = (
        f"from cdlm.cli.main import main; main({arguments}); import sys; print(*sorted({HEAVY} & set(sys.modules)))"
    )
    assert python("-c", program).stdout.splitlines()[-1] == ""


def test_a_training_onto_an_existing_run_is_refused_before_lightning_is_there(tmp_path: Path) -> None:
    checkpoint = tmp_path / CHECKPOINT
    checkpoint.parent.mkdir()
    checkpoint.touch()
    words = ["train", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path)]
    look = "import atexit, sys; atexit.register(lambda: print('lightning' in sys.modules))"
    done = python("-c", f"{look}; from cdlm.cli.main import main; main({words})")
    assert done.returncode == 2
    assert done.stderr.startswith(f"cdlm: {checkpoint} would be overwritten: go on with --resume {tmp_path}")
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("given", "expected"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_threads_wait_passively_before_torch_is_there(script: str, given: str, expected: str) -> None:
    """Where a command's module is imported, the variable is set and torch is not there yet, for either script."""
    program = (
        "import importlib, os, runpy, sys\n"
        "def look(module):\n"
        "    print(module, os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "    raise SystemExit(0)\n"
        "import cdlm.cli.main\n"
        "cdlm.cli.main.import_module = look\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    name = {"train.py": "cdlm.cli.train", "sample.py": "cdlm.cli.commands.sample"}[script]
    assert python("-c", program, OMP_WAIT_POLICY=given).stdout == f"{name} {expected} False\n"


def test_an_interrupt_is_one_line_and_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cdlm.cli.commands.replay.read_folder", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["replay", "x", "--halt", "Full()"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "cdlm: interrupted\n"


def test_quiet_prints_nothing_and_writes_everything(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    kept, out = tmp_path / "kept", tmp_path / "quiet.jsonl"
    place.sample("--n", "2", "--quiet")
    place.sample("--n", "2", "--quiet", "--out", str(out), "--record", str(kept), "--plot", str(tmp_path / "plot.png"))
    main(["replay", str(kept), "--halt", "Patience(2)", "--out", str(tmp_path / "replayed"), "--quiet"])
    assert capsys.readouterr() == ("", "")
    assert len(list((tmp_path / "replayed").iterdir())) == 1
    assert (tmp_path / "plot.png").exists()
    place.sample("--n", "2", "--quiet", "false", "--out", str(tmp_path / "loud.jsonl"))
    assert out.read_bytes() == (tmp_path / "loud.jsonl").read_bytes()


def test_the_device_is_named_before_the_progress(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    place.sample("--n", "2", "--device", "cpu")
    first, second, third, *_ = capsys.readouterr().err.splitlines()
    assert first == "device: cpu"
    assert "tokens to generate" in second
    assert third.startswith("samples: 2 of 2, ")


def test_places_that_cannot_be_written_are_found_before_any_work(
    place: Place, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdlm.api.open_session", lambda *_, **__: pytest.fail("at work"))
    (tmp_path / "file").write_text("x")
    for option, name in (("--out", "a.jsonl"), ("--plot", "a.png"), ("--record", "a")):
        below = tmp_path / "file" / name
        assert f"cannot write {below}" in refused(place.sample, option, str(below))


# --- shell completion ---


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """The script for each shell."""
    return {shell: completion.script(shell) for shell in completion.SHELLS}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command_and_setting(shell: str, scripts: dict[str, str]) -> None:
    for command in COMMANDS:
        assert command.name in scripts[shell]
    for words in ("--batch-size", "--quiet", "norm-causality", "fp32", "--training.validate-every"):
        assert words in scripts[shell] or shell == "tcsh"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cdlm sam", "sample"),
        ("cdlm sample --batch", "--batch-size"),
        ("cdlm sample --precision b", "bf16"),
        ("cdlm study norm-", "norm-causality"),
        ("cdlm completion z", "zsh"),
        ("cdlm train --training.validate", "--training.validate-every"),
        ("cdlm sample --out pypr", "pyproject.toml"),
    ],
)
def test_bash_completes(words: str, expected: str, scripts: dict[str, str]) -> None:
    last = len(words.split()) - 1
    program = f'{scripts["bash"]}\nCOMP_WORDS=({words}); COMP_CWORD={last}; _shtab_cdlm; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == ([expected], "")


def test_the_help_of_training_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    shown = capsys.readouterr().out
    for setting in ("--system SYSTEM", "Masked or Autoregressive", "--training.steps", "--resume"):
        assert setting in " ".join(shown.split()), setting


@pytest.mark.parametrize("name", list(inspect.signature(TrainOptions).parameters))
def test_the_help_of_training_describes_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split("how to train:")[1].split())
    described = shown.split(f"--training.{name.replace('_', '-')} ")[1].split("(type:")[0]
    assert len(described.split()) > 3, described


def test_the_help_of_training_tells_how_to_see_the_settings_of_a_system(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    assert "cdlm train --system.help Plaid" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as ended:
        main(["train", "--system.help", "Plaid"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in inspect.signature(Plaid).parameters:
        assert len(shown.split(f"  --system.{name} ")[1].split("(type:")[0].split()) > 3, name


def test_the_help_of_sampling_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    shown = capsys.readouterr().out
    for name in (*SOLVERS, *GRIDS, *PROJECTIONS, *POLICIES):
        assert re.search(rf"\b{name}\(", shown), name


# --- bad input: the words ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "there is no command 'smaple'"),
        (["--version?"], "there is no command"),
        (["train"], "--out DIR"),
        (["train", "--out", "a", "--resume", "b"], "b has no config.yaml"),
        (["train", "--out", "x", "--colour", "red"], "colour"),
        (["train", "--out", "x", "--system.colour", "red"], "colour"),
        (["train", "--out", "x", "--stpes", "5"], "no option --stpes: did you mean --steps (--training.steps)?"),
        (["train", "--out", "x", "--bacth-size", "5"], "did you mean --batch_size?"),
        (["train", "--out", "x", "--training.warm_up", "5"], "did you mean --training.warmup?"),
        (["train", "--out", "x", "--system", "Masked", "--axis", "log"], "axis"),
        (["train", "--resume", "a", "--start", "b"], "a has no config.yaml"),
        (["train", "--out", "x", "--start", "nowhere"], "nowhere is not a model folder"),
        (["train", "--out", "x", "--start"], "--start"),
        (["train", "--out", "x", "--training.steps", "many"], "steps"),
        (["train", "--out", "x", "--training.steps", "0"], "training needs a whole number steps >= 1"),
        (["train", "--out", "x", "--length", "0"], "a whole number length >= 1"),
        (["train", "--out", "x", "--batch_size", "-1"], "a whole number batch_size >= 1"),
        (["train", "--out", "x", "--masking", "Prefixx()"], "did you mean Prefix?"),
        (["train", "--out", "x", "--rows", "heap"], "rows"),
        (["train", "--out", "x", "--system.width", "18"], "try width=16"),
        (["train", "--out", "x", "--system.heads", "0"], "heads"),
        (["train", "--out", "x", "--system.axis", "round"], "axis"),
        (["train", "--out", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["train", "--out", "x", "--system", "plaid"],
            "no system 'plaid' (did you mean Plaid?): use one of CDCD, Plaid,",
        ),
        (["train", "--out", "x", "--system=Plade", "--system.dim", "8"], "no system 'Plade' (did you mean Plaid?)"),
        (["train", "--out", "x", "--source", "stories"], "no source 'stories' (did you mean Stories?): use one of"),
        (["train", "--text"], "--text"),
        (["train", "--out"], "--out"),
        (["sample"], "run"),
        (["sample", "nowhere"], "not a model folder"),
        (["sample", "nowhere", "--colour", "red"], "colour"),
        (["sample", "nowhere", "--n", "few"], "n"),
        (["evaluate", "nowhere", "nothing.jsonl"], "cannot read samples from nothing.jsonl"),
        (["evaluate", "nowhere"], "samples"),
        (["frontier", "nowhere", "nothing"], "nothing is no folder with .jsonl files"),
        (["frontier", "nowhere", "nothing", "--few", "0"], "few is a number of samples >= 1"),
        (["train-judge", "nowhere", "judge"], "no config.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words(
    arguments: list[str], message: str, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, arguments)
    assert list(tmp_path.iterdir()) == []


def test_either_a_new_run_or_an_old_one(place: Place, refused: Callable) -> None:
    assert "needs one run folder" in refused(main, ["train", "--out", "x", "--resume", str(place.run)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps >= 1"),
        (["--n", "0"], "n is the number of samples"),
        (["--batch_size", "0"], "batch_size"),
        (["--length", "-1"], "length"),
        (["--seed", "-1"], "seed"),
        (["--halt", "Pateince(20)"], "did you mean Patience?"),
        (["--halt", "Patience"], "Patience is written as a call in a halting rule: Patience(steps"),
        (["--halt", "patience"], "no halting rule 'patience' (did you mean Patience?)"),
        (["--halt", "Patience(0)"], "steps >= 1"),
        (["--halt", "__import__('os')"], "halting rule"),
        (["--solver", "Huen()"], "did you mean Heun?"),
        (["--grid", "LogTee()"], "did you mean LogT?"),
        (["--softmax_temperature", "0"], "softmax_temperature > 0"),
        (["--init_scale", "-1"], "init_scale"),
        (["--plot", "plot.jpg"], "cannot write a plot to plot.jpg: end its name in .pdf, .png, .svg"),
        (["--precision", "fp7"], "precision"),
        (["--device", "abacus"], "'abacus' cannot be used"),
        (["--devices", "0"], "devices"),
        (["--prompt", "the cat sat on the mat and the dog ran " * 9], "shorten it"),
        (["--prompt", "[17]"], "shorten it"),
        (["--prompt", "[99999999999999]"], "shorten it"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prompts", "empty.txt"], "empty.txt"),
        (["--prompts", "latin.txt"], "latin.txt"),
        (["--prompt", "a", "--prompts", "b"], "not both"),
        (["--out", "text.txt/below.jsonl"], "cannot write"),
        (["--plot", "text.txt/plot.png"], "plot.png"),
        (["--policy", "Threshold(0.9)"], "policy is a setting of masked models"),
        (["--temperature", "1"], "temperature is a setting of masked models"),
        (["--cfg_scale", "0"], "cfg_scale is a setting of masked models"),
        (["--cache", "dual"], "cache is a setting of masked models"),
        (["--new_tokens", "4"], "new_tokens is a setting of masked models"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_samples(
    arguments: list[str], message: str, place: Place, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "text.txt").write_text("x")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out.jsonl")]
    assert message in refused(place.sample, *arguments, *out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps >= 1"),
        (["--policy", "Treshold(0.9)"], "did you mean Threshold?"),
        (["--policy", "Threshold(-1.0)"], "0 <= tau <= 1"),
        (["--policy", "LLaDA(4)", "--steps", "4"], "a policy has its own steps"),
        (["--policy", "LLaDA(16, block=5)"], "block"),
        (["--temperature", "-1"], "temperature >= 0, got -1"),
        (["--cfg_scale", "-1"], "cfg_scale >= 0, got -1"),
        (["--cache", "dual"], "keeps no keys and values"),
        (["--new_tokens", "0"], "must be >= 1"),
        (["--new_tokens", "4", "--length", "9"], "no length"),
        (["--chat", "true", "--prompt", "a", "--new_tokens", "4"], "no chat template"),
        (["--chat", "true", "--prompt", "a"], "chat needs new_tokens"),
        (["--halt", "NormConvergence(0.1)"], "a masked model has none"),
        (["--solver", "Heun()"], "solver is a setting of continuous models"),
        (["--grid", "LogT()"], "grid is a setting of continuous models"),
        (["--init_scale", "1"], "init_scale is a setting of continuous models"),
        (["--guidance", "2"], "a setting of continuous models"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_samples_of_a_masked_model(
    arguments: list[str], message: str, masked: Place, refused: Callable, tmp_path: Path
) -> None:
    call = ["sample", str(masked.run), *arguments, "--out", str(tmp_path / "out.jsonl")]
    assert message in refused(main, call)
    assert list(tmp_path.iterdir()) == []


# --- bad input: the text ---


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.txt", None, "no file matches"),
        ("empty.txt", b"", "found none"),
        ("blank.txt", b"\n \n\n", "found none"),
        ("one.txt", b"the only line of this text\n", "two documents or more"),
        ("latin.txt", "the café\n".encode("latin-1") * 9, "expected UTF-8 text, but byte 7 is 0xe9"),
        ("book.pdf", b"%PDF", "unknown kind of file"),
        ("a.jsonl", b'{"text": "the cat"}\n{"story": "the dog"}\n', "line 2: expected a field 'text'"),
        ("b.jsonl", b'{"text": "the cat"}\n\n{"text": \n', "line 3: expected one JSON object"),
        ("c.jsonl", b'{"text": "the cat"}\n[1]\n', "line 2: expected an object"),
        ("d.csv", b"story\nthe cat\n", "expected a column 'text'"),
        ("short.txt", b"cat\ndog\n" * 2, "vocabulary"),
    ],
)
def test_bad_text(name: str, data: bytes | None, message: str, fresh: Place, refused: Callable) -> None:
    text = fresh.path / name
    if data is not None:
        text.write_bytes(data)
    assert message in refused(fresh.train, text=text)
    assert not fresh.run.exists()


def test_a_folder_is_no_text(fresh: Place, refused: Callable) -> None:
    assert "name its files" in refused(fresh.train, text=fresh.path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "100000"], "row"),
        (["--vocab_size", "100000"], "set vocab_size to"),
        (["--vocab_size", "100"], "at least 259"),
        (["--system.t_min", "20"], "t_min"),
        (["--system.t_min", "-1"], "t_min"),
        (["--system.dim", "0"], "dim"),
        (["--source.valid_fraction", "0.9"], "valid_fraction"),
        (["--source.field", "x", "--source.colour", "y"], "colour"),
        (["--cache", "text.txt"], "cache"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings(
    more: list[str], message: str, fresh: Place, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fresh.path)
    assert message in refused(fresh.train, *more)
    assert not fresh.run.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no texts"),
        ("{", "line 1: expected one JSON object a line"),
        ('{"words": "x"}', "line 1: expected a field 'text'"),
        ('{"text": 1}', "line 1: expected text in the field 'text', got int"),
        ('{"text": "x", "tokens": "x"}', "line 1: expected list or nothing, got text in 'tokens'"),
        ("[1]", "line 1: expected an object"),
        ("caf\xe9", "UTF-8"),
    ],
)
@pytest.mark.parametrize("mauve", [True, False], ids=["mauve", "without"])
def test_bad_sample_files(
    line: str,
    message: str,
    mauve: bool,
    place: Place,
    refused: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdlm.evaluation.metrics.mauve.is_installed", lambda: mauve)  # one line, whether it is or not
    (tmp_path / "mine.jsonl").write_bytes(line.encode("latin-1"))
    assert message in refused(main, ["evaluate", str(place.run), str(tmp_path / "mine.jsonl")])


def test_more_samples_than_held_out_text(place: Place, refused: Callable, tmp_path: Path) -> None:
    place.sample("--n", "2", "--out", str(tmp_path / "mine.jsonl"))
    line = (tmp_path / "mine.jsonl").read_text()
    (tmp_path / "many.jsonl").write_text(line * 500)
    call = ["evaluate", str(place.run), str(tmp_path / "many.jsonl"), "--mauve", "false", "--judge_steps", "3"]
    assert "rows of real text" in refused(main, call)


# --- bad input: resuming ---


def resume(place: Place, *more: str) -> None:
    main(["train", "--resume", str(place.run), "--training.steps", "5", *QUIET, *more])


def test_a_folder_without_a_run_cannot_be_resumed(fresh: Place, refused: Callable) -> None:
    assert "no config.yaml" in refused(resume, fresh)
    fresh.run.mkdir()
    assert "no config.yaml" in refused(resume, fresh)


@pytest.mark.parametrize(
    "change",
    [
        ["--system.width", "20"],
        ["--masking", "Prefix()"],
        ["--batch_size", "2"],
        ["--length", "8"],
        ["--training.seed", "9"],
    ],
    ids=" ".join,
)
def test_a_changed_run_cannot_be_resumed(change: list[str], place: Place, refused: Callable) -> None:
    before = (place.run / "model.safetensors").read_bytes()
    refused(resume, place, *change)
    assert (place.run / "model.safetensors").read_bytes() == before


def test_changed_data_cannot_be_resumed(fresh: Place, refused: Callable) -> None:
    fresh.train("--training.steps", "2")
    fresh.text.write_text(TEXT + "one more line about the cat.\n")
    shown = refused(resume, fresh)
    assert "data" in shown
    assert f"the content of Files(paths=('{fresh.text}',)" in shown


def test_what_may_change_when_resuming_and_how_to_go_on_otherwise(place: Place, refused: Callable) -> None:
    shown = refused(resume, place, "--batch-size", "2")
    assert "batch_size was 4, is 2" in shown
    assert "resuming may change steps" in shown
    assert f"--start {place.run}" in shown


def test_a_finished_run_says_so(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["train", "--resume", str(place.run)])
    assert capsys.readouterr().err == f"{place.run} is finished, at step 3: more steps continue it\n"


def test_a_run_is_resumed_or_started_from_another(place: Place, refused: Callable) -> None:
    assert "give one" in refused(main, ["train", "--resume", str(place.run), "--start", str(place.run)])


def test_a_run_is_not_overwritten(place: Place, refused: Callable) -> None:
    assert "would be overwritten" in refused(place.train)


def test_a_model_without_its_checkpoint_is_not_overwritten(place: Place, tmp_path: Path, refused: Callable) -> None:
    packed = tmp_path / "packed"
    main(["pack", str(place.run), str(packed), "--quiet"])
    before = (packed / "model.safetensors").read_bytes()
    assert f"the model in {packed} would be overwritten" in refused(place.train, out=str(packed))
    assert f"with --start {packed}, in another folder" in refused(main, ["train", "--resume", str(packed)])
    assert (packed / "model.safetensors").read_bytes() == before


def test_a_run_is_no_file(fresh: Place, refused: Callable) -> None:
    assert f"cannot write {fresh.text}, it is no folder" in refused(fresh.train, out=fresh.text.name)
