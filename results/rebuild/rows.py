"""Rows of a table, from the JSON files that commands leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdlm.core.files import read_json
from rebuild.commands import replaced
from rebuild.definition import Entry, Loops, Table
from rebuild.places import Places

Row = dict[str, Any]


def read_rows(table: Table, entry: Entry, loops: Loops, places: Places) -> tuple[Row, list[Row]]:
    """What a file says of all its rows, and those of its rows that the entry keeps; both with the loops' values.

    Raises:
        CdlmError: the file, its rows, or those that are to be kept are not there, or a column has two values.
    """

    def filled(value: Any) -> Any:
        return table.filled(value, loops) if isinstance(value, str) else value

    [path] = replaced([table.filled(entry.text, loops)], places.of(loops))
    content = read_json(Path(path), f"what a step of {table.name} leaves")
    found = _at(table, entry, content)
    where = {key: [filled(one) for one in _listed(value)] for key, value in entry.where.items()}
    kept = [row for row in found if all(row.get(key) in values for key, values in where.items())]
    if not kept:
        raise table.error(f"{entry.text} has no row with {where}: there is {_choices(found, where)}")
    added = {**loops, **{key: filled(value) for key, value in entry.set.items()}}
    for row in kept:
        if clash := [key for key in added if key in row and row[key] != added[key]]:
            raise table.error(f"{entry.text} has a column {clash[0]!r} of its own: give the loop, or set, another name")
    about = {key: value for key, value in content.items() if not _is_rows(value)} if entry.at != "." else {}
    return {"file": entry.text, **added, **about}, [{**added, **row} for row in kept]


def _at(table: Table, entry: Entry, content: Any) -> list[Row]:
    """The rows in a file's content; an object is a single row."""
    for key in entry.at.split(".") if entry.at != "." else []:
        if not isinstance(content, dict) or key not in content:
            keys = ", ".join(content) if isinstance(content, dict) else "no keys"
            raise table.error(f"{entry.text} has nothing at {entry.at}: there is {keys}")
        content = content[key]
    rows = content if isinstance(content, list) else [content]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise table.error(f"{entry.text} has no rows at {entry.at}: expected a list of objects, or an object")
    return rows


def _choices(rows: list[Row], where: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {sorted({str(row.get(key)) for row in rows})}" for key in where)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)
