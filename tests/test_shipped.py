"""Models that come with the package: their names, their folders, and how a model is packed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runs import OPTIONS, SIZE

from cdlm import api
from cdlm.cli import main as command
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core import progress
from cdlm.core.errors import CdlmError
from cdlm.core.tensors import read_tensors, specs_of, write_tensors
from cdlm.data.sources import Files, Stories
from cdlm.models import hub, shipped
from cdlm.runs import caches
from cdlm.runs.config import RunConfig, read_run
from cdlm.runs.pack import TYPES, WeightType, pack
from cdlm.runs.train import RunText, train


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


def test_a_weight_that_half_precision_cannot_hold_is_refused(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "large", "fp32")
    file = tmp_path / "large" / "model.safetensors"
    tensors = {key: value.clone() for key, value in read_tensors(file).items()}
    name = next(key for key, value in tensors.items() if value.is_floating_point())
    tensors[name].view(-1)[0] = 1e6
    write_tensors(file, specs_of(tensors), {key: (lambda v=value: v) for key, value in tensors.items()})
    with pytest.raises(CdlmError, match=rf"{name} is too large .* take bf16"):
        pack(tmp_path / "large", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pack(tmp_path / "large", tmp_path / "out", "bf16")


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


def test_a_name_that_is_none_lists_those_that_are(toy: Path) -> None:
    with pytest.raises(CdlmError, match=r"models that come with cdlm \(toy\)"):
        api.load("tiy")


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
    text = RunText.of_run("stories")
    found = api.small_judge(text, 500)
    assert found.key == json.loads((shipped.FOLDER / "stories-judge" / "judge.json").read_text())["key"]
