"""Folders of tokenised text and judges, and which of them a run folder may name.

`config.yaml` of a run folder may come from elsewhere, so what it says of the cache is believed only of a folder that a
training on this machine, started with that cache, has marked. All else is read and written in `DEFAULT`.
"""

from __future__ import annotations

import os
from pathlib import Path

from cdlm.core.errors import CdlmError
from cdlm.core.files import real_path, write_text

DEFAULT = "~/.cache/cdlm"
VARIABLE = "CDLM_CACHE"
"""Of the environment: a folder in place of `DEFAULT`."""
MARK = "CACHEDIR.TAG"
"""The file by which other programs know a cache too: https://bford.info/cachedir."""
PARTS = ("tokens", "judges")
"""Folders in a cache."""


def mark(cache: str) -> None:
    """Make the folder and mark it as a cache of this machine; a training does so before it writes there. One that is
    there and cannot be written is only read, and needs no mark.

    Raises:
        CdlmError: it cannot be made.
    """
    place = place_of(cache)
    if _is_marked(place):
        return
    try:
        write_text(place / MARK, _mark(place))
    except CdlmError:
        if not place.is_dir():
            raise


def believed(cache: str) -> str:
    """The cache that a run folder names if it is marked and lies in one place, and `DEFAULT` otherwise."""
    place = place_of(cache)
    straight = ".." not in Path(cache).parts  # of a link, .. is not what stands before it
    if straight and _is_marked(place) and _is_whole(place):
        return str(place)
    return DEFAULT


def place_of(cache: str) -> Path:
    """The folder, with ~ as the home of the user; in place of `DEFAULT` the one that the environment names, if it does.

    Raises:
        CdlmError: no folder can be named like this, or it can neither be made nor is it there.
    """
    place = _absolute(os.environ.get(VARIABLE) or cache if cache == DEFAULT else cache)
    nearest = next(parent for parent in (place, *place.parents) if os.path.exists(parent))  # false of a name too long
    if not nearest.is_dir() or not (place == nearest or os.access(nearest, os.W_OK | os.X_OK)):
        raise CdlmError(f"the cache {place} cannot be made: set {VARIABLE} to a folder that you can write to")
    return place


def _absolute(cache: str) -> Path:
    try:
        return Path(os.path.abspath(Path(cache).expanduser()))  # links are kept: the mark says where it was made
    except (RuntimeError, ValueError) as error:  # the home of a user who is not known, a NUL
        raise CdlmError(f"cache is the name of a folder, got {cache!r} ({error})") from error


def _mark(place: Path) -> str:
    about = "# This file marks a cache of cdlm: its content can be deleted, and is made again when it is needed."
    return f"Signature: 8a477f597d28d172789f06886806bc55\n{about}\n# Made by this user for {place}\n"


def _is_marked(place: Path) -> bool:
    try:
        file = place / MARK
        return file.stat().st_uid == os.getuid() and file.read_bytes() == _mark(place).encode()
    except (OSError, ValueError):
        return False


def _is_whole(place: Path) -> bool:
    return all(real_path(place / part) == real_path(place) / part for part in PARTS)
