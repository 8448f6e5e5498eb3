"""Results that rebuild themselves: definitions, runs with a runner that trains nothing, sealed files, strict pages."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from cdlm.core.errors import CdlmError
from rebuild import cli, document
from rebuild.commands import in_new_process, replaced
from rebuild.data import Data
from rebuild.definition import Quick, Table, read_table
from rebuild.filters import interval, number, percent, rank_correlation, spread
from rebuild.machine import origin
from rebuild.pages import LONGEST, Pages
from rebuild.run import Builder, files_of

ROOT = Path(__file__).parent.parent

SYSTEMS: dict[str, Any] = {
    "title": "A made-up table",
    "data": {"text_train.txt": "The corpus's training texts"},
    "each": {
        "system": {"A": {"train": "--width 8", "sample": "--steps 50"}, "B": {"train": "--width 9"}},
        "seed": [0, 1],
    },
    "models": {"model": '{system.train} --source.paths "[{text_train.txt}]" --training.seed {seed}'},
    "steps": [
        {"run": 'cdlm sample {model} --n 200 --halt "Patience(15)" --out {work}/{system}-{seed}.json', "name": "draw"},
        "cdlm compare {model*} --seed {seed} --out {work}/all-{seed}.json",
    ],
    "rows": [{"file": "{work}/{system}-{seed}.json", "where": {"kind": "samples"}}],
    "quick": {"each": {"seed": 1}, "replace": {"--n": 4, "--halt": None}, "append": {"train": "--training.steps 2"}},
}


class Machine:
    """A runner that trains nothing: each command leaves a checkpoint, or rows."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.break_at = -1

    def __call__(self, words: Sequence[str], threads: int, log: Path) -> None:
        self.ran.append(list(words))
        out = Path(words[words.index("--out" if "--out" in words else "--resume") + 1])
        if words[0] == "train":
            (out / "checkpoints").mkdir(parents=True, exist_ok=True)
            (out / "checkpoints" / "last.ckpt").touch()
        if len(self.ran) - 1 == self.break_at:
            raise CdlmError("interrupted")
        if words[0] != "train":
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result(words)))

    def commands(self, name: str) -> list[list[str]]:
        return [words for words in self.ran if words[0] == name]


def result(words: Sequence[str]) -> dict[str, Any]:
    rows = [
        {"kind": "samples", "model": words[1], "loss": float("nan"), "ar_nll": 1.5},
        {"kind": "real text", "ar_nll": 1},
    ]
    return {"judge": "own", "notes": ["few texts"], "trials": [{"a": 1}], "rows": rows}


def table_of(folder: Path, name: str = "systems", **changes: Any) -> Table:
    file = folder / f"{name}.yaml"
    content = {key: value for key, value in (SYSTEMS | changes).items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_table(file)


def builder(tmp_path: Path, machine: Callable[..., None], quick: bool = False) -> Builder:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "text_train.txt").write_text("some text\n")
    work = tmp_path / "runs"
    data = Data(tmp_path / "data", work / "data" if quick else None)
    return Builder(
        tmp_path, tmp_path / "json", work, data, machine, lambda: origin(tmp_path), quick, say=lambda text: None
    )  # fmt: skip


def built(tmp_path: Path, small: bool = False, **changes: Any) -> tuple[dict[str, Any], Machine]:
    machine = Machine()
    file = builder(tmp_path, machine, small).build(table_of(tmp_path / "tables", **changes))
    return document.read(file), machine


# --- definitions ---

