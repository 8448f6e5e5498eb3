"""Sources: what they yield, how they hold documents out, and what they say about bad data."""

import csv
import json
from pathlib import Path

import pytest
from story_grammar import is_story

from cdlm.core.errors import CdlmError
from cdlm.data import sources
from cdlm.data.sources import Files, Hub, Source, Stdlib, Stories


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_jsonl(path: Path, texts: list[str]) -> str:
    return write(path, "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))


def everything(source: Source) -> list[str]:
    return [*source.documents("train"), *source.documents("valid")]


def read(path: str, **settings) -> list[str]:
    """All documents of one file, in order, without the split."""
    return list(Files(paths=(path,), valid_paths=(path,), **settings).documents("train"))


def complaint(source: Source) -> str:
    """The one line with which reading the source fails."""
    with pytest.raises(CdlmError) as error:
        everything(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["../..", "..", ".", "", "~", "a/b/c", "a b", "a/../b", "./data", "-x", "a\n", "a\0b"])
def test_what_is_no_name_of_a_data_set_is_refused(name):
    with pytest.raises(CdlmError, match="expected the name of a data set"):
        Hub(name)


def test_a_disk_is_no_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr("cdlm.data.sources.MOST_FILES", 3)
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_text('{"text": "a"}\n')
    assert "name its own folder" in complaint(Hub(str(tmp_path)))


def test_a_script_beside_the_data_is_not_run(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    for name in ("dataset.py", "__init__.py"):
        (folder / name).write_text("raise SystemExit('it ran')")
    assert len(list(Hub(str(folder)).documents("train"))) == 2
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    assert "no longer supported" in complaint(Hub(str(folder)))


# --- what a document is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", ["one", " two é", "three", "four"]),
        ("paragraph", ["one\n two é", "three", "four"]),
        ("document", ["one\n two é\n\nthree\n \nfour"]),
    ],
)
def test_txt(tmp_path, end, sample_by, expected):
    path = write(tmp_path / "a.txt", "one\n two é\n\nthree\n \nfour".replace("\n", end))
    assert read(path, sample_by=sample_by) == expected


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\n")) == ["one", "two"]


def test_jsonl_csv_and_parquet_hold_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["plain", "", 'two\nlines, "quoted"', "  ", "naïve 😀"]
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *([i, text] for i, text in enumerate(texts))])
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    expected = [texts[0], texts[2], texts[4]]
    for path in (jsonl, str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")):
        assert read(path) == expected


def test_another_field(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "why"}\n\n{"question": "how"}\n')
    assert read(path, field="question") == ["why", "how"]


def test_globs_keep_order_and_take_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "d[1].txt"):
        write(tmp_path / name, name)
    source = Files(paths=(str(tmp_path / "b.txt"), str(tmp_path / "**/*.txt"), str(tmp_path / "d[1].txt")))
    assert sorted(everything(source)) == ["a.txt", "b.txt", "d[1].txt", "sub/c.txt"]
    assert next(source.documents("train")) == "b.txt"


