"""Broken files: a sound folder of each kind, one of whose files is damaged, and then used."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import chdir
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, mkdtemp

from hostile.damage import PLANTED, Change, damage
from hostile.sound import KINDS, must
from hostile.trials import Trial

CARD = "README.md"
"""A file that people read, and programs do not."""


def sound(kind: str, place: Path) -> Path:
    """A sound folder of a kind; it is built the first time that it is asked for."""
    folder = place / kind.replace(" ", "_") / "sound"
    if not folder.exists():
        folder.parent.mkdir()
        KINDS[kind].build(folder)
    return folder


def broken(kind: str, place: Path, seed: int, number: int) -> Trial:
    """A trial with a broken file.

    Args:
        place: folder to work in.
        seed: with the number, decides what is broken.
    """
    folder = sound(kind, place)
    draw = Random(f"{kind} {seed} {number}")
    file = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD))
    change, name = damage(file, draw), file.relative_to(folder)
    return Trial(change.what, f"{kind}, {file.name}", lambda: use(kind, folder, name, change), nonsense=False)


def use(kind: str, folder: Path, name: Path, change: Change) -> None:
    """Use a copy of a sound folder in which a file is changed.

    Raises:
        Nonsense: what came of it cannot be, code that a file names was imported, or something was written elsewhere.
    """
    place = Path(mkdtemp(dir=folder.parent))
    try:
        home, copy = place / "home", place / "copy"
        home.mkdir()
        shutil.copytree(folder, copy)
        change.make(copy / name)
        os.environ["HOME"] = str(home)
        with chdir(home):
            KINDS[kind].use(copy)
        must(PLANTED.rpartition(".")[0] not in sys.modules, "code that a file names was imported")
        must({path.name for path in place.iterdir()} == {"home", "copy"}, "something was written beside the folder")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def files_trials(seed: int, count: int) -> Iterator[Trial]:
    """So many trials of broken files, of each kind as many. What is broken follows from the seed."""
    with TemporaryDirectory() as place:
        yield from islice((broken(kind, Path(place), seed, number) for number in numbers() for kind in KINDS), count)