CYCLE = {"a": {"run": "cdlm distill {b} {out}"}, "b": {"run": "cdlm distill {a} {out}"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"steps": [{"run": "cdlm sample {model}", "nam": "x"}]}, r"unknown key 'nam' \(did you mean name"),
        ({"steps": ["cdlm sample {modle}"]}, r"\{modle\} of step 1 stands for nothing \(did you mean model"),
        ({"steps": ["cdlm sample {system.smaple}"]}, "'A' of system has no 'smaple'"),
        ({"steps": ["cdlm sample {model} {system.sample}"]}, "'B' of system has no 'sample'"),
        ({"steps": ["rm -r {work}"]}, "expected a cdlm command in step 1"),
        ({"steps": ["cdlm sample 'open"]}, "cannot be split into words"),
        ({"steps": []}, "has no steps"),
        ({"title": 3}, "expected title of a table to be a str"),
        ({"threads": 0}, "expected threads >= 1"),
        ({"each": {"seed": 3}}, "expected each.seed to be a list of values"),
        ({"models": {"work": "--width 3"}}, "'work' is the name of two things"),
        ({"models": {"a": {"run": "cdlm distill {a} {out}"}}}, r"\{a\} of a stands for nothing"),
        ({"models": CYCLE}, r"\{b\} of a stands for nothing"),
        ({"models": {"a": {"run": "cdlm train-encoder x"}}}, r"write \{out\} once, as a word of its own"),
        ({"models": {"a": {"run": "cdlm train-encoder {out} {out}"}}}, r"write \{out\} once, as a word of its own"),
        ({"models": {"a": {"run": "cdlm train-encoder --out={out}"}}}, r"write \{out\} once, as a word of its own"),
        ({"rows": [{"file": "{work}/x.json", "only": {"system": "C"}}]}, "only names 'C' of system: it has A, B"),
        ({"images": {"a.png": "{wrok}/a.png"}}, r"\{wrok\} of image a.png stands for nothing \(did you mean work"),
        ({"quick": {"each": {"sead": [0]}}}, r"quick.each names a loop 'sead' \(did you mean seed"),
        ({"quick": {"replace": {"n": 3}}}, "expected an option such as --n"),
        ({"quick": {"append": {"sample": "--judge {juge}"}}}, r"\{juge\} of quick.append stands for nothing"),
    ],
)
def test_a_definition_that_is_wrong_is_told_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=message) as caught:
        table_of(tmp_path, **changes)
    assert "systems.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_yaml_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("title: [")
    with pytest.raises(CdlmError, match=r"cannot read a table from x\.yaml"):
        read_table(tmp_path / "x.yaml")


def test_every_definition_that_ships_is_read_and_small_in_its_quick_version() -> None:
    files = files_of(ROOT / "results" / "tables", ["all"])
    assert files
    for file in files:
        table = read_table(file)
        assert table.quick.append.keys() | table.quick.replace.keys(), f"{file.name} has no small version"


def test_loops_are_those_that_an_entry_mentions_itself_or_by_a_model(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    pairs = [{"system": s, "seed": i} for s in "AB" for i in (0, 1)]
    assert table.loops_of(table.models[0], quick=False) == pairs
    assert table.loops_of(table.steps[0], quick=False) == pairs
    assert table.loops_of(table.steps[1], quick=False) == [{"seed": 0}, {"seed": 1}]  # all models of a seed
    assert table.loops_of(table.steps[1], quick=True) == [{"seed": 1}]


def test_only_leaves_out_the_other_labels(tmp_path: Path) -> None:
    table = table_of(tmp_path, steps=[{"run": "cdlm evaluate {model} --out {work}/x.json", "only": {"system": "B"}}])
    assert table.loops_of(table.steps[0], quick=False) == [{"system": "B", "seed": 0}, {"system": "B", "seed": 1}]


def test_comments_and_layout_do_not_change_the_digest_and_values_do(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    file = tmp_path / "systems.yaml"
    file.write_text("# why\n" + file.read_text())
    assert read_table(file).digest == table.digest
    assert table_of(tmp_path, title="Another").digest != table.digest


# --- commands ---


def test_quick_replaces_options_where_they_are_given_takes_away_and_appends() -> None:
    quick = Quick({}, {"--n": "4", "--steps": "5 6", "--judge": None, "--halt": "x"}, {"compare": "--live 0"})
    words = ["compare", "run", "--n", "512", "--steps=9", "--quiet", "--judge", "a", "b", "--rules", "KL(1)"]
    expected = ["compare", "run", "--n", "4", "--steps", "5", "6", "--quiet", "--rules", "KL(1)", "--live", "0"]
    assert quick.change(words) == expected
    assert Quick({}, {"--score-temperature": "1"}).change(["sample", "--score_temperature", "2"])[2] == "1"


def test_places_fill_words_and_a_star_makes_several() -> None:
    places = {"a": ["/x y"], "m": ["/1", "/2"], "m*": ["/1", "/2"]}
    assert list(replaced(["{a}/f", "{m*}", "{n: 3}"], places)) == ["/x y/f", "/1", "/2", "{n: 3}"]
    for word in ("{m}", "{m*}/f", "{b}"):
        with pytest.raises(CdlmError, match="models here"):
            list(replaced([word], places))


def test_a_command_that_fails_shows_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "cdlm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, sys; print(os.environ['OMP_NUM_THREADS'], sys.argv[1:]); sys.exit(3)"
    )
    with pytest.raises(CdlmError, match=r"cdlm sample ended with exit code 3"):
        in_new_process(tmp_path)(["sample", "a b"], 2, tmp_path / "log.txt")
    assert "2 ['sample', 'a b']" in capsys.readouterr().err


# --- building ---


def test_a_table_keeps_its_rows_with_the_values_of_loops(tmp_path: Path) -> None:
    content, machine = built(tmp_path)
    assert [(row["system"], row["seed"], row["kind"]) for row in content["rows"]] == [
        (system, seed, "samples") for system in "AB" for seed in (0, 1)
    ]
    assert [len(machine.commands(name)) for name in ("train", "sample", "compare")] == [4, 4, 2]
    assert content["files"][0] == {"file": "{work}/{system}-{seed}.json", "system": "A", "seed": 0, "judge": "own",
                                   "notes": ["few texts"]}  # fmt: skip
    assert content["seeds"] == {"--training.seed": ["0", "1"], "--seed": ["0", "1"]}
    assert content["rows"][0]["loss"] is None  # NaN is no JSON


@pytest.mark.parametrize("small", [False, True])
def test_pictures_are_copied_into_the_documentation_by_the_real_version(small: bool, tmp_path: Path) -> None:
    images = tmp_path / "docs" / "images"
    built(tmp_path, small, images={"a.png": "{work}/all-1.json"})
    assert [file.name for file in images.iterdir()] == ["a.png"] if not small else not images.exists()
    with pytest.raises(CdlmError, match=r"there is no \{work\}/b.png to make the picture b.png of"):
        built(tmp_path, small, images={"b.png": "{work}/b.png"})


def test_a_table_names_no_path_of_this_machine(tmp_path: Path) -> None:
    content, machine = built(tmp_path)
    assert str(tmp_path) in str(machine.ran)
    assert str(tmp_path) not in json.dumps(content)
    assert [step["command"] for step in content["steps"]][::4] == [
        "cdlm sample {model} --n 200 --halt 'Patience(15)' --out {work}/{system}-{seed}.json".format(
            model="{model}", work="{work}", system="A", seed=0
        ),
        "cdlm compare {model*} --seed 0 --out {work}/all-0.json",
    ]
    assert content["rows"][2]["model"] == "{model-B-0}"


def test_a_table_says_where_its_numbers_come_from(tmp_path: Path) -> None:
    content, _ = built(tmp_path, threads=2)
    assert content["threads"] == 2
    assert content["versions"].keys() >= {"Python", "cdlm", "torch", "numpy", "transformers"}
    assert content["machine"].keys() == {"processor", "cores", "memory_gb", "system", "accelerators"}
    assert content.keys() >= {"date", "commit", "clean", "definition", "seconds"}
    assert content["data"]["text_train.txt"]["stand_in"] is False
    assert all("seconds" in model and "commit" in model for model in content["models"])


def test_a_model_is_trained_once_and_shared_by_name_and_command(tmp_path: Path) -> None:
    machine = Machine()
    at = builder(tmp_path, machine)
    first = document.read(at.build(table_of(tmp_path / "tables")))
    second = document.read(at.build(table_of(tmp_path / "tables", "other", title="Another")))
    assert len(machine.commands("train")) == 4
    assert second["models"] == first["models"]
    other = dict(SYSTEMS["models"], model=SYSTEMS["models"]["model"] + " --width 3")
    at.build(table_of(tmp_path / "tables", "third", models=other))
    assert len(machine.commands("train")) == 8


def test_two_builds_train_a_model_once(tmp_path: Path) -> None:
    machine = Machine()
    at, table = builder(tmp_path, machine), table_of(tmp_path / "tables")
    threads = [Thread(target=at.train, args=(table,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(machine.commands("train")) == 4


@pytest.mark.parametrize("file", ["data/text_train.txt", "small.yaml"])
def test_other_data_or_other_settings_give_another_model(file: str, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("width: 3\n")
    machine = Machine()
    at, table = builder(tmp_path, machine), table_of(tmp_path / "tables", models={
        "model": "--config small.yaml {system.train} --text {text_train.txt} --training.seed {seed}"
    })  # fmt: skip
    at.build(table)
    (tmp_path / file).write_text("width: 4\n")
    at.build(table)
    assert len(machine.commands("train")) == 8


CHAIN: dict[str, Any] = {
    "models": {
        "model": "{system.train} --training.seed {seed}",
        "students": {"run": "cdlm distill {model} {out} --steps 4 2"},
        "judge": {"run": "cdlm train-judge {students}/2 {out}", "only": {"system": "A"}},
    }
}
"""Each model is made of the one before it."""


class Maker(Machine):
    """Leaves a folder where `{out}` was."""

    def __call__(self, words: Sequence[str], threads: int, log: Path) -> None:
        if words[0] not in ("distill", "train-judge"):
            return super().__call__(words, threads, log)
        self.ran.append(list(words))
        Path(words[2]).mkdir(parents=True)
        return None


def test_a_model_may_be_made_of_models_before_it(tmp_path: Path) -> None:
    machine = Maker()
    made = builder(tmp_path, machine).train(table_of(tmp_path, **CHAIN))
    assert [(one["name"], one["system"], one["seed"]) for one in made] == [
        (name, system, seed) for name in CHAIN["models"] for system in ("AB" if name != "judge" else "A")
        for seed in (0, 1)
    ]  # fmt: skip
    trained = [words[words.index("--out") + 1] for words in machine.commands("train")]
    for words in machine.commands("distill"):
        assert words[1] in trained
        assert words[3:] == ["--steps", "4", "2"]  # no option that training alone knows
    students = [words[2] for words in machine.commands("distill")]
    assert {words[1] for words in machine.commands("train-judge")} == {f"{place}/2" for place in students[:2]}
    assert made[-1]["command"] == "cdlm train-judge {students}/2 {out}"
    again = Maker()
    builder(tmp_path, again).train(table_of(tmp_path, **CHAIN))
    assert not again.ran


def test_a_model_is_made_again_if_one_before_it_is_another(tmp_path: Path) -> None:
    places = builder(tmp_path, Maker()).places(table_of(tmp_path, **CHAIN)).folders
    loops = SYSTEMS["each"] | {"system": {"A": {"train": "--width 16"}, "B": {"train": "--width 9"}}}
    others = builder(tmp_path, Maker()).places(table_of(tmp_path, **CHAIN, each=loops)).folders
    changed = {label for label, place in places.items() if others[label] != place}
    assert changed == {label for label in places if "-A-" in label}


def test_a_model_of_one_that_is_not_made_is_refused_before_any_work(tmp_path: Path) -> None:
    models = {
        "model": {"train": "{system.train} --training.seed {seed}", "only": {"system": "A"}},
        "students": {"run": "cdlm distill {model} {out} --seed {seed} --loss {system}"},
    }
    with pytest.raises(CdlmError, match="is no models here"):
        builder(tmp_path, Maker()).places(table_of(tmp_path, models=models))


def test_an_interrupted_training_goes_on_and_all_its_time_counts(tmp_path: Path) -> None:
    machine = Machine()
    at, table = builder(tmp_path, machine), table_of(tmp_path / "tables")
    machine.break_at = 1
    with pytest.raises(CdlmError, match="interrupted"):
        at.build(table)
    file = next(tmp_path.glob("runs/models/model-A-1-*.json"))
    record = json.loads(file.read_text())
    assert record["finished"] is False
    file.write_text(json.dumps(record | {"seconds": 1000.0}))
    machine.ran.clear()
    machine.break_at = -1
    content = document.read(at.build(table))
    assert machine.ran[0] == ["train", "--resume", str(file.with_suffix(""))]
    assert len(machine.commands("train")) == 3  # the first was finished
    assert content["seconds"]["models"] >= 1000


def test_an_interrupted_table_goes_on_after_its_last_step(tmp_path: Path) -> None:
    machine = Machine()
    at, table = builder(tmp_path, machine), table_of(tmp_path / "tables")
    machine.break_at = 6  # four trainings, two samples
    with pytest.raises(CdlmError, match="interrupted"):
        at.build(table)
    machine.ran.clear()
    machine.break_at = -1
    at.build(table)
    assert [words[0] for words in machine.ran] == ["sample", "sample", "compare", "compare"]
    machine.ran.clear()
    at.build(table)  # one that is finished begins anew
    assert [words[0] for words in machine.ran] == ["sample"] * 4 + ["compare"] * 2


def test_steps_of_other_code_do_not_count_as_done(tmp_path: Path) -> None:
    machine = Machine()
    table = table_of(tmp_path / "tables")
    machine.break_at = 6
    with pytest.raises(CdlmError, match="interrupted"):
        builder(tmp_path, machine).build(table)
    (tmp_path / "cdlm").mkdir()
    (tmp_path / "cdlm" / "new.py").write_text("x = 1\n")
    machine.ran.clear()
    machine.break_at = -1
    builder(tmp_path, machine).build(table)
    assert len(machine.ran) == 6


def test_rows_that_are_not_there_are_told(tmp_path: Path) -> None:
    for rows, message in (
        ({"file": "{work}/{system}-{seed}.json", "where": {"kind": "sampels"}}, "no row with .*sampels"),
        ({"file": "{work}/{system}-{seed}.json", "at": "row"}, "nothing at row: there is judge, notes, trials, rows"),
        ({"file": "{work}/{system}-{seed}.json", "at": "judge"}, "no rows at judge"),
        ({"file": "{work}/nothing.json"}, r"has no nothing\.json"),
        ({"file": "{work}/A-0.json", "set": {"kind": "mine"}}, "a column 'kind' of its own"),
    ):
        with pytest.raises(CdlmError, match=message):
            built(tmp_path, rows=[rows])


def test_rows_may_be_a_whole_object_and_get_columns(tmp_path: Path) -> None:
    rows = [{"file": "{work}/{system}-{seed}.json", "at": ".", "set": {"name": "{system}, first"}, "only": {"seed": 0}}]
    content, _ = built(tmp_path, rows=rows)
    assert [(row["name"], row["judge"]) for row in content["rows"]] == [("A, first", "own"), ("B, first", "own")]


# --- the small version ---


def test_the_small_version_has_fewer_loops_and_other_values(tmp_path: Path) -> None:
    content, machine = built(tmp_path, small=True)
    assert content["quick"] is True
    assert {row["seed"] for row in content["rows"]} == {1}
    assert all(words[words.index("--n") + 1] == "4" and "--halt" not in words for words in machine.commands("sample"))
    assert all(words[words.index("--training.steps") + 1] == "2" for words in machine.commands("train"))
    assert "--n 4" in content["steps"][0]["command"]


def test_what_quick_takes_away_need_not_be_there(tmp_path: Path) -> None:
    quick = SYSTEMS["quick"] | {"replace": {"--judge": None}}
    steps = ["cdlm evaluate {model} --judge {judge.onnx} --out {work}/{system}-{seed}.json"]
    changes = {"steps": steps, "quick": quick, "data": SYSTEMS["data"] | {"judge.onnx": "the neutral judge"}}
    built(tmp_path, small=True, **changes)
    with pytest.raises(CdlmError, match=r"systems needs judge\.onnx \(the neutral judge\): put it into a folder"):
        built(tmp_path, **changes)


def test_files_are_made_up_in_the_small_version_alone(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is optional")
    names = {"a_train.txt": "A", "a_valid.txt": "A", "b.jsonl": "B", "judge.gguf": "a judge"}
    places = Data(None, tmp_path / "made").find("t", names)
    texts = {name: places[name].read_text().splitlines() for name in names if name != "judge.gguf"}
    assert texts["a_train.txt"] == sorted(texts["a_train.txt"]) != texts["a_valid.txt"]
    assert json.loads(texts["b.jsonl"][0]).keys() == {"text"}
    again = Data(None, tmp_path / "again").find("t", names)
    assert all(places[name].read_bytes() == again[name].read_bytes() for name in names)
    with pytest.raises(CdlmError, match=r"t needs a_train\.txt \(A\): put it into a folder"):
        Data(None).find("t", names)
    with pytest.raises(CdlmError, match=r"t needs judge\.onnx \(a judge\)"):
        Data(tmp_path, tmp_path).find("t", {"judge.onnx": "a judge"})


def test_small_results_never_take_the_place_of_real_ones(tmp_path: Path) -> None:
    folders = cli.Folders(tmp_path, tmp_path / "runs")
    table_of(folders.definitions)
    cli.run(folders, ["systems"], quick=True, data=None, runner=Machine())
    assert not (folders.definitions / "systems.json").exists()
    assert document.read(tmp_path / "runs" / "quick" / "systems.json")["quick"] is True
    assert document.read(tmp_path / "runs" / "quick" / "systems.json")["data"]["text_train.txt"]["stand_in"] is True


def test_unknown_tables_and_missing_data_are_told_before_any_work(tmp_path: Path) -> None:
    folders, machine = cli.Folders(tmp_path, tmp_path / "runs"), Machine()
    table_of(folders.definitions)
    with pytest.raises(CdlmError, match=r"there is no table 'sistems' \(did you mean systems"):
        cli.run(folders, ["sistems"], quick=False, data=None, runner=machine)
    with pytest.raises(CdlmError, match=r"text_train\.txt \(The corpus's training texts\)"):
        cli.run(folders, ["all"], quick=False, data=None, runner=machine)
    assert machine.ran == []


# --- sealed files ---


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_what_is_written_is_read_back_and_its_layout_is_free(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    document.write({"table": "t", "rows": [{"x": 0.1, "ü": None}]}, file)
    assert document.read(file)["rows"] == [{"x": 0.1, "ü": None}]
    changed(file, lambda content: None)
    assert document.read(file)["format"] == document.FORMAT


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: changed(file, lambda c: c["rows"][0].update(x=0.2)), "changed after it was written"),
        (lambda file: changed(file, lambda c: c.update(sha256="0")), "changed after it was written"),
        (lambda file: changed(file, lambda c: c.pop("sha256")), "changed after it was written"),
        (lambda file: changed(file, lambda c: c.update(format=7)), "has format 7, this version reads format 1"),
        (lambda file: changed(file, lambda c: c.pop("format")), "is not a table of results"),
        (lambda file: file.write_text(file.read_text()[:-9]), "truncated or no JSON"),
        (lambda file: file.write_text("[]"), "is not a table of results"),
        (lambda file: file.write_bytes(b"\xff"), "truncated or no JSON"),
        (lambda file: file.unlink(), "is not there"),
    ],
)
def test_a_file_that_is_not_as_it_was_made_is_refused(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "t.json"
    document.write({"table": "t", "rows": [{"x": 0.1}]}, file)
    spoil(file)
    with pytest.raises(CdlmError, match=message) as caught:
        document.read(file)
    assert "rebuild it with python results/build.py run t" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    document.write({"table": "t", "rows": []}, tmp_path / "u.json")
    with pytest.raises(CdlmError, match="holds the table 't'"):
        document.read(tmp_path / "u.json")


# --- pages ---

ROWS: list[dict[str, Any]] = [
    {"system": "A", "seed": 0, "ar_nll": 1.0, "ci": [0.9, 1.125], "share": 0.5, "calls": 64},
    {"system": "A", "seed": 1, "ar_nll": 2.0, "ci": None, "share": 0.25, "calls": 64},
    {"system": "real|text", "ar_nll": 0.5, "share": None},
]
FOOT = "{{ made_by('t') }}"


@pytest.fixture
def pages(tmp_path: Path) -> Callable[..., str]:
    """Renders a template of one table `t`."""
    content, _ = built(tmp_path)
    document.write({**content, "table": "t", "rows": ROWS}, tmp_path / "json" / "t.json")
    (tmp_path / "pages").mkdir()

    def render(text: str, foot: str = FOOT) -> str:
        (tmp_path / "pages" / "p.md").write_text(f"{text}\n{foot}\n")
        page = Pages(tmp_path / "pages", tmp_path / "json", tmp_path / "docs").render("p.md")
        return page.split("-->\n\n")[1].partition("\nMade by")[0].rstrip("\n")

    return render


def test_a_table_takes_its_cells_from_expressions(pages: Callable[..., str]) -> None:
    text = "{{ table('t', {'system': 'system', 'loss': 'ar_nll | interval(ci, 2)', 'share': 'share | percent(0)'}) }}"
    assert pages(text).splitlines() == [
        "| system | loss | share |", "| :-- | --: | --: |", "| A | 1.00 [0.90, 1.12] | 50 % |", "| A | 2.00 | 25 % |",
        "| real\\|text | - | - |",
    ]  # fmt: skip


def test_the_small_version_may_lack_a_row_that_a_page_asks_for(pages: Callable[..., str], tmp_path: Path) -> None:
    text = "{% for one in rows('t', system='C') %}{{ one.ar_nll }}{% else %}-{% endfor %}"
    with pytest.raises(CdlmError, match="no row with system 'C'"):
        pages(text)
    file = tmp_path / "json" / "t.json"
    document.write({**document.read(file), "quick": True}, file)
    page = Pages(tmp_path / "pages", tmp_path / "json", tmp_path / "docs").render("p.md")
    assert page.split("-->\n\n")[1].startswith("-")


def test_rows_of_a_group_are_one_line(pages: Callable[..., str]) -> None:
    columns = "{'s': 'system', 'loss': 'ar_nll | spread', 'n': 'calls', 'x': 'share | spread(1, percent=true)'}"
    lines = pages(f"{{{{ table('t', {columns}, by='system') }}}}").splitlines()
    assert lines[2:] == ["| A | 1.50 ± 0.71 | 64 | 37.5 ± 17.7 % |", "| real\\|text | 0.50 | - | - |"]
    assert (
        pages("{{ table('t', seed=1, system='A') }}").splitlines()[0]
        == "| system | seed | ar_nll | ci | share | calls |"
    )
    assert pages("{{ table('t', ['system', 'calls'], seed=[1]) }}").splitlines()[2:] == ["| A | 64 |"]


def test_sentences_take_numbers_from_rows_and_files(pages: Callable[..., str]) -> None:
    assert pages("{{ row('t', system='A', seed=0).ar_nll | number(3) }}") == "1.000"
    assert pages("{{ values('t', 'ar_nll', system='A') | spread(1) }}") == "1.5 ± 0.7"
    assert pages("{{ about('t', system='B').notes[0] }}") == "few texts"
    assert pages("{% for r in rows('t', system='A') %}{{ r.seed }}{% endfor %}.") == "01."


def test_a_page_can_name_the_commit_of_a_table(pages: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "json" / "t.json"
    for commit, said in (("0123456789abcdef", "0123456789"), (None, "none")):
        document.write({**document.read(file), "commit": commit}, file)
        assert pages("{{ commit('t') }}") == said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ table('u', ['x']) }}", r"u\.json is not there"),
        ("{{ table('t', ['ar_nl']) }}", r"no column 'ar_nl' \(did you mean ar_nll"),
        ("{{ table('t', {'x': 'ar_nl | number'}) }}", "no column 'ar_nl'"),
        ("{{ table('t', ['ar_nll'], by='sytem') }}", "no column 'sytem'"),
        ("{{ table('t', ['ar_nll'], by='system') }}", "use a filter such as spread"),
        ("{{ table('t', {'x': 'ar_nll | number'}, by='system') }}", "got 2 that differ: use spread"),
        ("{{ row('t', system='C') }}", "no row with system 'C' here: there is 'A'"),
        ("{{ row('t', sytem='A') }}", r"no column 'sytem' \(did you mean system"),
        ("{{ row('t', system='A') }}", "2 rows with"),
        ("{{ row('t', seed=0).ar_nl | number }}", r"the row has no column 'ar_nl' \(did you mean ar_nll"),
        ("{{ row('t', system='real|text').share | percent }}", "it was not measured"),
        ("{{ row('t', seed=0).system | number }}", "expected a number, got 'A'"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ 1 | round_up }}", "No filter named 'round_up'"),
        ("{{ table('t' }}", "unexpected '}'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_asks_for_what_is_not_there_is_told_its_line(
    text: str, message: str, pages: Callable[..., str]
) -> None:
    with pytest.raises(CdlmError, match=message) as caught:
        pages(f"one\ntwo\n{text}")
    assert str(caught.value).startswith("results/pages/p.md, line 3: ")
    assert "\n" not in str(caught.value)


def test_numbers_without_their_origin_and_long_pages_are_refused(pages: Callable[..., str]) -> None:
    with pytest.raises(CdlmError, match=r"has no made_by\('t'\)"):
        pages("{{ table('t', ['ar_nll']) }}", foot="")
    with pytest.raises(CdlmError, match=f"more than {LONGEST}"):
        pages("\n" * LONGEST)


def test_the_origin_says_how_to_rebuild(tmp_path: Path, pages: Callable[..., str]) -> None:
    pages("")
    page = Pages(tmp_path / "pages", tmp_path / "json", tmp_path / "docs").render("p.md")
    assert "Made by `python results/build.py run t` on 20" in page
    assert "torch 2." in page
    assert "1 thread" in page


def test_numbers_look_alike_everywhere() -> None:
    assert [number(0.935, 2), number(0.0046, 3, sign=True), percent(0.9461), percent(-0.01, 0, True)] == [
        "0.94", "+0.005", "94.6 %", "-1 %"
    ]  # fmt: skip
    assert interval(0.93, [0.91, 0.96]) == "0.93 [0.91, 0.96]"
    assert interval(0.5, [0.25, 0.75], 0, percent=True) == "50 % [25, 75]"
    assert [spread([1.0, 3.0], 1), spread([2, 2]), spread(2.5, 1)] == ["2.0 ± 1.4", "2.00", "2.5"]


# --- check ---


@pytest.fixture
def house(tmp_path: Path) -> cli.Folders:
    """A checkout with one table and one page, built and rendered."""
    folders = cli.Folders(tmp_path, tmp_path / "runs")
    table_of(folders.definitions, data={}, models={"model": "{system.train} --training.seed {seed}"})
    templates = tmp_path / "results" / "pages" / "studies"
    templates.mkdir(parents=True)
    (templates / "p.md").write_text("{{ table('systems', ['system', 'ar_nll']) }}\n{{ made_by('systems') }}\n")
    cli.run(folders, ["all"], quick=False, data=None, runner=Machine())
    cli.render(folders, quick=False)
    return folders


def faults_of(folders: cli.Folders) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    return cli.check(folders, warnings.append), warnings


def test_a_rendered_page_equals_its_rendering(house: cli.Folders) -> None:
    assert faults_of(house) == ([], [])
    page = house.root / "docs" / "studies" / "p.md"
    page.write_text(page.read_text().replace("1.5", "1.4"))
    [fault], _ = faults_of(house)
    assert "docs/studies/p.md is not what results/pages/studies/p.md gives" in fault


def test_a_number_changed_by_hand_is_a_fault(house: cli.Folders) -> None:
    changed(house.definitions / "systems.json", lambda content: content["rows"][0].update(ar_nll=1.4))
    faults, _ = faults_of(house)
    assert all("changed after it was written" in fault for fault in faults)
    assert len(faults) == 2  # the table, and the page that shows it


def test_a_definition_that_changed_is_a_warning(house: cli.Folders) -> None:
    table_of(house.definitions, data={}, models={"model": "{system.train} --training.seed {seed}"}, title="New")
    faults, [warning] = faults_of(house)
    assert faults == []
    assert "systems.yaml has changed since systems.json was made" in warning


def test_another_small_version_makes_no_table_stale(house: cli.Folders) -> None:
    quick = SYSTEMS["quick"] | {"replace": {"--n": 5}}
    table_of(house.definitions, data={}, models={"model": "{system.train} --training.seed {seed}"}, quick=quick)
    assert faults_of(house) == ([], [])


def test_a_page_that_waits_for_its_table_is_no_fault_until_it_was_rendered(house: cli.Folders) -> None:
    page, table = house.root / "docs" / "studies" / "p.md", house.definitions / "systems.json"
    table.unlink()
    [fault], _ = faults_of(house)
    assert "systems.json is not there" in fault
    for text in ("written by hand\n", None):
        page.unlink() if text is None else page.write_text(text)
        faults, [warning] = faults_of(house)
        assert faults == []
        assert warning.startswith("skipped: ")


def test_the_command_line_ends_with_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "nosuch", "--work", str(tmp_path)])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("results: there is no table 'nosuch'")
    assert shown.count("\n") == 1


def test_tables_and_pages_of_this_checkout_are_as_they_were_made() -> None:
    assert cli.check(cli.Folders(ROOT, ROOT / "runs" / "results"), warn=lambda text: None) == []


def test_the_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 8, 7, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    assert rank_correlation([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
