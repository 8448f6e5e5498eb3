"""The command line: arguments in, one call, files out. Nothing heavy is imported before a command is known."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cdlm.cli.commands import COMMANDS, Command
from cdlm.core.devices import DeviceOptions
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import nearest
from cdlm.core.progress import drop_announced, show_announced

if TYPE_CHECKING:
    from cdlm.cli.args import CommandParser


def main(argv: list[str] | None = None) -> None:
    """Run a command; bad input ends with one line on standard error and exit code 2."""
    # Before torch is imported. Threads that spin at barriers take each other's cores on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except CdlmError as error:
        _fail(str(error), error.exit_code)
    except argparse.ArgumentError as error:
        _fail(f"{error} (cdlm train --help lists the settings)", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        raise SystemExit(141) from None
    finally:
        drop_announced()


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return
    if argv[0] == "--version":
        import cdlm

        print(f"cdlm {cdlm.__version__}")
        return
    command = find(argv[0])
    if command.own:
        import_module(command.module).run(argv[1:])
    else:
        function = function_of(command)
        call(function, parser_of(command, function).values(argv[1:]))
    show_announced()


def find(name: str) -> Command:
    """The command of that name.

    Raises:
        CdlmError: there is none; the message has the nearest name.
    """
    known = {command.name: command for command in COMMANDS}
    if name not in known:
        raise CdlmError(f"there is no command {name!r}{nearest(name, known)}: use one of {', '.join(known)}")
    return known[name]


def function_of(command: Command) -> Callable[..., None]:
    """What a command that is not `own` calls."""
    return getattr(import_module(command.module), command.name.replace("-", "_"))


def parser_of(command: Command, function: Callable[..., None]) -> CommandParser:
    """Reads the arguments of such a command."""
    from cdlm.cli.args import CommandParser

    return CommandParser(function, f"cdlm {command.name}")


def call(function: Callable[..., Any], settings: dict[str, Any]) -> Any:
    """Call a function with its settings; a machine among them gets its device, which is announced."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars are about loading files, ours about samples
    return function(**{k: v.ready() if isinstance(v, DeviceOptions) else v for k, v in settings.items()})


def _help() -> str:
    lines = "\n".join(f"  {command.name:<15}{command.help}" for command in COMMANDS)
    return (
        f"usage: cdlm COMMAND [settings]\n\n{lines}\n\n"
        "cdlm COMMAND --help lists the settings of a command, cdlm --version prints the version."
    )


def _fail(message: str, code: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a parallel run all fail alike
        print("cdlm: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
