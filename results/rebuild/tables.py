"""What templates can say of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.meta import find_undeclared_variables

from cdlm.core.errors import CdlmError
from cdlm.core.parsing import nearest
from rebuild import document
from rebuild.filters import Missing, plain

DASH = "-"

Columns = Mapping[str, str] | Sequence[str]
Reader = tuple[frozenset[str], Callable[[Any], Any]]
"""Columns that a cell needs, and its value in a row."""


class Row(dict[str, Any]):
    """A row, which says so when it lacks a column."""

    def __missing__(self, key: str) -> Any:
        raise CdlmError(f"the row has no column {key!r}{nearest(key, self)}: it has {', '.join(self)}")


@dataclass(frozen=True)
class Tables:
    """The tables of a page.

    Args:
        folder: of their JSON files.
        environment: of the expressions of columns.
        read: what was read so far.
        footed: tables whose `made_by` stands in the page.
    """

    folder: Path
    environment: Environment
    read: dict[str, dict[str, Any]] = field(default_factory=dict)
    footed: set[str] = field(default_factory=set)

    @property
    def names(self) -> dict[str, Callable[..., Any]]:
        """What templates can call."""
        return {"table": self.table, "row": self.row, "rows": self.rows, "values": self.values, "about": self.about,
                "made_by": self.made_by, "commit": self.commit}  # fmt: skip

    def table(self, name: str, columns: Columns = (), /, by: str = "", **where: Any) -> str:
        """A table in Markdown, the first column on the left and the others on the right.

        Args:
            columns: headings, and for each an expression such as "ar_nll | number(3)"; or columns, by default all.
            by: column whose equal values make one line of several rows; `spread` then shows their mean and deviation.
            where: values, or lists of values, of columns.
        """
        rows = self.rows(name, **where)
        if by:
            labels = dict.fromkeys(self.values(name, by, **where))
            rows = [_merged([row for row in rows if by in row and row[by] == label]) for label in labels]
        if isinstance(columns, Mapping):
            readers = {head: self._reader(expression) for head, expression in columns.items()}
        else:
            readers = {column: (frozenset([column]), itemgetter(column)) for column in columns or _columns(rows)}
        cells = [[_cell(reader, row, rows, name) for reader in readers.values()] for row in rows]
        lines = [list(readers), [":--", *["--:"] * (len(readers) - 1)], *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def row(self, name: str, /, **where: Any) -> Row:
        """The only row with these values of columns."""
        found = self.rows(name, **where)
        if len(found) > 1:
            raise CdlmError(f"{name} has {len(found)} rows with {where}: name more columns")
        return found[0]

    def rows(self, name: str, /, **where: Any) -> list[Row]:
        """All rows with these values, or one of a list of values, of columns; at least one.

        The small version has fewer, and perhaps none.
        """
        content = self._content(name)
        try:
            return _chosen([Row(row) for row in content["rows"]], name, where)
        except CdlmError:
            if content["quick"]:
                return []
            raise

    def values(self, name: str, column: str, /, **where: Any) -> list[Any]:
        """A column of such rows, of those that have it."""
        rows = self.rows(name, **where)
        found = [row[column] for row in rows if column in row]
        if not found:
            raise _unknown(column, rows, name)
        return found

    def about(self, name: str, /, **where: Any) -> Row:
        """What the first such file of rows says of all its rows: settings, judge, notes."""
        return _chosen([Row(about) for about in self._content(name)["files"]], name, where)[0]

    def commit(self, name: str) -> str:
        """The commit that a table was built from, its first ten letters."""
        return (self._content(name)["commit"] or "none")[:10]

    def made_by(self, name: str) -> str:
        """How to rebuild a table, and where and when it was built."""
        of = self._content(name)
        self.footed.add(name)
        made = "The small version, whose numbers say nothing, made" if of["quick"] else "Made"
        models = of["seconds"]["models"]
        training = f", training of its models {_took(models)}" if models else ""
        commit = f"commit {of['commit'][:10]}" if of["commit"] else "no commit"
        machine = of["machine"]
        memory = [f"{machine['memory_gb']} GB"] if machine["memory_gb"] else []
        parts = [machine["processor"], f"{machine['cores']} cores", *memory, machine["system"]]
        versions = ", ".join(f"{package} {version}" for package, version in of["versions"].items())
        threads = f"{of['threads']} thread{'s' if of['threads'] > 1 else ''}"
        place = ", ".join([*parts, *machine["accelerators"], threads])
        return (
            f"{made} by `python results/build.py run {name}{' --quick' if of['quick'] else ''}` on {of['date']}:"
            f" {_took(of['seconds']['steps'])}{training}; {place}; {versions};"
            f" {commit}{'' if of['clean'] else ' with changes'}."
        )

    def _content(self, name: str) -> dict[str, Any]:
        if name not in self.read:
            self.read[name] = document.read(self.folder / f"{name}.json")
        return self.read[name]

    def _reader(self, expression: str) -> Reader:
        asked = find_undeclared_variables(self.environment.parse(f"{{{{ {expression} }}}}"))
        return frozenset(asked), self.environment.compile_expression(expression, undefined_to_none=False)


def _cell(reader: Reader, row: Row, rows: Sequence[Row], name: str) -> str:
    """A cell; a dash if the row lacks a column that another row has, or its number was not measured."""
    asked, value = reader
    for column in asked - row.keys():
        if not any(column in other for other in rows):
            raise _unknown(column, rows, name)
        return DASH
    try:
        return plain(value(row)).replace("|", "\\|")
    except Missing:
        return DASH


def _merged(rows: Sequence[Row]) -> Row:
    """Rows as one: of each column the value that all rows have that have the column, or the list of their values."""
    found = {column: [row[column] for row in rows if column in row] for column in _columns(rows)}
    return Row({column: v[0] if all(one == v[0] for one in v) else v for column, v in found.items()})


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _chosen(rows: list[Row], name: str, where: Mapping[str, Any]) -> list[Row]:
    for column, value in where.items():
        wanted, there = value if isinstance(value, list) else [value], [row[column] for row in rows if column in row]
        if not there:
            raise _unknown(column, rows, name)
        if missing := [one for one in wanted if one not in there]:
            known = ", ".join(dict.fromkeys(map(repr, there)))
            raise CdlmError(f"{name} has no row with {column} {missing[0]!r} here: there is {known}")
        rows = [row for row in rows if column in row and row[column] in wanted]
    return rows


def _unknown(column: str, rows: Sequence[Row], name: str) -> CdlmError:
    columns = _columns(rows)
    return CdlmError(f"{name} has no column {column!r}{nearest(column, columns)}: it has {', '.join(columns)}")


def _took(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
