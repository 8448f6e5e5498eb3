"""Writing so that a reader sees the old content or the new, never half of it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Put `text` (UTF-8) at `path`, replacing what was there in one move; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder beside `folder`, then put it in the place of `folder`.

    When `fill` raises, whatever stood at `folder` is untouched. Parent folders are made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        (work / "new").mkdir()
        fill(work / "new")
        if folder.exists():
            os.replace(folder, work / "old")  # a folder with content cannot be replaced in one call
        os.replace(work / "new", folder)
    except BaseException:
        if (work / "old").exists() and not folder.exists():
            os.replace(work / "old", folder)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
