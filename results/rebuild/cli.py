"""The command line: run, render, check."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from rebuild import document, machine
from rebuild.commands import Runner, in_forked_process, in_new_process, stop_on_sigterm
from rebuild.data import Data
from rebuild.definition import read_table
from rebuild.document import NotThere
from rebuild.pages import Pages, templates
from rebuild.run import Builder, files_of
from rebuild.ship import ship


@dataclass(frozen=True)
class Folders:
    """Where things are.

    Args:
        root: of the checkout.
        work: folder of models and of what commands leave; the small versions are in its folder `quick`.
    """

    root: Path
    work: Path

    @property
    def definitions(self) -> Path:
        """YAML files of tables."""
        return self.root / "results" / "tables"

    def working(self, quick: bool) -> Path:
        """Where tables are built."""
        return self.work / "quick" if quick else self.work

    def tables(self, quick: bool) -> Path:
        """JSON files of tables: the small versions never take the place of the real ones."""
        return self.working(quick) if quick else self.definitions

    def pages(self, quick: bool) -> Pages:
        """The pages: those of the small versions are not the documentation."""
        out = self.working(quick) / "pages" if quick else self.root / "docs"
        return Pages(self.root / "results" / "pages", self.tables(quick), out)

    def every(self, quick: bool) -> list[Pages]:
        """The pages, and the cards of the models that ship."""
        pages = self.pages(quick)
        out = pages.out / "shipped" if quick else self.root / "cdlm" / "shipped"
        return [pages, Pages(self.root / "results" / "cards", pages.tables, out)]


def main(argv: list[str] | None = None) -> None:
    """Do what the arguments say; bad input ends with one line on standard error and exit code 2."""
    options = _parser().parse_args(argv)
    root = Path(__file__).resolve().parents[2]
    folders = Folders(root, (options.work or root / "runs" / "results").resolve())
    try:
        faults = options.do(folders, options)
    except CdlmError as error:
        faults = [str(error)]
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    for fault in faults:
        print("results: " + " ".join(fault.split()), file=sys.stderr)
    if faults:
        raise SystemExit(2)


def run(
    folders: Folders, names: list[str], quick: bool, data: Path | None, runner: Runner, models_alone: bool = False
) -> None:
    """Build tables; all their YAML files are read first.

    Args:
        data: folder of the files that they need.
        models_alone: train their models and no more.
    """
    tables = [read_table(file) for file in files_of(folders.definitions, names)]
    builder = _builder(folders, data, runner, quick)
    if not quick:
        for table in tables:  # what is missing is better known before the long work
            builder.places(table)
    for table in tables:
        (builder.train if models_alone else builder.build)(table)


def _builder(folders: Folders, data: Path | None, runner: Runner, quick: bool) -> Builder:
    work = folders.working(quick)
    files = Data(data and data.resolve(), work / "data" if quick else None)
    return Builder(
        folders.root, folders.tables(quick), work, files, runner, partial(machine.origin, folders.root), quick,
        partial(print, flush=True),
    )  # fmt: skip


def render(folders: Folders, quick: bool) -> None:
    """Write every page whose tables are there; of the small versions, all pages."""
    for pages, name in _all(folders, quick):
        try:
            write_text(pages.out / name, pages.render(name))
        except NotThere as error:
            if quick:
                raise
            print(f"not rendered: {error}")
            continue
        print(pages.out / name)


def _all(folders: Folders, quick: bool) -> list[tuple[Pages, str]]:
    return [(pages, name) for pages in folders.every(quick) for name in templates(pages.folder)]


def check(folders: Folders, warn: Callable[[str], None] = print) -> list[str]:
    """What is wrong with the real tables and pages, one line each.

    A page that was not rendered yet, since a table of it is not there, is no fault. Nor is a table whose YAML file has
    changed since: it is a warning.
    """
    faults = []
    for file in sorted(folders.definitions.glob("*.json")):
        try:
            stale = _stale(folders.definitions, document.read(file))
            if stale:
                warn(f"warning: {stale}")
        except CdlmError as error:
            faults.append(str(error))
    for file in sorted(folders.definitions.glob("*.yaml")):
        try:
            read_table(file)
        except CdlmError as error:
            faults.append(str(error))
    found = [_wrong(pages, name, warn) for pages, name in _all(folders, quick=False)]
    return faults + [fault for fault in found if fault]


def _wrong(pages: Pages, name: str, warn: Callable[[str], None]) -> str:
    """What is wrong with a page."""
    try:
        text = pages.render(name)
    except NotThere as error:
        if pages.is_rendered(name):
            return str(error)
        warn(f"skipped: {error}")
        return ""
    except CdlmError as error:
        return str(error)
    place = pages.out / name
    if not place.exists() or place.read_text(encoding="utf-8") != text:
        source = f"results/{pages.folder.name}/{name}"
        return f"{pages.out.name}/{name} is not what {source} gives: python results/build.py render writes it"
    return ""


def _stale(folder: Path, content: dict[str, object]) -> str:
    """What is to be said of a table whose definition is gone or another."""
    name = content["table"]
    file = folder / f"{name}.yaml"
    if not file.exists():
        return f"{name}.json has no {name}.yaml beside it: remove it, or bring the YAML file back"
    if read_table(file).digest != content["definition"]:
        return f"{name}.yaml has changed since {name}.json was made: python results/build.py run {name} makes it anew"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python results/build.py", description="Builds tables and pages of results.")
    commands = parser.add_subparsers(required=True, metavar="run | render | check | ship")
    build = commands.add_parser("run", help="run the commands of tables and write their JSON files")
    build.add_argument("names", nargs="+", metavar="NAME", help="tables of results/tables, or all")
    build.add_argument("--data", type=Path, help="folder of the files that tables need; by default $CDLM_DATA")
    build.add_argument("--models-alone", action="store_true", help="train the models of the tables and no more")
    build.set_defaults(do=_run)
    draw = commands.add_parser("render", help="write the pages")
    draw.set_defaults(do=_render)
    test = commands.add_parser("check", help="say which pages and tables are not as they were made")
    test.set_defaults(do=lambda folders, options: check(folders))
    given = commands.add_parser("ship", help="copy the models of the tables shipped* into the package")
    given.add_argument("--data", type=Path, help="as of run")
    given.set_defaults(do=_ship)
    for command in (build, draw):
        command.add_argument("--quick", action="store_true", help="the small version, which stays in the work folder")
    for command in (build, draw, test, given):
        command.add_argument("--work", type=Path, help="folder of models and samples; by default runs/results")
    return parser


def _ship(folders: Folders, options: argparse.Namespace) -> list[str]:
    data = _data(options)
    builder = _builder(folders, data, in_new_process(folders.root), quick=False)
    ship(builder, sorted(folders.definitions.glob("shipped*.yaml")), folders.root / "cdlm" / "shipped")
    return []


def _data(options: argparse.Namespace) -> Path | None:
    return options.data or (Path(os.environ["CDLM_DATA"]) if os.environ.get("CDLM_DATA") else None)


def _run(folders: Folders, options: argparse.Namespace) -> list[str]:
    stop_on_sigterm()
    given = _data(options)
    forked = options.quick and sys.platform == "linux"
    runner = in_forked_process(folders.root) if forked else in_new_process(folders.root)
    run(folders, options.names, options.quick, given, runner, options.models_alone)
    return []


def _render(folders: Folders, options: argparse.Namespace) -> list[str]:
    render(folders, options.quick)
    return []
