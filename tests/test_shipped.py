"""Models that come with the package: their names, their folders, and how a model is packed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runs import OPTIONS, SIZE
from toys import VOCAB, tokenizer

import cdlm
from cdlm import api
from cdlm.cli import main as command
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.elf import ELF
from cdlm.core import progress
from cdlm.core.errors import CdlmError
from cdlm.core.tensors import read_tensors, specs_of, write_tensors
from cdlm.data.sources import Files, Stories
from cdlm.evaluation.evaluate import Distances
from cdlm.evaluation.texts import REAL, entries_of
from cdlm.models import hub, shipped
from cdlm.runs import caches
from cdlm.runs.config import RunConfig, read_run
from cdlm.runs.pack import TYPES, WeightType, pack
from cdlm.runs.train import RunText, card, train
from rebuild.ship import check_judge


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text of a file, whose absolute path is in its settings."""
    place = tmp_path_factory.mktemp("pack")
    text = place / "text.txt"
    text.write_text("\n".join(Stories(n=60).documents("train")))
    config = RunConfig(
        source=Files(paths=(str(text),)), system=CDCD(**SIZE), vocab_size=300, length=16, batch_size=4,
        validation_rows=20, preview=0, cache=str(place / "cache"), training=OPTIONS,
    )  # fmt: skip
    train(config, place / "run", progress=False)
    return place / "run"


# --- packing ---


@pytest.mark.parametrize("name", TYPES)
def test_a_packed_model_is_the_model_with_rounded_weights(name: WeightType, run: Path, tmp_path: Path) -> None:
    command.main(["pack", str(run), str(tmp_path / "out"), "--dtype", name, "--quiet"])
    before, after = hub.read(run).weights, hub.read(tmp_path / "out").weights
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value.to(TYPES[name])) for key, value in before.items())
    first, second = (api.load(place) for place in (run, tmp_path / "out"))
    assert first.preset == second.preset
    texts = [api.generate(model, n=2, steps=4, seed=0).texts for model in (first, second)]
    assert texts[0] == texts[1] or name != "fp32"


def test_a_packed_model_has_nothing_of_this_machine(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "out")
    assert str(run.parent) in (run / "config.yaml").read_text()
    told = "".join(file.read_text() for file in (tmp_path / "out").glob("*.[jmy]*") if file.suffix != ".safetensors")
    assert str(run.parent) not in told
    assert read_run(tmp_path / "out").source == Files(paths=("text.txt",))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "config.json", "config.yaml", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_packing_twice_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for name in "ab":
        pack(run, tmp_path / name)
    pack(tmp_path / "a", tmp_path / "c")  # rounded weights are not rounded again
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1] == files[2]


def flow(place: Path, encoder: str) -> Path:
    """A run folder of a model that names the folder of an encoder, with the card that training writes."""
    system = ELF(encoder=encoder, encoder_dim=8, encoder_hash="of one", width=16, depth=1, heads=2).build(VOCAB)
    system.tokenizer, system.length = tokenizer(), 8
    config = RunConfig(system=ELF(encoder=encoder, encoder_dim=8, encoder_hash="of one"), length=8)
    system.save_pretrained(place, f"{card(config, system, 1)}\n\nMade with {encoder}/more.")
    (place / "config.yaml").write_text(config.to_yaml())
    return place


def test_a_card_and_a_packed_model_name_no_folder_of_an_encoder(tmp_path: Path) -> None:
    encoder = str(tmp_path / "a b\u00e9" / "encoder")
    run = flow(tmp_path / "flow", encoder)
    assert str(tmp_path) not in (run / "README.md").read_text().replace(f"{encoder}/more", "")
    pack(run, tmp_path / "out")
    told = "".join(file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix != ".safetensors")
    assert str(tmp_path) not in told
    assert "Made with encoder/more." in told
    assert api.load(tmp_path / "out").config["encoder"] == "encoder"  # pyright: ignore[reportAttributeAccessIssue]
    assert read_run(tmp_path / "out").system.encoder == "encoder"  # pyright: ignore[reportAttributeAccessIssue]


