"""Models of tables: made once, and used again by every table that makes the same."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from cdlm.core.files import write_text
from rebuild.commands import Runner, replaced, shown
from rebuild.data import digest_of
from rebuild.definition import OUT, PLACEHOLDER, Loops
from rebuild.document import digest

REPEATED = ("distill",)
"""Commands that go on where they were when they are given again."""


@dataclass(frozen=True)
class Training:
    """How a model is made: trained, or by another command, which the word `{out}` tells where.

    Args:
        name: in the table.
        loops: values of the loops that it is in.
        words: of the command, from "train" on, with placeholders of data files and of earlier models.
        data: places of these files.
        models: folders of earlier models, by placeholder.
        root: of the checkout.
        folder: of all models.
    """

    name: str
    loops: Loops
    words: tuple[str, ...]
    data: Mapping[str, Path]
    models: Mapping[str, Sequence[str]]
    root: Path
    folder: Path

    @property
    def label(self) -> str:
        """The name with the values of the loops."""
        return "-".join([self.name, *(re.sub(r"[^\w.]+", "_", str(value)) for value in self.loops.values())])

    @cached_property
    def place(self) -> Path:
        """The folder. It has another name if the command, a settings file, a data file or an earlier model is
        another."""
        used = sorted({name for word in self.words for name in PLACEHOLDER.findall(word)} - {OUT})
        files = {word: digest_of(self.root / word) for word in self.words if (self.root / word).is_file()}
        key = digest([list(self.words), files, {name: self._identity(name) for name in used}])
        return self.folder / f"{self.label}-{key[:10]}"

    def _identity(self, name: str) -> str | list[str]:
        """What tells a data file, or the models that a placeholder stands for, from others."""
        return digest_of(self.data[name]) if name in self.data else [Path(path).name for path in self.models[name]]

    def command(self, place: Path) -> list[str]:
        """The words with paths in the place of placeholders.

        Raises:
            CdlmError: an earlier model that they name is made for other loops.
        """
        data = {name: [str(path)] for name, path in self.data.items()}
        return list(replaced(self.words, {**data, **self.models, OUT: [str(place)]}))

    def run(self, runner: Runner, threads: int, cache: Path, origin: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Make the model unless it is there; interrupted, it goes on; while another build makes it, this one waits.

        Args:
            cache: folder of tokenised data and judges.
            origin: says what `rebuild.machine.origin` says.

        Returns:
            the record that is kept beside the model: its command, how long it took in all, and where it comes from.
        """
        place = self.place
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f"{place.name}.lock")):
            return self._run(place, runner, threads, cache, origin)

    def _run(
        self, place: Path, runner: Runner, threads: int, cache: Path, origin: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        file = place.with_name(f"{place.name}.json")
        record = self._record(file)
        if record["finished"] and place.is_dir():
            return record
        trained = self.words[0] == "train"
        resumed = (place / "checkpoints" / "last.ckpt").exists() if trained else self.words[0] in REPEATED
        if not resumed:
            shutil.rmtree(place, ignore_errors=True)
            record["seconds"] = 0.0
        words = self.command(place)
        if trained and resumed:
            words = ["train", "--resume", str(place)]
        elif trained:
            words += ["--cache", str(cache), "--out", str(place)]
        record |= {"threads": threads, **origin()}
        start = time.monotonic()
        try:
            runner(words, threads, place.with_name(f"{place.name}.log"))
            record["finished"] = True
        finally:  # the time of an interrupted training counts
            record["seconds"] = round(record["seconds"] + time.monotonic() - start, 1)
            write_text(file, json.dumps(record, indent=1) + "\n")
        return record

    def _record(self, file: Path) -> dict[str, Any]:
        new = {"command": shown(["cdlm", *self.words]), "seconds": 0.0, "finished": False}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return new
        return found if isinstance(found, dict) and found.keys() >= new.keys() else new
