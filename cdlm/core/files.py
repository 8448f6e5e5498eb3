"""Files: written so that a reader sees the old content or the new, never half of it, and read with one-line errors."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from cdlm.core.errors import CdlmError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_WORKPLACE, _LOCK = ".writing", "lock"
"""How the name of a folder ends that `replacing` writes in, and the file in it that a living process has locked."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends well.

    Parent folders are made. On any failure nothing is left behind and what stood at `path` is untouched. What killed
    processes left beside `path` is removed. Files get the permissions that the umask gives, whatever wrote them.

    Raises:
        CdlmError: the disk is full, or the place cannot be written.
    """
    check_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with _workplace(path) as place:
            yield place / path.name
            _open_up(place / path.name)
            _put(place / path.name, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what `replacing` was writing in a folder when its process was killed."""
    from filelock import FileLock, Timeout

    for place in folder.glob(f".*{_WORKPLACE}"):
        with suppress(OSError, Timeout), FileLock(place / _LOCK, blocking=False):  # a living process holds it
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write in, that is gone after the block. It is locked for as long as this process lives:
    the lock tells others that it is no leftover."""
    place, lock = _locked(path)
    try:
        yield place
    finally:
        lock.release()
        shutil.rmtree(place, ignore_errors=True)


def _locked(path: Path) -> tuple[Path, BaseFileLock]:
    from filelock import FileLock

    while True:
        place = path.with_name(f".{uuid4().hex[:16]}{_WORKPLACE}")
        place.mkdir()
        try:
            lock = FileLock(place / _LOCK)
            lock.acquire()
            return place, lock
        except FileNotFoundError:  # another process took it for a leftover before it was locked
            continue


def _open_up(path: Path) -> None:
    """Give files the permissions that new files have here: libraries make them readable by their owner alone."""
    umask = os.umask(0o077)  # there is no way to read it
    os.umask(umask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def check_path(path: str | Path) -> None:
    """Raise if no file can have this name.

    Raises:
        CdlmError: it is empty, or holds a character that no name has.
    """
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b""
    if not name or b"\0" in name:
        raise CdlmError(f"{str(path)!r} cannot be the name of a file: write a path")


def check_places(*paths: Path | None) -> None:
    """Raise, before long work, if its results could not be written to one of the paths; None is no path.

    Raises:
        CdlmError: what should be a folder is a file, or may not be written to.
    """
    for path in filter(None, paths):
        check_path(path)
        folder = _existing(path)
        if not folder.is_dir():
            raise cannot_write(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
        if not os.access(folder, os.W_OK):
            raise cannot_write(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def write_text(path: Path, text: str) -> None:
    """Put `text` (UTF-8) at `path` in one move."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file of rows that have the same keys, in one move."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: Any) -> None:
    """Put `plain(content)` at `path` as JSON, in one move."""
    write_text(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The same for YAML and JSON: paths as text, numbers of Python, and None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextmanager
def reading(path: Path, advice: str = "copy it again") -> Iterator[None]:
    """Turn what the system refuses while `path` is read into one line that says why.

    Args:
        advice: what to do.

    Raises:
        CdlmError: there is no such file, it may not be read, it is a device, which may never end, or no UTF-8.
    """
    check_path(path)
    try:
        check_ends(path)
        yield
    except UnicodeDecodeError as error:
        raise CdlmError(f"cannot read {path} (not UTF-8 at byte {error.start}); {advice}") from error
    except OSError as error:
        raise CdlmError(f"cannot read {path} ({_reason(error)}); {advice}") from error


def real_path(path: str | Path) -> Path:
    """Where a path leads, all links followed. A link that leads to itself stays as it is; `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def check_ends(path: Path) -> None:
    """Raise if a path is that of a device, which may never end.

    Raises:
        CdlmError: it is.
    """
    if path.is_char_device() or path.is_block_device():
        raise CdlmError(f"cannot read {path} (it is a device); name a file")


def check_readable(path: Path, advice: str = "copy it again") -> None:
    """Raise if a file is not there or may not be read; libraries do not always say which.

    Raises:
        CdlmError: as `reading`.
    """
    with reading(path, advice), path.open("rb"):
        pass


def read_json(file: Path, of: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        of: what its folder is expected to be, for the error.

    Raises:
        CdlmError: there is no such file, it may not be read, or there is no JSON object in it.
    """
    try:
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CdlmError(f"{file} is not valid JSON ({error}); copy it again") from error
    except RecursionError as error:
        raise CdlmError(f"{file} is not valid JSON (nested too deeply); copy it again") from error
    except CdlmError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise CdlmError(f"{file.parent} has no {file.name}: expected the folder of {of}") from error
        raise
    if not isinstance(content, dict):
        raise CdlmError(f"{file} is not a JSON object: expected that of {of}")
    return content


def cannot_write(path: Path, error: OSError) -> CdlmError:
    """The one-line error for a write that the system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(path)).free
        return CdlmError(
            f"no space left to write {path}: {free:,} bytes are free; free some space or choose another folder"
        )
    return CdlmError(f"cannot write {path} ({_reason(error)}); choose another folder")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _put(temporary: Path, path: Path) -> None:
    if not temporary.is_dir() or not path.exists():
        os.replace(temporary, path)
        return
    old = temporary.with_name("old")  # a folder with content cannot be replaced in one call
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if os.path.exists(parent))  # false of a name too long
