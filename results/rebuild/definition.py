"""The definition of a table: a YAML file of models, commands and what of their output is kept."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.parsing import nearest
from rebuild.document import digest

NAME = re.compile(r"[A-Za-z][\w-]*")
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.-]*\*?)\}")
"""`{model}`, `{model*}`, `{work}`, `{file.txt}`, `{loop}` and `{loop.key}`; other braces stay as they are."""
WORK = "work"
"""The placeholder of the folder that a table may write to."""
OUT = "out"
"""The placeholder, in a model, of the folder that its command makes."""

Loops = Mapping[str, Any]
"""The value of every loop that an entry is in."""


@dataclass(frozen=True)
class Entry:
    """A model, a step or a file of rows.

    Args:
        name: of a model or a step; empty for rows.
        text: a command without its first word, `cdlm`, or the path of a JSON file.
        only: labels of loops that it is for.
        at: of rows, where in the file they are: keys with dots between them, "." for the whole file.
        where: of rows, values of the columns of those that are kept.
        set: of rows, columns to add.
    """

    name: str
    text: str
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at: str = "rows"
    where: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Quick:
    """What is different in the small version.

    Args:
        each: the labels that loops keep.
        replace: options that get another value wherever they are given; None takes them away.
        append: words at the end of every command of that name.
    """

    each: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    replace: Mapping[str, str | None] = field(default_factory=dict)
    append: Mapping[str, str] = field(default_factory=dict)

    def change(self, words: list[str]) -> list[str]:
        """The small version of a command: its name, positional words, then options with their values."""
        changed, keep = list[str](), True
        for word in words:
            if word.startswith("--"):
                option = word.partition("=")[0].replace("_", "-")
                keep = option not in self.replace
                value = self.replace.get(option)
                changed += [] if value is None else [option, *shlex.split(value)]
            if keep:
                changed.append(word)
        return changed + shlex.split(self.append.get(words[0], ""))


@dataclass(frozen=True)
class Table:
    """A table as its YAML file defines it.

    Args:
        data: files that it needs, and for each what it is and where it comes from.
        each: of every loop its values by label; a value that is a mapping is read with `{loop.key}`.
        images: pictures of docs/images, and the file that each is a copy of.
        threads: of every command.
        digest: hash of the file's content, comments and the small version apart.
    """

    name: str
    title: str
    data: Mapping[str, str]
    each: Mapping[str, Mapping[str, Any]]
    models: tuple[Entry, ...]
    steps: tuple[Entry, ...]
    rows: tuple[Entry, ...]
    images: Mapping[str, str]
    quick: Quick
    threads: int
    digest: str

    def loops_of(self, entry: Entry, quick: bool) -> list[dict[str, Any]]:
        """The values of the loops that an entry mentions, itself or by a model; one element if it mentions none."""
        names = self._mentioned(entry)
        labels = []
        for name in names:
            kept = self.quick.each.get(name, tuple(self.each[name])) if quick else tuple(self.each[name])
            labels.append([label for label in kept if label in entry.only.get(name, kept)])
        return [
            {name: self._shown(name, label) for name, label in zip(names, chosen, strict=True)}
            for chosen in product(*labels)
        ]

    def filled(self, text: str, loops: Loops) -> str:
        """A text with the values of loops in the place of their placeholders."""

        def value(found: re.Match[str]) -> str:
            name, _, key = found[1].partition(".")
            if name not in self.each:
                return found[0]
            label = str(loops[name])
            if not key:
                return label
            values = self.each[name][label]
            if not isinstance(values, Mapping) or key not in values:
                raise self.error(f"{label!r} of {name} has no {key!r}, which {found[0]} asks for: add it")
            return str(values[key])

        return PLACEHOLDER.sub(value, text)

    def error(self, message: str) -> CdlmError:
        """An error in the YAML file."""
        return CdlmError(f"results/tables/{self.name}.yaml: {message}")

    def _shown(self, name: str, label: str) -> Any:
        """A loop's value as rows have it: the number or text itself, or the label of a mapping."""
        value = self.each[name][label]
        return label if isinstance(value, Mapping) else value

    def _mentioned(self, entry: Entry) -> list[str]:
        texts = [entry.text, *map(str, [*entry.where.values(), *entry.set.values()])]
        found = {name for text in texts for name in PLACEHOLDER.findall(text)}
        models = self.models[: self.models.index(entry)] if entry in self.models else self.models
        for model in models:  # of earlier ones alone: a model that mentions a later one is refused, and has no end
            if found & {model.name, f"{model.name}.name"}:
                found |= set(self._mentioned(model))
        heads = {name.partition(".")[0] for name in found}
        return [name for name in self.each if name in heads]


