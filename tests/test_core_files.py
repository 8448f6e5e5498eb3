"""Files: whole or not at all, readable as the umask says, no leftovers; and what is read, checked in one line."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import save_file

from cdlm.core.errors import CdlmError
from cdlm.core.files import check_files, check_places, check_readable, read_json, reading, replacing, write_text
from cdlm.core.schema import Finite, Positive, Whole, checked


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "folder") as new:
            new.mkdir()
            save_file({"a": np.zeros(2)}, new / "inside.safetensors")  # the library makes it private
        with replacing(tmp_path / "alone.safetensors") as new:
            save_file({"a": np.zeros(2)}, new)
        write_text(tmp_path / "text", "text")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


KILLED = """
import os, signal, sys, time
from pathlib import Path
from cdlm.core.files import replacing
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests in the background ignores it
with replacing(Path(sys.argv[1])) as new:
    new.write_text("half")
    print("writing", flush=True)
    while True:
        time.sleep(0.05)  # a pause might begin just after the signal came
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name in ("killed", "living")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
    writers[0].kill()
    writers[0].wait()
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "mine", "text")
    assert len(list(tmp_path.iterdir())) == 2  # mine, and the folder of the living one
    writers[1].send_signal(signal.SIGINT)
    writers[1].communicate()
    writers[0].communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("place", ["/proc/x/file", "/dev/null/file", "{}/" + 300 * "n", "{}/" + 300 * "n" + "/x", "{}"])
def test_a_place_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CdlmError, match="cannot write") as caught:
        write_text(Path(place.format(tmp_path / "folder")), "text")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / (255 * "n"), "text")


@pytest.mark.parametrize(("error", "said"), [(PermissionError(13, "Permission denied"), "permission denied"),
                                             (FileNotFoundError(2, "No such file or directory"), "no such file"),
                                             (IsADirectoryError(21, "Is a directory"), "is a directory")])  # fmt: skip
def test_reading_says_why(error: OSError, said: str, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=said), reading(tmp_path / "x"):
        raise error


def test_a_folder_is_not_readable_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match="directory"):
        check_readable(tmp_path)


BAD_JSON = {
    "no file": None, "deep": b"[" * 100_000, "deep object": b'{"a":' * 100_000, "not UTF-8": b"\xff\xfe", "empty": b"",
    "half": b'{"a": 1', "list": b"[]", "number": b"5",
    "long number": b'{"a": ' + 5000 * b"9" + b"}",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_one_line(kind: str, tmp_path: Path) -> None:
    content = BAD_JSON[kind]
    if content is not None:
        (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(CdlmError, match=r"f\.json") as caught:
        read_json(tmp_path / "f.json", "a thing")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@dataclass(frozen=True)
class Thing:
    count: Whole
    rows: list[list[Positive]]
    choice: Literal["x", "y"] = "x"
    rate: Finite = 0.0


GOOD: dict[str, Any] = {"count": 1, "rows": [[1, 2], []], "choice": "y", "rate": 0.5}
ODD: list[Any] = [
    None,
    True,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    2**63,
    10**30,
    "",
    "x",
    "5",
    {},
    [0],
    [[0]],
    [["a"]],
    [1],
]


def test_what_fits_a_schema_passes() -> None:
    assert checked(GOOD, Thing, "f", "mend it") == Thing(**GOOD)
    assert checked(GOOD | {"more": 1}, Thing, "f", "mend it") == Thing(**GOOD)


FITTING = [("choice", "x"), *(("rate", value) for value in ODD if type(value) in (int, float) and abs(value) < 1e300)]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", ODD, ids=str)
def test_what_does_not_fit_a_schema_is_named(name: str, value: Any) -> None:
    if (name, value) in FITTING:
        found = checked(GOOD | {name: value}, Thing, "f.json", "mend it")
        assert getattr(found, name) in (value, 1e30)
        return
    with pytest.raises(CdlmError, match=rf"^f\.json, line 3: .*'{name}.*; mend it$"):
        checked(GOOD | {name: value}, Thing, "f.json, line 3", "mend it")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(CdlmError, match="expected a field count; mend it"):
        checked({"rows": []}, Thing, "f.json", "mend it")


def test_deep_values_are_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(CdlmError):
        checked({"count": deep, "rows": []}, Thing, "f.json", "mend it")


@pytest.mark.parametrize("name", ["old", "new", "lock", ".writing"])
def test_any_name_can_be_written_twice(name: str, tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replacing(tmp_path / name) as new:
            new.mkdir()
            (new / content).write_text(content)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["two"]
    write_text(tmp_path / f"{name}.txt", "text")


@pytest.mark.parametrize("inside", [["lock"], ["lock", "old/file"], ["lock", "new/file", "old/file"], []])
def test_what_was_all_but_removed_is_removed(inside: list[str], tmp_path: Path) -> None:
    place = tmp_path / f".{16 * 'c'}.writing"
    place.mkdir()
    for name in inside:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("")
    write_text(tmp_path / "mine", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_not_ours_is_no_leftover(tmp_path: Path) -> None:
    """Not a folder of another name, nor one that another process has just made, nor what a link leads to."""
    for name in (".novel.writing", f".{16 * 'a'}.writing", ".writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter").write_text("text")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").write_text("")
    (tmp_path / f".{16 * 'b'}.writing").symlink_to(outside)
    before = sorted(tmp_path.rglob("*"))
    write_text(tmp_path / "mine", "text")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "mine"])


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_written(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr("fcntl.flock", refused)
    write_text(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_permissions_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


WRITER = """
import sys
from pathlib import Path
from cdlm.core.files import write_text
for number in range(150):
    write_text(Path(sys.argv[1]) / f"{number % 3}.txt", "text")
"""


def test_many_processes_write_into_one_folder(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stderr=subprocess.PIPE) for _ in "abcd"]
    assert [writer.communicate()[1] for writer in writers] == [b""] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.txt", "1.txt", "2.txt"]


def test_a_pipe_is_read_only_where_a_user_names_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CdlmError, match="is a device or a pipe"):
        check_readable(tmp_path / "pipe")
    with reading(tmp_path / "pipe", pipes=True):
        pass


def test_the_root_is_a_place() -> None:
    check_places(Path("/"))


def test_a_place_that_nothing_can_be_written_to_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=r"cannot write .*too long"):
        check_places(tmp_path / ("x" * 300))
    with pytest.raises(CdlmError, match=r"cannot write .*is a directory"):
        check_files(tmp_path / "new.html", tmp_path)
    check_files(None, tmp_path / "new.html", tmp_path / "none" / "new.html")


def test_a_json_file_has_an_end(tmp_path: Path) -> None:
    with (tmp_path / "f.json").open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(CdlmError, match="more than"):
        read_json(tmp_path / "f.json", "a thing")
