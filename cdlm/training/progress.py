"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {"loss": "loss {:.4f}", "nats_per_token": "nats/token {:.4f}", "tokens_per_second": "{:.0f} tokens/s",
         "valid_nats": "valid {:.4f}"}  # fmt: skip


class Reporter:
    """Prints nothing by itself; the subclasses do."""

    def start(self, step: int, steps: int, place: str) -> None:
        """The run begins after `step` of `steps`, on the devices `place`."""

    def advance(self, step: int) -> None:
        """`step` is done."""

    def show(self, metrics: Mapping[str, float]) -> None:
        """Something was measured at the step announced last."""

    def note(self, line: str) -> None:
        """Something else happened that a person should know."""

    def close(self) -> None:
        """The run is over, in whatever way."""


class Lines(Reporter):
    """One line per measurement."""

    def __init__(self, console: Console):
        self._console = console

    def start(self, step: int, steps: int, place: str) -> None:
        _print(self._console, f"training on {place}")
        self._first, self._step, self._steps, self._began = step, step, steps, time.monotonic()

    def advance(self, step: int) -> None:
        self._step = step

    def show(self, metrics: Mapping[str, float]) -> None:
        done = max(1, self._step - self._first)
        left = (time.monotonic() - self._began) / done * (self._steps - self._step)
        eta = timedelta(seconds=round(left))
        _print(self._console, f"step {self._step}/{self._steps}  {_text(metrics)}  ETA {eta}")

    def note(self, line: str) -> None:
        _print(self._console, line)


class Bar(Reporter):
    """A bar with the latest measurement."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=console, auto_refresh=False,
        )  # fmt: skip
        self._shown: dict[str, float] = {}

    def start(self, step: int, steps: int, place: str) -> None:
        _print(self._console, f"training on {place}")
        self._task = self._bar.add_task("training", total=steps, completed=step, text="")
        self._bar.start()
        self._refreshed = time.monotonic()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        if time.monotonic() - self._refreshed > 0.2:
            self._bar.refresh()
            self._refreshed = time.monotonic()

    def show(self, metrics: Mapping[str, float]) -> None:
        self._shown.update(metrics)
        self._bar.update(self._task, text=_text(self._shown), refresh=True)

    def note(self, line: str) -> None:
        _print(self._console, line)

    def close(self) -> None:
        self._bar.stop()


def reporter(wanted: bool, file: Any = None) -> Reporter:
    """A bar on a terminal, lines elsewhere, silence if not wanted; on standard error by default."""
    if not wanted:
        return Reporter()
    console = Console(file=file, stderr=True)
    return Bar(console) if console.is_terminal else Lines(console)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _text(metrics: Mapping[str, float]) -> str:
    return "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)
