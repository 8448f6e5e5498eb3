"""Commands: the words of one, and what runs them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import TypeVar

from cdlm.cli.commands import COMMANDS
from cdlm.cli.main import main
from cdlm.core.errors import CdlmError
from rebuild.definition import PLACEHOLDER

T = TypeVar("T")

PRELOADED = ("cdlm.runs.train", "cdlm.training.run", "lightning.pytorch.loggers", "mauve")
"""What commands import late."""
LINES = 40
"""Of the output of a command that failed, to show."""

Runner = Callable[[Sequence[str], int, Path], None]
"""Runs a cdlm command, given its words, its number of threads and the file that its output is added to.

It raises `CdlmError` if the command fails.
"""


def in_new_process(root: Path) -> Runner:
    """Runs each command as `python -m cdlm`, without a shell.

    Args:
        root: of the checkout; commands are run there.
    """

    def run(words: Sequence[str], threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            before = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "cdlm", *words], cwd=root, env={**os.environ, **_threads(threads)},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            _check(_ended(process.wait, process.terminate), words, log, before)

    return run


def in_forked_process(root: Path) -> Runner:
    """The same, in copies of this process, which imports the package once: it spares every command seconds of start.

    It is for Linux, and for a process without threads.
    """
    os.environ |= _threads(1)  # read when torch is imported
    for module in [*(command.module for command in COMMANDS), *PRELOADED]:
        import_module(module)

    def run(words: Sequence[str], threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        before = log.stat().st_size if log.exists() else 0
        process = get_context("fork").Process(target=_command, args=(root, words, threads, log))
        process.start()
        _ended(process.join, process.terminate)
        _check(process.exitcode, words, log, before)

    return run


def _command(root: Path, words: Sequence[str], threads: int, log: Path) -> None:
    """A command in a process of its own, which a fork has made."""
    import torch

    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(root)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    main(list(words))


def _threads(number: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(number), "OMP_WAIT_POLICY": "PASSIVE"}


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: the command that runs is asked to stop, and waited for."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would end the waiting
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _ended(wait: Callable[[], T], stop: Callable[[], None]) -> T:
    """Wait for a process; when this one is to end, ask it to stop, and wait: a training saves its last step."""
    try:
        return wait()
    except BaseException:
        stop()
        wait()
        raise


def _check(code: int | None, words: Sequence[str], log: Path, before: int) -> None:
    """Raise for a command that failed, after the end of its output is shown.

    Args:
        code: its exit code.
        before: bytes of the log that are of earlier commands.
    """
    if code:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        print("\n".join(lines[-LINES:]), file=sys.stderr)
        raise CdlmError(f"cdlm {words[0]} ended with exit code {code}; its whole output is in {log}")


def shown(words: Sequence[str]) -> str:
    """A command as one would type it; braces of placeholders need no quotes."""
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./{}*-]+", word) else shlex.quote(word) for word in words)


def replaced(words: Sequence[str], places: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The words of a command with paths in the place of placeholders; `{model*}` becomes a word for each model.

    Raises:
        CdlmError: a placeholder stands for no path, or inside a word for several.
    """

    def one(found: re.Match[str]) -> str:
        paths = places.get(found[1], ())
        if len(paths) != 1:
            raise CdlmError(
                f"{found[0]} is {len(paths) or 'no'} models here: give both the same loops, or write"
                f" {{{found[1].rstrip('*')}*}} as a word of its own"
            )
        return paths[0]

    for word in words:
        many = PLACEHOLDER.fullmatch(word)
        if many and many[1].endswith("*"):
            yield from places[many[1]]
        else:
            yield PLACEHOLDER.sub(one, word)