def test_settings_of_a_packed_model_mean_what_those_of_the_run_mean(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "a")
    for text in ("1e5", "0o17", "on"):
        config = replace(read_run(run), source=Files(paths=(text,)))
        (tmp_path / "a" / "config.yaml").write_text(config.to_yaml())
        pack(tmp_path / "a", tmp_path / text)
        assert read_run(tmp_path / text).source == config.source


def with_weights(folder: Path, value: float) -> str:
    """Put a value into the weights of a folder; returns the name of its tensor."""
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in read_tensors(file).items()}
    name = next(key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim())
    tensors[name].view(-1)[0] = value
    write_tensors(file, specs_of(tensors), {key: (lambda v=tensor: v) for key, tensor in tensors.items()})
    return name


@pytest.mark.parametrize(("value", "narrow", "wide"), [(1e6, "fp16", "bf16"), (3.4e38, "bf16", "fp32")])
@pytest.mark.parametrize("kind", ["model", "judge"])
def test_a_weight_that_a_type_cannot_hold_is_refused(
    kind: str, value: float, narrow: WeightType, wide: WeightType, run: Path, tmp_path: Path, capsys: Any
) -> None:
    source = run if kind == "model" else shipped.FOLDER / "stories-judge"
    large, out = str(tmp_path / "large"), str(tmp_path / "out")
    command.main(["pack", str(source), large, "--dtype", "fp32", "--quiet"])
    name = with_weights(tmp_path / "large", value)
    with pytest.raises(SystemExit) as ended:
        command.main(["pack", large, out, "--dtype", narrow])
    assert ended.value.code == 2
    assert re.search(rf"{name} is too large .* take {wide}\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    command.main(["pack", large, out, "--dtype", wide, "--quiet"])
    assert read_tensors(tmp_path / "out" / "model.safetensors")[name].view(-1)[0].isfinite()


def test_what_cannot_be_loaded_is_not_packed(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "broken", "fp32")
    name = with_weights(tmp_path / "broken", torch.nan)
    with pytest.raises(CdlmError, match=rf"{name}.* no numbers"):
        pack(tmp_path / "broken", tmp_path / "out")
    file = tmp_path / "broken" / "config.json"
    file.write_text(file.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(CdlmError, match="copy"):
        pack(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_packed_judge_has_its_card(tmp_path: Path) -> None:
    source = shipped.FOLDER / "stories-judge"
    command.main(["pack", "stories-judge", str(tmp_path / "out"), "--quiet"])
    for name in ("README.md", "judge.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_folder_that_is_there_is_not_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(CdlmError, match="is there already"):
            pack(run, place)


# --- the cache ---


def test_the_environment_names_the_cache_in_place_of_the_default(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CDLM_CACHE", str(tmp_path / "here"))
    assert caches.place_of(caches.DEFAULT) == tmp_path / "here"
    assert caches.place_of(str(tmp_path / "named")) == tmp_path / "named"
    monkeypatch.delenv("CDLM_CACHE")
    assert caches.place_of(caches.DEFAULT) == Path(caches.DEFAULT).expanduser()


def test_a_cache_that_cannot_be_made_is_told_with_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(CdlmError, match=r"none/cache cannot be made: set CDLM_CACHE to a folder"):
        caches.place_of(str(tmp_path / "none" / "cache"))
    monkeypatch.setenv("CDLM_CACHE", "x" * 5000)
    with pytest.raises(CdlmError, match="cannot be made"):
        caches.place_of(caches.DEFAULT)
    (tmp_path / "full").mkdir()
    assert caches.place_of(str(tmp_path / "full")) == tmp_path / "full"  # it may be read
    (tmp_path / "file").write_text("")
    with pytest.raises(CdlmError, match="cannot be made"):
        caches.place_of(str(tmp_path / "file" / "cache"))


# --- names ---


@pytest.fixture
def toy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with one model, `toy`; the working directory is an empty folder."""
    pack(run, tmp_path / "package" / "toy")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package")
    shipped.names.cache_clear()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "package" / "toy"
    shipped.names.cache_clear()


def test_a_model_of_the_package_is_loaded_by_its_name(toy: Path) -> None:
    model = api.load("toy")
    assert (model.folder, model.name) == (toy, "toy")
    assert read_run("toy") == read_run(toy)


def test_a_packed_model_recommends_the_sampler_that_is_named(toy: Path, tmp_path: Path, capsys: Any) -> None:
    command.main(["pack", "toy", str(tmp_path / "a"), "--steps", "7", "--solver", "Euler()", "--guidance", "1.5"])
    model = api.load(tmp_path / "a")
    assert dict(model.preset) == {"steps": 7, "solver": "Euler()", "guidance": 1.5}
    assert api.generate(model, n=1).budget == 7
    pack(tmp_path / "a", tmp_path / "b")
    assert api.load(tmp_path / "b").preset == model.preset
    for words, why in (
        (["--policy", "LLaDA()"], "policy"),
        (["--solver", "Heun("], "Heun"),
        (["--steps", "0"], "steps"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.main(["pack", "toy", str(tmp_path / "c"), *words])
        assert why in capsys.readouterr().err
        assert not (tmp_path / "c").exists()


def test_a_judge_recommends_no_sampler(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["pack", "stories-judge", str(tmp_path / "a"), "--steps", "7"])
    assert "is a judge" in capsys.readouterr().err


def test_a_folder_of_that_name_goes_before_it_and_a_line_says_so(
    toy: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(progress, "_announced", [])
    pack(run, "toy", "fp32")
    assert api.load("toy").folder == Path("toy")
    progress.show_announced()
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"toy is your folder {Path('toy').absolute()}, not the model" in line


def test_judges_are_not_named_where_a_language_model_is_asked_for() -> None:
    with pytest.raises(CdlmError, match=r"models that come with cdlm \((?!.*judge)[\w, -]*stories-masked\)"):
        api.load("storys")


def test_a_name_that_is_none_lists_those_that_are(toy: Path) -> None:
    with pytest.raises(CdlmError, match=r"did you mean toy.*models that come with cdlm \(toy\)"):
        api.load("tiy")


@pytest.mark.parametrize("name", ["x" * 5000, f"user/{'x' * 5000}", "", "a\0b", "toy\ud800"])
def test_a_name_that_none_can_have_is_told_in_one_line(name: str, toy: Path) -> None:
    with pytest.raises(CdlmError, match=r"^.+$"):
        api.load(name)


@pytest.mark.parametrize("place", [".", "../{}"])
def test_a_model_in_the_working_directory_has_the_name_of_its_folder(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(run, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert api.load(place.format("mine")).name == "mine"


def test_nothing_is_written_into_the_package(toy: Path, capsys: Any) -> None:
    before = sorted(toy.parent.rglob("*"))
    for words in (["calibrate", "toy", "--n", "8"], ["evaluate", "toy", "x.jsonl"]):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 2
    assert "comes with cdlm" in capsys.readouterr().err
    assert sorted(toy.parent.rglob("*")) == before
    assert not list(Path().iterdir())


# --- what ships ---


@pytest.mark.parametrize("name", shipped.names())
def test_what_ships_has_a_card_its_commands_and_numbers_and_half_precision(name: str) -> None:
    folder = shipped.FOLDER / name
    assert "## Licence" in (folder / "README.md").read_text()
    made = json.loads((folder / "made.json").read_text())
    assert "cdlm pack {" in made["models"][-1]["command"]
    weights = read_tensors(folder / "model.safetensors").values()
    assert {value.dtype for value in weights if value.is_floating_point()} == {torch.float16}


THREADS = """
from threading import Thread
import cdlm
names, failed = [], []
def work():
    try:
        names.append(cdlm.load("stories").name)
    except BaseException as error:
        failed.append(repr(error))
threads = [Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(failed, names)
"""


def test_threads_may_load_at_once_before_anything_was_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.stdout == f"[] {['stories'] * 4}\n", done.stderr


def test_all_that_ships_has_less_than_12_mb() -> None:
    assert sum(file.stat().st_size for file in shipped.FOLDER.rglob("*") if file.is_file()) < 12_000_000


@pytest.mark.parametrize("name", ["stories", "stories-masked", "e2e"])
def test_what_ships_writes_text(name: str) -> None:
    samples = api.generate(api.load(name), n=2, seed=0)
    assert all(len(text.split()) > 3 for text in samples.texts)


def test_the_model_of_problems_solves_an_easy_one() -> None:
    problem = "Mary has 13 stamps. She gets 2 more. How many stamps has Mary now?\n"
    found = api.generate(api.load("arithmetic"), [problem], policy="Threshold(0.9)", temperature=0.0)
    assert found[0].text.removeprefix(problem).strip() == "13 + 2 = 15. #### 15"


def test_a_model_of_answers_without_a_question_says_what_it_needs(capsys: Any) -> None:
    command.main(["sample", "arithmetic", "--n", "1", "--device", "cpu"])
    assert "no sample has any text" in capsys.readouterr().err
    command.main(["sample", "stories", "--n", "1", "--steps", "8", "--device", "cpu"])
    assert "any text" not in capsys.readouterr().err


def test_the_judge_of_stories_is_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CDLM_CACHE", str(tmp_path))
    own = api.small_judge(RunText.of_run("stories"))
    key = json.loads((shipped.FOLDER / "stories-judge" / "judge.json").read_text())["key"]
    assert key == own.key
    check_judge(shipped.FOLDER / "stories-judge", key, Path("stories"))


def test_evaluate_is_the_command_without_files(tmp_path: Path) -> None:
    model = cdlm.load("stories", device="cpu")
    samples = cdlm.generate(model, n=8, steps=8)
    distances = Distances(splits=0)
    found = cdlm.evaluate(model, {"drawn": samples, "words": ["A dog."] * 9}, distances=distances, device="cpu")
    (tmp_path / "words.txt").write_text("A dog.\n" * 8)
    files = [str(samples.save(tmp_path / "drawn.jsonl")), str(tmp_path / "words.txt")]
    command.main(["evaluate", "stories", *files, "--splits", "0", "--device", "cpu", "--out", str(tmp_path), "--quiet"])
    written = json.loads((tmp_path / "evaluation.json").read_text())
    for row in written["rows"]:
        row["name"] = row["name"].removeprefix(f"{tmp_path.name}/")
    ours = json.loads(json.dumps(found.to_dict()))
    assert ours == written | {"notes": ours["notes"]}
    assert str(found) == found.terminal()


@pytest.mark.parametrize("texts", ["a text", [], {}, {"none": []}, {"some": ["a"], "none": []}], ids=repr)
def test_no_texts_are_not_evaluated(texts: Any) -> None:
    with pytest.raises(CdlmError, match="expected"):
        cdlm.evaluate(cdlm.load("stories", device="cpu"), texts)


@pytest.mark.parametrize("texts", [7, None, [7], [["a"]]], ids=repr)
def test_what_are_no_texts_is_refused(texts: Any) -> None:
    unchecked = getattr(entries_of, "__wrapped__", entries_of)  # types speak first here
    with pytest.raises(CdlmError, match="expected"):
        unchecked(texts, "samples")


@pytest.mark.parametrize("name", ["", " ", *REAL.values(), "tokens shuffled", "unigram salad"])
def test_each_row_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(CdlmError, match="name"):
        cdlm.evaluate(cdlm.load("stories", device="cpu"), {name: ["A dog."]}, distances=Distances(splits=0))


def test_samples_of_a_model_with_another_tokenizer_are_read_as_texts() -> None:
    model, other = cdlm.load("stories", device="cpu"), cdlm.load("arithmetic", device="cpu")
    drawn = cdlm.generate(other, ["Tom has 3 balls. He buys 4. How many balls has Tom now?\n"], n=2)
    distances, ours = Distances(splits=0), cdlm.generate(model, n=2, steps=4)
    found = cdlm.evaluate(model, {"ours": ours, "theirs": drawn}, distances=distances, device="cpu")
    texts = cdlm.evaluate(model, {"texts": drawn.texts}, distances=distances, device="cpu")
    assert "theirs has tokens of another tokenizer" in found.notes[0]
    assert not [note for note in found.notes if note.startswith("ours")]
    assert not [note for note in texts.notes if "tokenizer" in note]


def test_a_judge_of_other_defaults_does_not_ship(run: Path, tmp_path: Path) -> None:
    """A table is read by the judge that `own` means; the one beside it in the package has to be that one."""
    key = api.small_judge(RunText.of_run(run), 499).key
    with pytest.raises(CdlmError, match=r"another judge than `--judge own` trains"):
        check_judge(tmp_path / "judge", key, run)