def test_files_are_read_as_they_are_asked_for(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    bad = write(tmp_path / "b.jsonl", "not json")
    documents = Files(paths=(good, bad), valid_paths=(good,)).documents("train")
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(CdlmError):
        next(documents)


# --- holding out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 20, 21, 22, 100])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_splits_are_disjoint_complete_and_never_empty(tmp_path, count, fraction):
    path = write(tmp_path / "a.txt", "\n".join(map(str, range(count))))
    source = Files(paths=(path,), valid_fraction=fraction)
    train, valid = (list(source.documents(split)) for split in ("train", "valid"))
    assert sorted(train + valid, key=int) == list(map(str, range(count)))
    assert train
    assert valid
    assert train == sorted(train, key=int)
    assert abs(len(valid) - count * fraction) <= 1


def test_valid_paths_are_the_validation_split(tmp_path):
    train, valid = write(tmp_path / "a.txt", "one\ntwo"), write(tmp_path / "b.txt", "three")
    source = Files(paths=(train,), valid_paths=(valid,))
    assert list(source.documents("train")) == ["one", "two"]
    assert list(source.documents("valid")) == ["three"]


def test_a_single_document_cannot_be_split(tmp_path):
    message = complaint(Files(paths=(write(tmp_path / "a.txt", "one\ntwo"),), sample_by="document"))
    assert "valid_paths" in message
    assert "line or paragraph" in message


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.6, 1.0])
def test_impossible_fractions(fraction):
    for make in (Stdlib, lambda **k: Files(paths=("a.txt",), **k), lambda **k: Hub("name", **k)):
        with pytest.raises(CdlmError, match="valid_fraction"):
            make(valid_fraction=fraction)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_content_and_settings_not_the_place(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo")
    source = Files(paths=(path,))
    first = source.fingerprint()
    assert first == source.fingerprint() == Files(paths=(write(tmp_path / "moved.txt", "one\ntwo"),)).fingerprint()
    others = [
        Files(paths=(path,), sample_by="paragraph"),
        Files(paths=(path,), valid_fraction=0.1),
        Files(paths=(path,), valid_paths=(path,)),
        Files(paths=(path, str(tmp_path / "moved.txt"))),
        Files(paths=(write(tmp_path / "a.jsonl", "one\ntwo"),)),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 1 + len(others)
    write(tmp_path / "a.txt", "one\ntwO")
    assert source.fingerprint() != first


def test_generated_and_shipped_sources_have_fingerprints():
    sources = [Stories(), Stories(n=5), Stories(seed=1), Stdlib(), Stdlib(valid_fraction=0.1)]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert Stories().fingerprint() == Stories().fingerprint()


# --- bad data: one line that names the place and the way out ----------------------------------------------------------


def test_missing_files(tmp_path):
    for pattern in ("none.txt", "*.txt"):
        assert pattern in complaint(Files(paths=(str(tmp_path / pattern),)))
    assert "*.txt" in complaint(Files(paths=(str(tmp_path),)))
    with pytest.raises(CdlmError, match=r"none\.txt"):
        Files(paths=(str(tmp_path / "none.txt"),)).fingerprint()
    with pytest.raises(CdlmError, match="at least one path"):
        Files(paths=())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_files(tmp_path, name, content):
    good = write(tmp_path / "good.txt", "one\ntwo")
    path = write(tmp_path / name, content)
    message = complaint(Files(paths=(good, path)))
    assert path in message
    assert "found none" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_not_utf8(tmp_path, name):
    path = write(
        tmp_path / name, b'text\n{"text": "h\xc3\xa9"}\n{"text": "caf\xe9"}\n'.removeprefix(b"text\n" * ("j" in name))
    )
    offset = Path(path).read_bytes().index(b"\xe9")
    message = complaint(Files(paths=(path,)))
    assert path in message
    assert f"byte {offset} is 0xe9" in message


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ('{"text": "cut', "JSON"),
        ("[" * 100000, "JSON"),
        ('{"body": "x"}', "['body']"),
        ('"text"', "got str"),
        ('{"text": 3}', "got int"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, hint):
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n\n{"text": "good"}\n' + line + "\n")
    message = complaint(Files(paths=(path,)))
    assert f"{path}, line 4" in message
    assert hint in message
    assert len(message) < 400


def test_bad_csv(tmp_path):
    path = write(tmp_path / "a.csv", "id,body\n1,x\n")
    assert "found ['id', 'body']" in complaint(Files(paths=(path,)))
    path = write(tmp_path / "b.csv", "text\n" + "x" * 200_000 + "\n")
    assert f"{path}, after line 1: not valid CSV" in complaint(Files(paths=(path,)))


def test_bad_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    source = Files(paths=(str(tmp_path / "a.parquet"),))
    assert "found ['id', 'body']" in complaint(source)
    assert "got int" in complaint(Files(paths=source.paths, field="id"))
    path = write(tmp_path / "b.parquet", "no parquet")
    assert f"{path}: not a valid parquet file" in complaint(Files(paths=(path,)))


@pytest.mark.parametrize("name", ["a.docx", "a", "a.json"])
def test_unknown_kinds(tmp_path, name):
    message = complaint(Files(paths=(write(tmp_path / name, "x"),)))
    assert "expected one of .txt, .jsonl, .csv, .parquet" in message


# --- Python's own text, stories, the Hub ------------------------------------------------------------------------------


def test_stdlib_is_prose_without_repeats(monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(Path(json.__file__).parent))  # all takes long
    documents = everything(Stdlib())
    assert len(documents) == len(set(documents)) > 50
    assert any("JavaScript Object Notation" in text for text in documents)
    assert all(text == text.strip() and text for text in documents)


def test_docstrings_come_from_source_that_is_never_run(tmp_path, monkeypatch):
    long = "A docstring that is long enough to be worth keeping"
    body = f'"""{long}."""\nraise SystemExit\nclass A:\n    def f(self):\n        """{long},\n\n\n\n        twice."""\n'
    write(tmp_path / "b.py", body)
    write(tmp_path / "a.py", f'def g():\n    r"""{long} \\d"""\n    "\\d"\ndef h():\n    """Short."""\n')
    write(tmp_path / "template.py", "{{ not python }} $")
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "c.py", f'"""{long}, in a test."""')
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(sources._docstrings()) == [f"{long} \\d", f"{long}.", f"{long},\n\ntwice."]


@pytest.mark.slow
def test_the_whole_standard_library():
    assert sum(map(len, Stdlib().documents("train"))) > 1_000_000


def test_python_without_sources(monkeypatch):
    monkeypatch.setattr(sources, "_docstrings", lambda: iter([]))
    monkeypatch.setattr(sources, "_topics", lambda: iter([]))
    assert "use stories or files" in complaint(Stdlib())


def test_stories_have_two_splits_of_their_own():
    train, valid = (list(Stories(n=400, seed=3).documents(split)) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (400, 20)
    assert all(map(is_story, train + valid))
    assert train[:20] != valid
    for bad in ({"n": 0}, {"seed": -1}):
        with pytest.raises(CdlmError):
            Stories(**bad)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """`datasets` with no network and an empty cache."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set(tmp_path, offline, streaming):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ["one", " ", "two", "three"])
    write_jsonl(tmp_path / "set" / "test.jsonl", ["four"])
    name = str(tmp_path / "set")
    source = Hub(name, streaming=streaming)
    assert list(source.documents("train")) == ["one", "three"]
    assert list(source.documents("valid")) == ["two"]
    assert list(Hub(name, valid_split="test", streaming=streaming).documents("valid")) == ["four"]
    assert "found ['text', 'n']" in complaint(Hub(name, field="body", streaming=streaming))
    assert "check name, config and split" in complaint(Hub(name, split="none", streaming=streaming))
    before = source.fingerprint()
    assert before == Hub(name, streaming=not streaming).fingerprint() != Hub(name, valid_split="test").fingerprint()
    write_jsonl(tmp_path / "set" / "train.jsonl", ["one", "two", "another length"])
    assert source.fingerprint() != before


def test_an_unreachable_hub_says_how_to_work_offline(offline):
    source = Hub("nobody/no-such-data")
    message = complaint(source)
    assert "parquet or jsonl" in message
    assert "HF_HUB_OFFLINE" in message
    with pytest.raises(CdlmError, match="offline"):
        source.fingerprint()
