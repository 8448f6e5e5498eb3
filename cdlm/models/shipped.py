"""The models that come with the package: small ones, to try everything at once."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from cdlm.core.progress import announce

FOLDER = Path(__file__).parent.parent / "shipped"
"""A folder for each model, named like it."""
JUDGE = "judge.json"
"""A file that the folder of a judge has, and that of no other model."""


@cache
def names() -> tuple[str, ...]:
    """Their names: language models, and judges of the text that these were trained on."""
    return tuple(sorted(file.parent.name for file in FOLDER.glob("*/config.json")))


def models() -> tuple[str, ...]:
    """Names of the language models alone."""
    return tuple(name for name in names() if not (FOLDER / name / JUDGE).exists())


def folders() -> tuple[Path, ...]:
    """Their folders."""
    return tuple(FOLDER / name for name in names())


def is_shipped(name: str | Path) -> bool:
    """Whether the name means a model of the package. A folder of that name in the working directory goes before it."""
    return str(name) in names() and not os.path.isdir(name)


def place_of(name: str | Path) -> Path:
    """The folder that a name means: that of a model of the package, and else the path itself.

    Where a local folder hides a model of the package, a line says so.
    """
    path = Path(name)
    if str(name) not in names():
        return path
    if os.path.isdir(path):
        announce(f"cdlm: {name} is your folder {path.absolute()}, not the model of that name that comes with cdlm")
        return path
    return FOLDER / str(name)
