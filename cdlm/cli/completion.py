"""`cdlm completion bash` prints a script that completes commands, settings and files in that shell."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from cdlm.cli.commands import COMMANDS, Command
from cdlm.cli.main import function_of, parser_of
from cdlm.core.errors import CdlmError

SHELLS = ("bash", "zsh", "tcsh")


def run(argv: list[str]) -> None:
    """Print the script for a shell."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: cdlm completion SHELL, SHELL is one of {', '.join(SHELLS)}")
        return
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise CdlmError(f"completion needs a shell, one of {', '.join(SHELLS)}, got {' '.join(argv) or 'none'}")
    print(script(argv[0]))


def script(shell: str) -> str:
    """The script for a shell."""
    import shtab

    return shtab.complete(everything(), shell)


def parser() -> argparse.ArgumentParser:
    """The shells."""
    made = argparse.ArgumentParser(prog="cdlm completion")
    made.add_argument("shell", choices=SHELLS)
    return made


def everything() -> argparse.ArgumentParser:
    """All commands with all settings, as one parser."""
    made = argparse.ArgumentParser(prog="cdlm")
    made.add_argument("--version", action="store_true", help="print the version")
    commands = made.add_subparsers()
    for command in COMMANDS:
        own = _parser(command)
        _complete_paths(own)
        commands.add_parser(command.name, parents=[own], add_help=False, help=command.help)
    return made


def _parser(command: Command) -> argparse.ArgumentParser:
    return import_module(command.module).parser() if command.own else parser_of(command, function_of(command))


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    import shtab

    from cdlm.cli.args import path_of

    for action in parser._actions:
        if action.type in (Path, path_of):
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
