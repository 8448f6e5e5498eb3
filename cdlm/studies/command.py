"""`cdlm study NAME`: the defaults of a study, over them a YAML file given with --config, over that the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from cdlm import studies
from cdlm.cli.args import CommandParser, Parameter
from cdlm.cli.main import call
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import nearest
from cdlm.core.plain_yaml import read_mapping


def run(argv: list[str]) -> None:
    """Do the study that the arguments name, and print its table."""
    names = studies.names()
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: cdlm study NAME [settings], NAME is one of {', '.join(names)}")
        return
    if not argv or argv[0] not in names:
        wrong = f"there is no study {argv[0]!r}{nearest(argv[0], names)}" if argv else "study needs a name"
        raise CdlmError(f"{wrong}: use one of {', '.join(names)}")
    made = reader(argv[0])
    given = made.settings(argv[1:])
    file = given.pop("config", None)
    settings = made.arguments({**(made.read(read_mapping(file, "settings of a study")) if file else {}), **given})
    study = call(studies.find(argv[0])[0], settings).ready()
    table = study.run(argv[0])
    if not study.quiet:
        print(table)


def parser() -> argparse.ArgumentParser:
    """All studies with their settings."""
    parser = argparse.ArgumentParser(prog="cdlm study")
    commands = parser.add_subparsers()
    for name in studies.names():
        commands.add_parser(name, parents=[reader(name)], add_help=False)
    return parser


def reader(name: str) -> CommandParser:
    """Reads the settings of a study, with its defaults."""
    kind, defaults = studies.find(name)
    made = CommandParser(kind, f"cdlm study {name}", read_mapping(defaults, "settings of a study"))
    made.add(Parameter("config", Path | None, None, "YAML file of these settings"))
    return made
