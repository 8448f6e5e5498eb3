"""The command line: arguments in, one call, files out. Nothing heavy is imported before a command is known."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, cast

from cdlm.cli.commands import COMMANDS, Command
from cdlm.core.devices import DeviceOptions
from cdlm.core.errors import CdlmError, is_out_of_memory
from cdlm.core.inert import Inert, shortened
from cdlm.core.parsing import nearest
from cdlm.core.progress import drop_announced, show_announced, to_stderr

if TYPE_CHECKING:
    from cdlm.cli.args import CommandParser


def main(argv: list[str] | None = None) -> None:
    """Run a command; bad input ends with one line on standard error and exit code 2.

    So does a system that refuses to go on: a full disk, a closed standard output, no more memory. What is printed for
    people holds no control characters. Where whoever read the output has left, the command ends silently with code 141.
    """
    # Before torch is imported. Threads that spin at barriers take each other's cores on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _standard_streams():
        try:
            _dispatch(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        except CdlmError as error:
            _fail(str(error), error.exit_code)
        except argparse.ArgumentError as error:
            _fail(f"{error} (cdlm train --help lists the settings)", 2)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            _give_up_output()
            raise SystemExit(141) from None
        except OSError as error:
            _give_up_output()
            place = error.filename or "a file or standard output"
            _fail(f"cannot read or write {place} ({error.strerror or error}): free it, or choose another place", 2)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _fail("out of memory: take a smaller --batch-size, fewer samples or a shorter length", 2)
        finally:
            drop_announced()


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Standard output for people, in place of the plain one.

    A closed stream gets its number back: else the next file that is opened would have it, and what is printed. Standard
    output that was closed refuses what is written; errors that nobody can read are dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of characters that the terminal does not have
    shown = open(1, "w", closefd=False) if sys.stdout is None else Inert(sys.stdout)
    errors = open(2, "w", closefd=False) if sys.stderr is None else sys.stderr
    with redirect_stdout(cast(Any, shown)), redirect_stderr(errors):
        yield


def _give_up_output() -> None:
    """If nothing can be written to standard output, let it end in nothing: Python writes once more as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # a stream without a number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    ready = {k: v.ready() if isinstance(v, DeviceOptions) else v for k, v in settings.items()}
    with ExitStack() as stack:
        for machine in filter(lambda value: isinstance(value, DeviceOptions), ready.values()):
            stack.callback(machine.close)
        return function(**ready)


def _help() -> str:
    lines = "\n".join(f"  {command.name:<15}{command.help}" for command in COMMANDS)
    return (
        f"usage: cdlm COMMAND [settings]\n\n{lines}\n\n"
        "cdlm COMMAND --help lists the settings of a command, cdlm --version prints the version."
    )


def _fail(message: str, code: int) -> None:
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if local == "0":  # the processes of a parallel run all fail alike
        with suppress(OSError):
            to_stderr("cdlm: " + shortened(" ".join(message.split())))
    raise SystemExit(code)
