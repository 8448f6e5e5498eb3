"""One table, from its models to its JSON file."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing, write_text
from cdlm.core.parsing import nearest
from rebuild import document
from rebuild.commands import Runner, replaced, shown
from rebuild.data import Data, digest_of
from rebuild.definition import PLACEHOLDER, Entry, Loops, Table
from rebuild.document import digest
from rebuild.models import Training
from rebuild.places import Places
from rebuild.rows import read_rows


@dataclass(frozen=True)
class Builder:
    """Builds tables.

    Args:
        root: of the checkout.
        out: folder of the JSON files.
        work: folder of models and of what commands leave.
        data: the files that tables need.
        runner: runs commands.
        origin: says what `rebuild.machine.origin` says.
        quick: whether it is the small version.
        say: is told what goes on.
    """

    root: Path
    out: Path
    work: Path
    data: Data
    runner: Runner
    origin: Callable[[], dict[str, Any]]
    quick: bool = False
    say: Callable[[str], None] = print

    def build(self, table: Table) -> Path:
        """Train the models of a table, run its steps, and write its JSON file.

        Raises:
            CdlmError: data is missing, a command fails, or rows or pictures are not where they should be.
        """
        start, made = time.monotonic(), {"threads": table.threads, **self.origin()}
        steps = list(self._steps(table))
        places = self.places(table)
        models = self.train(table)
        journal = Journal(places.work / "done.json")
        ran = self._ran(steps, places, table.threads, journal)
        kept = [read_rows(table, entry, loops, places) for entry, loops in self._each(table, table.rows)]
        content = {
            "table": table.name, "title": table.title, "quick": self.quick, "definition": table.digest, **made,
            "seeds": seeds([*(training.words for training in places.trainings), *(step.words for step in steps)]),
            "seconds": {"models": total(models), "steps": total(ran)},
            "data": self.data.described(places.data), "models": models, "steps": ran,
            "files": [about for about, _ in kept], "rows": [row for _, rows in kept for row in rows],
        }  # fmt: skip
        self._copy_images(table, places)
        file = self.out / f"{table.name}.json"
        document.write(places.cleaned(content), file)
        journal.close()
        self.say(f"{table.name}: {len(content['rows'])} rows, after {time.monotonic() - start:.0f} s, in {file}")
        return file

    def _copy_images(self, table: Table, places: Places) -> None:
        """Into the documentation; those of the small version are only looked for."""
        for name, text in table.images.items():
            (word,) = replaced([text], places.of({}))
            if not Path(word).is_file():
                raise CdlmError(f"{table.name}: there is no {text} to make the picture {name} of")
            if not self.quick:
                with replacing(self.root / "docs" / "images" / name) as temporary:
                    shutil.copyfile(word, temporary)

    def train(self, table: Table) -> list[dict[str, Any]]:
        """Train the models of a table that are not trained, and say of each how it was made."""
        return [self._trained(training, table.threads) for training in self.places(table).trainings]

    def places(self, table: Table) -> Places:
        """Where the models and the data of a table are, or will be."""
        models = [(model, loops, self._words(table, model.text, loops))
                  for model, loops in self._each(table, table.models)]  # fmt: skip
        words = [word for _, _, words in models for word in words]
        words += [word for step in self._steps(table) for word in step.words]
        used = {name for word in words for name in PLACEHOLDER.findall(word)}
        data = self.data.find(table.name, {name: what for name, what in table.data.items() if name in used})
        folder = self.work / "models"
        places = Places(self.root, self.work / "tables" / table.name, data, ())
        for model, loops, words in models:
            earlier = {name: paths for name, paths in places.of(loops).items() if name not in data}
            training = Training(model.name, loops, words, data, earlier, self.root, folder)
            training.command(folder)  # or raises, before any work
            places = replace(places, trainings=(*places.trainings, training))
        return places

    def _each(self, table: Table, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Loops]]:
        for entry in entries:
            for loops in table.loops_of(entry, self.quick):
                yield entry, loops

    def _steps(self, table: Table) -> Iterator[Step]:
        for step, loops in self._each(table, table.steps):
            yield Step(step.name, loops, self._words(table, step.text, loops))

    def _words(self, table: Table, text: str, loops: Loops) -> tuple[str, ...]:
        words = shlex.split(table.filled(text, loops))
        return tuple(table.quick.change(words) if self.quick else words)

    def _trained(self, training: Training, threads: int) -> dict[str, Any]:
        self.say(f"  {training.label}")
        record = training.run(self.runner, threads, self.work / "cache", self.origin)
        return {"name": training.name, **training.loops, **{k: v for k, v in record.items() if k != "finished"}}

    def _ran(self, steps: Sequence[Step], places: Places, threads: int, journal: Journal) -> list[dict[str, Any]]:
        commands = [list(replaced(step.words, places.of(step.loops))) for step in steps]

        def run(number: int) -> None:
            self.say(f"  {steps[number].shown}{''.join(f'  {k}={v}' for k, v in steps[number].loops.items())}")
            self.runner(commands[number], threads, places.work / "log.txt")

        seconds = journal.seconds(self._code, commands, run)
        return [
            {"name": step.name, **step.loops, "command": step.shown, "seconds": took}
            for step, took in zip(steps, seconds, strict=True)
        ]

    @cached_property
    def _code(self) -> str:
        """Hash of the package."""
        files = sorted(path for kind in ("py", "yaml") for path in self.root.glob(f"cdlm/**/*.{kind}"))
        return digest([digest_of(path) for path in files])


@dataclass(frozen=True)
class Step:
    """A command of a table, with placeholders of models, data and the table's folder."""

    name: str
    loops: Loops
    words: tuple[str, ...]

    @property
    def shown(self) -> str:
        """As one would type it."""
        return shown(["cdlm", *self.words])


