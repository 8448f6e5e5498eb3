"""A progress bar over a sampling run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cdlm.core.types import LoopStep

if TYPE_CHECKING:
    pass


def with_progress(steps: Iterable[LoopStep], total: int) -> Iterator[LoopStep]:
    """Pass the steps on while a bar on standard error shows the samples done and their mean calls."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done, calls = 0, 0
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TextColumn("mean calls {task.fields[calls]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total, calls="-")
        for step in steps:
            if len(step.tokens):
                done, calls = done + len(step.tokens), calls + int(step.state.nfe[step.done].sum())
                bar.update(task, completed=done, calls=f"{calls / done:.1f}")
            yield step
