"""Small files: written so that a reader sees the old content or the new, never half of it."""

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
from typing import Any
from uuid import uuid4

import numpy as np

from cdlm.core.errors import CdlmError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends well.

    Parent folders are made. On any failure nothing is left behind and what stood at `path` is untouched.

    Raises:
        CdlmError: the disk is full, or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _put(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def check_places(*paths: Path | None) -> None:
    """Raise, before long work, if its results could not be written to one of the paths; None is no path.

    Raises:
        CdlmError: what should be a folder is a file, or may not be written to.
    """
    for path in filter(None, paths):
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


def read_json(file: Path, of: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        of: what its folder is expected to be, for the error.

    Raises:
        CdlmError: there is no such file, or no JSON object in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CdlmError(f"{file.parent} has no {file.name}: expected the folder of {of}") from error
    except ValueError as error:
        raise CdlmError(f"{file} is not valid JSON ({error}); copy it again") from error
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
    return CdlmError(f"cannot write {path} ({error.strerror or error}); choose another folder")


def _put(temporary: Path, path: Path) -> None:
    if not temporary.is_dir() or not path.exists():
        os.replace(temporary, path)
        return
    old = path.with_name(f".{path.name}.{uuid4().hex[:8]}")  # a folder with content cannot be replaced in one call
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