@dataclass(frozen=True)
class Journal:
    """What an interrupted table has done, so that it goes on there.

    A step is done if it and all before it are the same, on the same code.

    Args:
        file: in the table's folder.
    """

    file: Path

    def seconds(self, code: str, commands: Sequence[Sequence[str]], run: Callable[[int], None]) -> list[float]:
        """How long each command took, of which those that are not done are run.

        Args:
            code: hash of the code.
            run: runs the command of that number.
        """
        keys = list(accumulate(commands, lambda key, words: digest([key, *words]), initial=code))[1:]
        done = self._done(keys)
        if not done:
            shutil.rmtree(self.file.parent, ignore_errors=True)  # leftovers of other commands
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for number in range(len(done), len(keys)):
            start = time.monotonic()
            run(number)
            done.append([keys[number], round(time.monotonic() - start, 1)])
            write_text(self.file, json.dumps(done))
        return [seconds for _, seconds in done]

    def close(self) -> None:
        """The table is finished: the next run begins at the first step."""
        self.file.unlink(missing_ok=True)

    def _done(self, keys: Sequence[str]) -> list[Any]:
        try:
            written = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [entry for entry, _ in takewhile(lambda pair: pair[0][0] == pair[1], zip(written, keys, strict=False))]


def seeds(commands: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Every seed that commands are given, by option; where none is given, it is the command's default."""
    found = dict[str, dict[str, None]]()
    for words in commands:
        for option, value in pairwise(words):
            if option.startswith("--") and option.endswith("seed"):
                found.setdefault(option, {})[value] = None
    return {option: list(values) for option, values in found.items()}


def total(parts: Sequence[dict[str, Any]]) -> float:
    """Seconds of all parts."""
    return round(sum(part["seconds"] for part in parts), 1)


def files_of(folder: Path, names: Sequence[str]) -> list[Path]:
    """The YAML files of tables; "all" is every one.

    Raises:
        CdlmError: there is no table of that name.
    """
    known = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if "all" in names:
        return list(known.values())
    for name in names:
        if name not in known:
            raise CdlmError(f"there is no table {name!r}{nearest(name, known)}: use all or {', '.join(known)}")
    return [known[name] for name in names]
