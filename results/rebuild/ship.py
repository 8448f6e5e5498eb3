"""The models of a table, put into the package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdlm import api
from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing, write_json
from cdlm.evaluation.judge import read_name
from cdlm.runs.train import RunText
from rebuild import document
from rebuild.definition import read_table
from rebuild.run import Builder

MOST = 12_000_000
"""Bytes of all models that ship."""
RUN, SHORT = "_run", "_short"
"""Ends of the names of models that do not ship: runs that are packed, and what the others are compared with."""
CARD, MADE = "README.md", "made.json"


def ship(builder: Builder, definitions: Sequence[Path], out: Path) -> None:
    """Copy the packed models of tables to folders of their names, each with its commands and numbers (`made.json`).

    Cards are rendered afterwards, like pages.

    Raises:
        CdlmError: a table or a model of it is not there, a judge is not the one that `--judge own` means today, or all
            are larger than `MOST`.
    """
    packed = [found for definition in definitions for found in _packed(builder, definition)]
    size = sum(file.stat().st_size for place, _ in packed for file in place.iterdir())
    if size > MOST:
        raise CdlmError(f"the models have {size:,} bytes, at most {MOST:,} ship: train smaller ones")
    for place, content in packed:
        name = place.name.rpartition("-")[0]
        with replacing(out / name) as new:
            shutil.copytree(place, new)
            (new / CARD).unlink(missing_ok=True)
            write_json(new / MADE, made(content, name))
    print(f"{len(packed)} models, {size:,} bytes, in {out}")


def _packed(builder: Builder, definition: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folders of a table's models that ship, each with what the table found."""
    content = document.read(definition.with_suffix(".json"))
    table = read_table(definition)
    folders = {t.name: t.place for t in builder.places(table).trainings}
    places = {name: place for name, place in folders.items() if not name.endswith((RUN, SHORT))}
    if missing := [str(place) for place in places.values() if not place.is_dir()]:
        raise CdlmError(f"{missing[0]} is not there: python results/build.py run {table.name} makes it")
    for name, place in places.items():
        if (judge := read_name(place)) is not None:
            run = made(content, name)["models"][0]["name"]  # the first of what a judge was made from
            check_judge(place, judge.get("key"), folders[run])
    return [(place, content) for place in places.values()]


def check_judge(place: Path, key: str | None, run: Path) -> None:
    """Raise unless a judge is the one that `--judge own` means for a run, which the rows of its table were read by.

    A judge that was trained before its defaults changed stays where it was made.
    """
    if key != api.small_judge(RunText.of_run(run)).key:
        raise CdlmError(
            f"{place} is another judge than `--judge own` trains on the text of {run.name}: delete it with the judge"
            " that it was packed from, and run its table again"
        )


def made(content: dict[str, Any], name: str) -> dict[str, Any]:
    """What the table says of one model: how it and the models before it were made, and its rows."""
    wanted, models = [name], []
    for one in reversed(content["models"]):
        if one["name"] in wanted:
            models.insert(0, one)
            wanted += [other["name"] for other in content["models"] if f"{{{other['name']}}}" in one["command"]]
    rows = [row for row in content["rows"] if row.get("way") == name]
    return {"table": content["table"], "models": models, "rows": rows}
