"""What a `config.yaml` of a run folder, or a word of the command line, can do: name a setting, and nothing else."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from cdlm.core.errors import CdlmError
from cdlm.core.plain_yaml import DEEPEST, LARGEST, mapping_of
from cdlm.data.sources import Files, Stories
from cdlm.runs import caches
from cdlm.runs.config import RunConfig, as_yaml, parse_run, path_of, read_run, run_arguments

NAMES = ["planted.Planted", "cdlm.data.sources.os.system", "planted:Planted"]
PLACES = [
    "source: {}", "system: {}", "source: {{class_path: {}}}", "system: {{class_path: {}}}", "source.class_path: {}",
    "source: {{class_path: {}, init_args: {{n: 3}}}}", "source: {{init_args: {{class_path: {}}}}}",
    "source: {{n: {{class_path: {}}}}}", "source: {{class_path: Stories, init_args: {{n: {{class_path: {}}}}}}}",
    "source: {{class_path: Files, init_args: {{paths: [{{class_path: {}}}]}}}}", "length: {{class_path: {}}}",
    "training: {{lr: {{class_path: {}}}}}", "training: {}", "config: {}", "class_path: {}", "source: !!python/name:{}",
    "source: !!python/object/apply:{} []", "tokenizer: !!python/object/new:{} []", "cache: {{class_path: {}}}",
    "source: {{class_path: Stories, dict_kwargs: {{n: {}}}}}", "__path__: {}", "masking: {}", "rows: {}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file when it is imported, in a place that is importable."""
    ran = tmp_path / "ran"
    source = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Planted:\n    pass\n"
    (tmp_path / "planted.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ran


@pytest.mark.parametrize(("place", "name"), list(product(PLACES, NAMES)))
def test_no_class_of_others_is_imported_or_built(place: str, name: str, tmp_path: Path, planted: Path) -> None:
    (tmp_path / "config.yaml").write_text(place.format(name) + "\n")
    with pytest.raises(CdlmError, match=r"config\.yaml") as raised:
        read_run(tmp_path)
    assert "\n" not in str(raised.value)
    assert not planted.exists()
    assert "planted" not in sys.modules


OPTIONS = ["--source", "--system", "--source.class_path", "--system.class_path", "--source.help", "--config",
           "--training", "--source.n", "--system.width", "--length", "--training.loggers"]  # fmt: skip
WORDS = ["planted.Planted", "{class_path: planted.Planted}", "{n: {class_path: planted.Planted}}"]


@pytest.mark.parametrize(("option", "word"), list(product(OPTIONS, WORDS)))
def test_nor_because_the_command_line_names_it(option: str, word: str, planted: Path) -> None:
    for argv in ([option, word], [f"{option}={word}"]):
        with pytest.raises(CdlmError) as raised:
            parse_run(argv)
        assert "\n" not in str(raised.value)
    assert not planted.exists()


@dataclass(frozen=True)
class Mine(Stories):
    """A source of the user's own, which no registry lists."""

    more: int = 1


def test_a_class_that_is_defined_already_can_be_named(tmp_path: Path) -> None:
    config = RunConfig(source=Mine(n=7, more=2))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert path_of(Mine) in config.to_yaml()
    assert read_run(tmp_path) == config
    (tmp_path / "config.yaml").write_text(config.to_yaml().replace("Mine", "Yours"))
    with pytest.raises(CdlmError, match=r"there is no source .*Yours.*imported its module"):
        read_run(tmp_path)


def test_the_settings_of_jsonargparse_are_as_they_were() -> None:
    """Others in the process may use it too."""
    from jsonargparse import _common

    before = {**_common.parsing_settings}
    parse_run(["--system", "Plaid"])
    after = dict(_common.parsing_settings)
    assert all(after[name] == before[name] for name in ("import_path_verdicts", "import_paths_enforced"))


LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
BROKEN = {
    "bomb": "a0: &a0 [x]\n" + LAUGHS, "bomb in a text": "length: \"a0: &a0 [x]\\n" + LAUGHS.replace("\n", "\\n") + '"',
    "deep list": "source: " + "[" * 10**5, "deep mapping": "source: " + "{a: " * 10**5, "anchor": "length: &a 5",
    "tag": "length: !x 5", "twice": "length: 5\nlength: 6", "no mapping": "5", "list": "[1]", "nothing": "",
    "null": "null",
    "two documents": "--- {length: 5}\n--- {length: 6}", "tab": "a:\n\t- 1", "NUL": "tokenizer: \0",
    "key": "? [a]\n: 1",
    "unknown": "lenght: 5", "huge number": "length: " + "9" * 6000, "70 bits": "length: 1000000000000000000000",
    "minutes": "length: 1:30", "directive": "%TAG ! tag:yaml.org,2002:python/\n---\nlength: !name:os.system 1",
    "surrogate": 'tokenizer: "\\ud800"', "float": "length: 5.0", "truth": "length: true", "text": "length: x",
    "NaN": "judge_share: .nan", "minus": "length: -1", "choice": "rows: nope", "NUL in a path": 'tokenizer: "a\\0b"',
    "empty path": "tokenizer: ''", "file": "training: /etc/passwd", "number": "source: 5",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_settings_are_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BROKEN[name] + "\n")
    for read in (lambda: read_run(tmp_path), lambda: parse_run(["--config", str(tmp_path / "config.yaml")])):
        with pytest.raises(CdlmError, match=r"config\.yaml") as raised:
            read()
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 1000


def test_files_that_are_no_settings_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "config.yaml"
    for content in (b"\xff\xfe\x00", b"length: \xe4", b"#" * (LARGEST + 1)):
        bad.write_bytes(content)
        with pytest.raises(CdlmError, match=r"config\.yaml"):
            read_run(tmp_path)
    for name in ("/dev/zero", "nowhere.yaml", str(tmp_path), "x" * 5000, "a\0b"):
        with pytest.raises(CdlmError) as raised:
            parse_run(["--config", name])
        assert len(str(raised.value)) < 500
    with pytest.raises(CdlmError, match=r"has no config\.yaml"):
        read_run(tmp_path / "no")


@pytest.mark.parametrize("word", ["inf", ".inf", "Infinity"])
def test_infinity_is_written_as_people_write_it(word: str) -> None:
    config = parse_run(["--training.clip", word])
    assert config.training.clip == float("inf")
    assert ".inf" in config.to_yaml()


def test_what_may_be_as_deep_as_settings_are_is_read() -> None:
    deep = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert list(mapping_of(f"a: {deep}", "here", "settings")) == ["a"]
    with pytest.raises(CdlmError, match=f"more than {DEEPEST} levels"):
        mapping_of(f"a: [{deep}]", "here", "settings")


def test_texts_of_all_kinds_go_through_the_command_line() -> None:
    paths = ("a b.txt", "*.txt", "&x", "ä😀.txt", "null", "1e3", "- x", "#", "{}")
    assert parse_run(["--source", "Files", "--source.paths", as_yaml(paths)]).source == Files(paths)


# --- the cache that a run folder names ---


def test_a_folder_from_elsewhere_does_not_say_where_to_write(tmp_path: Path) -> None:
    for cache in (str(tmp_path / "victim"), "..", "/etc", "~/.ssh", "cache", "a\0b"):
        (tmp_path / "config.yaml").write_text(
            RunConfig(cache="x").to_yaml().replace("cache: x", f'cache: "{cache}"'.replace("\0", "\\0"))
        )
        assert run_arguments(tmp_path)[-1] == f"--cache={caches.DEFAULT}"
    assert read_run(tmp_path).cache == caches.DEFAULT
    assert parse_run([*run_arguments(tmp_path), "--cache", "mine"]).cache == "mine"


def test_a_cache_that_was_used_here_is_used_again(tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(RunConfig(cache=str(cache)).to_yaml())
    assert read_run(run).cache == caches.DEFAULT
    caches.mark(str(cache))
    assert read_run(run).cache == str(cache)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / caches.MARK).write_bytes((cache / caches.MARK).read_bytes())
    assert caches.believed(str(tmp_path / "moved")) == caches.DEFAULT  # a mark holds where it was made
    (cache / "tokens").symlink_to(tmp_path)
    assert read_run(run).cache == caches.DEFAULT  # it would lead elsewhere


@pytest.mark.parametrize("name", ["run: 1", "[exp] 1", "{a}", "a\nb", "- x", "#", "%", "'"])
def test_a_run_folder_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    folder.mkdir()
    (folder / "config.yaml").write_text("length: 32\n")
    assert read_run(folder).length == 32


@pytest.mark.parametrize("cache", ["run/link/../../cache", "../cache", "a/../b"])
def test_a_cache_that_goes_up_is_not_believed(cache: str) -> None:
    assert caches.believed(cache) == caches.DEFAULT


def test_a_cache_is_believed_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches.mark(str(tmp_path / "cache"))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert caches.believed(str(tmp_path / "cache")) == str(tmp_path / "cache")


def test_a_cache_that_is_only_read_needs_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise CdlmError("read-only")

    monkeypatch.setattr(caches, "write_text", refused)
    caches.mark(str(tmp_path))
    with pytest.raises(CdlmError, match="read-only"):
        caches.mark(str(tmp_path / "not there"))
