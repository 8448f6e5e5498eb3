"""What a person sees of long work on standard error: a bar on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from cdlm.core.inert import visible

T = TypeVar("T")

SECONDS = 10.0
"""Between two plain lines."""

_announced: list[str] = []


class Meter:
    """How much of a piece of work is done; this one shows nothing. Leaving `with` ends what is shown."""

    def advance(self, by: int = 1, **fields: object) -> None:
        """`by` more items are done, 0 for a sign of life; `fields` are shown beside their number and stay."""

    def close(self) -> None:
        """The work is over, in whatever way."""

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Bar(Meter):
    """A bar that vanishes when the work is over."""

    def __init__(self, total: int, label: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without widgets it advises to install them
            from tqdm.auto import tqdm

        self._bar = tqdm(total=total, desc=visible(label), file=sys.stderr, leave=False, miniters=0, dynamic_ncols=True)
        self._fields: dict[str, object] = {}

    def advance(self, by: int = 1, **fields: object) -> None:
        if fields:
            self._fields.update(fields)
            self._bar.set_postfix_str(_text(self._fields), refresh=False)
        self._bar.update(by)

    def close(self) -> None:
        self._bar.close()


class Lines(Meter):
    """A line at most every `SECONDS`, and one when all is done.

    Args:
        clock: seconds that only grow.
        write: takes a line without its end; by default it goes to standard error.
    """

    def __init__(
        self,
        total: int,
        label: str,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] | None = None,
    ):
        self._total, self._label, self._clock, self._write = total, label, clock, write or to_stderr
        self._began = self._shown = clock()
        self._done = 0
        self._fields: dict[str, object] = {}

    def advance(self, by: int = 1, **fields: object) -> None:
        finishes = self._done < self._total <= self._done + by
        self._done += by
        self._fields.update(fields)
        now = self._clock()
        if finishes or now - self._shown >= SECONDS:
            self._shown = now
            self._write(self._line(now))

    def _line(self, now: float) -> str:
        left = max(0, self._total - self._done)
        remaining = timedelta(seconds=round((now - self._began) / self._done * left)) if self._done and left else None
        parts = (_text(self._fields), "" if remaining is None else f"{remaining} left")
        return ", ".join([f"{self._label}: {self._done} of {self._total}", *filter(None, parts)])


def meter(total: int, label: str, shown: bool = True) -> Meter:
    """What suits standard error: a bar on a terminal and in a notebook, lines elsewhere; nothing unless `shown`."""
    if not shown:
        return Meter()
    show_announced()
    return Bar(total, label) if _on_terminal() or _in_notebook() else Lines(total, label)


class Parts:
    """Meters of work in parts that come one after the other, such as measures: `parts(label, done, total)`."""

    def __init__(self, shown: bool = True):
        self._shown = shown
        self._label, self._done, self._meter = "", 0, Meter()

    def __call__(self, label: str, done: int, total: int) -> None:
        """`done` items of `total` of the part are done."""
        if label != self._label:
            self.close()
            self._label, self._done, self._meter = label, 0, meter(total, label, self._shown)
        self._meter.advance(done - self._done)
        self._done = done

    def close(self) -> None:
        """All parts are over, in whatever way."""
        self._meter.close()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(
    items: Iterable[T],
    *,
    total: int,
    label: str,
    fields: Callable[[T], Mapping[str, object]] | None = None,
    shown: bool = True,
) -> Iterator[T]:
    """Pass the items on; each counts as done when the next is taken.

    Args:
        total: how many items there are.
        label: what they are, such as "rows".
        fields: what to show beside their number after an item, such as a loss.
        shown: False shows nothing.
    """
    with meter(total, label, shown) as made:
        for item in items:
            yield item
            made.advance(1, **(fields(item) if shown and fields else {}))


def announce(line: str) -> None:
    """Print a line before the first progress, or when the command has ended well.

    So a command that refuses its input prints nothing but the refusal.
    """
    if line not in _announced:
        _announced.append(line)


def show_announced() -> None:
    """Print what was announced and not yet shown."""
    while _announced:
        to_stderr(_announced.pop(0))


def drop_announced() -> None:
    """Forget what was announced and not yet shown."""
    _announced.clear()


def to_stderr(line: str) -> None:
    """Print a line for a person, without control characters."""
    print(visible(line), file=sys.stderr, flush=True)


def _text(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())


def _on_terminal() -> bool:
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0  # 0: no bar would be seen
    except OSError:  # a stream without a file, which knows no width
        return True


def _in_notebook() -> bool:
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
