"""Trials of bad input: each is a call in a process of its own, with little time and memory, and what came of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from enum import Enum
from io import StringIO
from typing import Any

MEMORY = 12 * 2**30
"""Bytes that a trial may ask for."""


class Outcome(Enum):
    """What came of a trial."""

    REFUSED = "clear lines"
    ACCEPTED = "rightly accepted"
    TRACEBACK = "tracebacks"
    UNCLEAR = "refused unclearly"
    HUNG = "hangs"
    NONSENSE = "silent nonsense"


NONSENSE = 3
"""Exit code of a trial that found nonsense in what it was given."""


class Nonsense(Exception):
    """What came of a call cannot be."""


@dataclass(frozen=True)
class Trial:
    """Bad input of a kind, at a place.

    Attributes:
        kind: what is wrong, such as "number below its range".
        place: where it enters, such as "sample --steps".
        call: what is called with it.
        nonsense: whether it may not be accepted; else both are right.
    """

    kind: str
    place: str
    call: Callable[[], Any]
    nonsense: bool = True


@dataclass(frozen=True)
class Result:
    """A trial, and what came of it."""

    trial: Trial
    outcome: Outcome
    said: str
    seconds: float

    @property
    def column(self) -> str:
        """In words, for tables."""
        accepted = self.outcome is Outcome.ACCEPTED and self.trial.nonsense
        return (Outcome.NONSENSE if accepted else self.outcome).value

    @property
    def bad(self) -> bool:
        """Whether something is to be mended."""
        return self.column not in (Outcome.ACCEPTED.value, Outcome.REFUSED.value)

    def __str__(self) -> str:
        return f"{self.column}: {self.trial.place}, {self.trial.kind}: {self.said[-300:]}"


def outcome_of(code: int, said: str) -> Outcome:
    """What an exit code and standard error mean."""
    lines = said.strip().splitlines()
    if code == NONSENSE:
        return Outcome.NONSENSE
    if "Traceback" in said or code not in (0, 2):
        return Outcome.TRACEBACK
    if code == 0:
        return Outcome.ACCEPTED
    clear = bool(lines) and lines[-1].startswith("cdlm: ") and len(lines[-1]) < 1000
    return Outcome.REFUSED if clear else Outcome.UNCLEAR


def attempt(trial: Trial, limit: float = 30.0) -> Result:
    """Run a trial in a process of its own."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            _run(trial.call, errors.fileno())
        code = _wait(child, began + limit)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    seconds = time.monotonic() - began
    return Result(trial, Outcome.HUNG if code is None else outcome_of(code, said), said, seconds)


def _run(call: Callable[[], Any], errors: int) -> None:
    """In the child; never returns."""
    code = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", errors="backslashreplace", closefd=False)
        code = code_of(call)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def code_of(call: Callable[[], Any]) -> int:
    """The exit code that a program of this call ends with."""
    from cdlm.core.errors import CdlmError

    try:
        call()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except CdlmError as error:  # of the Python API
        print(f"cdlm: {error}", file=sys.stderr)
        return 2
    except Nonsense as error:
        print(error, file=sys.stderr)
        return NONSENSE
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(child: int, until: float) -> int | None:
    """The exit code of a child; None if it had to be killed."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def attempt_here(trial: Trial, limit: float = 10.0) -> Result:
    """Run a trial of the Python API in this process, which is quick; one that takes too long is interrupted."""

    def ring(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    errors, began = StringIO(), time.monotonic()
    try:
        with redirect_stderr(errors):
            code = code_of(trial.call)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    said, seconds = errors.getvalue(), time.monotonic() - began
    return Result(trial, Outcome.HUNG if "TimeoutError" in said else outcome_of(code, said), said, seconds)


def report(trials: Iterable[Trial]) -> None:
    """Run trials of the Python API in this process, and print each as a line of JSON: place, whether it is to be
    mended, seconds, and the whole in words."""
    for result in map(attempt_here, trials):
        print(json.dumps([result.trial.place, result.bad, result.seconds, str(result)]))


def attempts(trials: Iterable[Trial], limit: float = 30.0) -> Iterator[Result]:
    """Run trials one after the other."""
    for trial in trials:
        yield attempt(trial, limit)