def read_table(file: Path) -> Table:
    """The table that a YAML file defines.

    Raises:
        CdlmError: the file has an unknown key or placeholder, or a value of the wrong kind.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CdlmError(f"cannot read a table from {file.name} ({first_line(error)}): write YAML") from error
    reader = _Reader(file.stem)
    try:
        table = reader.table(content)
    except CdlmError as error:
        raise CdlmError(f"results/tables/{file.name}: {error}") from error
    _check_placeholders(table)
    return table


@dataclass(frozen=True)
class _Reader:
    """Reads the parts of a table."""

    name: str

    def table(self, content: Any) -> Table:
        kinds = {
            "title": str, "data": dict, "threads": int, "each": dict, "models": dict, "steps": list, "rows": list,
            "images": dict, "quick": dict,
        }  # fmt: skip
        of = _fields("a table", content, kinds, ("title", "steps", "rows"))
        each = {self._name("a loop", name): self._loop(name, values) for name, values in of.get("each", {}).items()}
        models = [self._model(f"model {name}", name, value) for name, value in of.get("models", {}).items()]
        steps = [self._step(i, value) for i, value in enumerate(of["steps"], 1)]
        rows = [self._rows(i, value) for i, value in enumerate(of["rows"], 1)]
        data = {str(name): _text(f"data {name}", what) for name, what in of.get("data", {}).items()}
        images = {str(name): _text(f"image {name}", file) for name, file in of.get("images", {}).items()}
        names = [WORK, OUT, *each, *(model.name for model in models), *data]
        if twice := [name for name in names if names.count(name) > 1]:
            raise CdlmError(f"{twice[0]!r} is the name of two things: give each placeholder its own")
        if of.get("threads", 1) < 1:
            raise CdlmError(f"expected threads >= 1, got {of['threads']}")
        table = Table(
            self.name, of["title"], data, each, tuple(models), tuple(steps), tuple(rows), images, self._quick(of, each),
            of.get("threads", 1), digest({key: value for key, value in of.items() if key != "quick"}),
        )  # fmt: skip
        for entry in (*models, *steps, *rows):
            _check_labels("only", entry.only, each)
        return table

    def _loop(self, name: str, values: Any) -> dict[str, Any]:
        if isinstance(values, list) and values and all(isinstance(v, str | int | float) for v in values):
            return {str(value): value for value in values}
        if isinstance(values, dict) and values and all(isinstance(v, dict) for v in values.values()):
            return {str(label): value for label, value in values.items()}
        raise CdlmError(
            f"expected each.{name} to be a list of values, or a mapping of labels to mappings, got {values!r}"
        )

    def _model(self, place: str, name: str, value: Any) -> Entry:
        """A model: the arguments of its training, or a command that makes it; and the labels that it is for."""
        given = value if isinstance(value, dict) else {"train": value}
        made = "run" if "run" in given else "train"
        of = _fields(place, given, {made: str, "only": dict}, (made,))
        text = self._command(place, of["run"]) if made == "run" else f"train {_words(place, of['train'])}"
        if made == "run" and shlex.split(text).count(f"{{{OUT}}}") != 1:
            raise CdlmError(
                f"expected {place} to say where its folder goes, got {of['run']!r}: write {{{OUT}}} once, as a word of"
                " its own"
            )
        return Entry(self._name("a model", name), text, _labels(of.get("only", {})))

    def _step(self, number: int, value: Any) -> Entry:
        place = f"step {number}"
        given = value if isinstance(value, dict) else {"run": value}
        of = _fields(place, given, {"run": str, "name": str, "only": dict}, ("run",))
        return Entry(of.get("name", place), self._command(place, of["run"]), _labels(of.get("only", {})))

    def _command(self, place: str, value: Any) -> str:
        text = _words(place, value)
        if not text.startswith("cdlm "):
            raise CdlmError(f"expected a cdlm command in {place}, got {text!r}: write it as on a command line")
        return text.removeprefix("cdlm ")

    def _rows(self, number: int, value: Any) -> Entry:
        kinds = {"file": str, "at": str, "where": dict, "set": dict, "only": dict}
        of = _fields(f"rows {number}", value, kinds, ("file",))
        only = _labels(of.get("only", {}))
        return Entry("", of["file"], only, of.get("at", "rows"), of.get("where", {}), of.get("set", {}))

    def _quick(self, of: Mapping[str, Any], each: Mapping[str, Any]) -> Quick:
        parts = _fields("quick", of.get("quick", {}), {"each": dict, "replace": dict, "append": dict}, ())
        kept = _labels(parts.get("each", {}))
        _check_labels("quick.each", kept, each)
        replace = dict[str, str | None]()
        for option, value in parts.get("replace", {}).items():
            if not str(option).startswith("--"):
                raise CdlmError(f"expected an option such as --n in quick.replace, got {option!r}")
            replace[option.replace("_", "-")] = None if value is None else str(value)
        return Quick(kept, replace, {str(k): _words("quick.append", v) for k, v in parts.get("append", {}).items()})

    def _name(self, what: str, name: Any) -> str:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CdlmError(f"expected {what} to have a name of letters, digits, - and _, got {name!r}")
        return name


def _fields(place: str, value: Any, kinds: Mapping[str, type], needed: Collection[str]) -> dict[str, Any]:
    """The parts of a mapping, each of its kind."""
    if not isinstance(value, dict):
        raise CdlmError(f"expected {place} to be a mapping with {', '.join(kinds)}, got {value!r}")
    for key, part in value.items():
        if key not in kinds:
            raise CdlmError(f"{place} has an unknown key {key!r}{nearest(str(key), kinds)}: use {', '.join(kinds)}")
        if type(part) is not kinds[key]:
            raise CdlmError(f"expected {key} of {place} to be a {kinds[key].__name__}, got {part!r}")
    if missing := [key for key in needed if not value.get(key)]:
        raise CdlmError(f"{place} has no {missing[0]}: add it")
    return value


def _text(place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CdlmError(f"expected {place} to be a text, got {value!r}")
    return value


def _words(place: str, value: Any) -> str:
    """A text that can be split into words."""
    try:
        shlex.split(_text(place, value))
    except ValueError as error:
        raise CdlmError(f"{place} cannot be split into words ({first_line(error)}): {value!r}") from error
    return value


def _labels(value: Mapping[Any, Any]) -> dict[str, tuple[str, ...]]:
    return {str(name): tuple(map(str, v if isinstance(v, list) else [v])) for name, v in value.items()}


def _check_labels(place: str, chosen: Mapping[str, tuple[str, ...]], each: Mapping[str, Mapping[str, Any]]) -> None:
    for name, labels in chosen.items():
        if name not in each:
            raise CdlmError(f"{place} names a loop {name!r}{nearest(name, each)}: there is {', '.join(each) or 'none'}")
        known = each[name]
        for label in labels:
            if label not in known:
                raise CdlmError(f"{place} names {label!r}{nearest(label, known)} of {name}: it has {', '.join(known)}")


def _check_placeholders(table: Table) -> None:
    """Raise for a placeholder that stands for nothing."""
    models = [model.name for model in table.models]
    known = {WORK, *table.data, *models, *(f"{name}*" for name in models), *(f"{name}.name" for name in models)}
    appended = [Entry("quick.append", text) for text in table.quick.append.values()]
    images = [Entry(f"image {name}", file) for name, file in table.images.items()]
    for entry in (*table.models, *table.steps, *table.rows, *images, *appended):
        allowed = known
        if entry in table.models:  # a model is made of data and of models before it
            allowed = {OUT, *table.data, *models[: models.index(entry.name)]}
        for loops in table.loops_of(entry, quick=False):
            texts = [entry.text, *map(str, [*entry.where.values(), *entry.set.values()])]
            for name in (name for text in texts for name in PLACEHOLDER.findall(table.filled(text, loops))):
                if name not in allowed:
                    names = [*sorted(allowed), *table.each]
                    raise table.error(
                        f"{{{name}}} of {entry.name or entry.text} stands for nothing{nearest(name, names)}: there is"
                        f" {', '.join(names)}"
                    )
