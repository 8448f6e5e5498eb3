"""Files: written so that a reader sees the old content or the new, never half of it, and read with one-line errors."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
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

LARGEST_JSON = 2**26
"""Bytes of a JSON file that is read whole."""
_WORKPLACE, _LOCK = ".writing", "lock"
_OURS = re.compile(r"\.[0-9a-f]{16}\.writing")
"""Folders that `replacing` writes in, and the file in them that a living process has locked."""


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
        with _workplace(path.parent) as place:
            new = place / "new" / path.name
            new.parent.mkdir()
            yield new
            _open_up(new)
            _put(new, path, place / "old")
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what `replacing` was writing in a folder when its process was killed: only folders that it has named, and
    whose lock no living process holds."""
    for place in folder.glob(f".*{_WORKPLACE}"):
        if not _OURS.fullmatch(place.name) or place.is_symlink():
            continue
        if not (place / _LOCK).is_file():  # just made, or all but removed
            with suppress(OSError):  # it holds something
                place.rmdir()
            continue
        taken, lock = _locked(place)
        if taken and lock is not None:
            lock.release()
            _clear(place)


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to write in, that is gone after the block. It is locked for as long as this process
    lives: the lock tells others that it is no leftover. Where a file system has no locks, leftovers stay."""
    taken, lock, place = False, None, folder
    while not taken:  # else another process has just taken it for a leftover
        place = folder / f".{uuid4().hex[:16]}{_WORKPLACE}"
        place.mkdir()
        taken, lock = _locked(place)
    try:
        yield place
    finally:
        if lock is not None:
            lock.release()
        _clear(place)


def _clear(place: Path) -> None:
    """Remove a workplace, its lock last: while it holds something, it can be told from a folder that is not ours."""
    for part in ("new", "old"):
        shutil.rmtree(place / part, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)


def _locked(place: Path) -> tuple[bool, BaseFileLock | None]:
    """Whether this process may use a workplace, and its lock, which is None where a file system has none."""
    from filelock import FileLock, Timeout

    lock = FileLock(place / _LOCK, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError, FileExistsError, NotADirectoryError):
        return False, None
    except (OSError, NotImplementedError):
        return True, None
    return True, lock


def _open_up(path: Path) -> None:
    """Give files the permissions that new files have here: libraries make them readable by their owner alone."""
    umask = os.umask(0o077)  # there is no way to read it
    os.umask(umask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with suppress(PermissionError):  # some file systems have no permissions
                file.chmod(0o666 & ~umask)


def check_path(path: str | Path) -> None:
    """Raise if no file can have this name.

    Raises:
        CdlmError: it is empty or none at all, or holds a character that no name has.
    """
    try:
        name = os.fsencode(path) if isinstance(path, str | Path) else b""
    except UnicodeEncodeError:
        name = b""
    if not name or b"\0" in name:
        raise CdlmError(f"{str(path)!r} cannot be the name of a file: write a path")


def check_new_folder(path: Path) -> None:
    """Raise if there is anything at the path but an empty folder.

    Raises:
        CdlmError: there is.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CdlmError(f"{path} is there already: choose a new folder")


def check_places(*paths: Path | None) -> None:
    """Raise, before long work, if its results could not be written to one of the paths; None is no path.

    Raises:
        CdlmError: what should be a folder is a file, or may not be written to, or a name is too long.
    """
    for path in filter(None, paths):
        check_path(path)
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # the name is too long
            raise cannot_write(path, error) from error
        folder = _existing(path)
        if not folder.is_dir():
            raise cannot_write(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
        if not os.access(folder, os.W_OK):
            raise cannot_write(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def check_files(*paths: Path | None) -> None:
    """`check_places` of results that are files.

    Raises:
        CdlmError: as there, or one of the paths is a folder.
    """
    check_places(*paths)
    for path in filter(None, paths):
        if path.is_dir():
            raise cannot_write(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))


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
def reading(path: Path, advice: str = "copy it again", *, pipes: bool = False) -> Iterator[None]:
    """Turn what the system refuses while `path` is read into one line that says why.

    Args:
        advice: what to do.
        pipes: a pipe is right.

    Raises:
        CdlmError: there is no such file, it may not be read, it may never end (`check_ends`), or is no UTF-8.
    """
    check_path(path)
    try:
        check_ends(path, pipes=pipes)
        yield
    except UnicodeDecodeError as error:
        raise CdlmError(f"cannot read {path} (not UTF-8 at byte {error.start}); {advice}") from error
    except OSError as error:
        raise CdlmError(f"cannot read {path} ({_reason(error)}); {advice}") from error


def real_path(path: str | Path) -> Path:
    """Where a path leads, all links followed. A link that leads to itself stays as it is; `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def check_ends(path: Path, *, pipes: bool = False) -> None:
    """Raise if a path is that of a device or a pipe, which may never end.

    Args:
        pipes: a pipe is right, such as `<(command)` of a shell.

    Raises:
        CdlmError: it is.
    """
    if path.is_char_device() or path.is_block_device() or (path.is_fifo() and not pipes):
        raise CdlmError(f"cannot read {path} (it is a device or a pipe); name a file")


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
            if file.stat().st_size > LARGEST_JSON:
                raise CdlmError(f"{file} has more than {LARGEST_JSON:,} bytes: expected that of {of}; copy it again")
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


def _put(new: Path, path: Path, old: Path) -> None:
    """Move what is new to its place; what is there goes to `old` first if both are folders."""
    if not new.is_dir() or not path.exists():
        os.replace(new, path)
        return
    os.replace(path, old)  # a folder with content cannot be replaced in one call
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    above = [*path.absolute().parents, path.absolute()]  # the root has nothing above it
    return next(parent for parent in above if os.path.exists(parent))  # false of a name too long
