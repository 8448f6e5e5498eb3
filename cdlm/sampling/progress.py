"""Progress of a sampling run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cdlm.core.progress import meter
from cdlm.core.types import LoopStep


def with_progress(steps: Iterable[LoopStep], total: int) -> Iterator[LoopStep]:
    """Pass the steps on while standard error shows the samples that are done, of `total`, and their mean calls."""
    done = calls = 0
    with meter(total, "samples") as shown:
        for number, step in enumerate(steps, 1):
            leaving = step.counts.leaving
            if leaving:
                done, calls = done + len(leaving), calls + sum(step.counts.nfe[row] for row in leaving)
                shown.advance(len(leaving), mean_calls=f"{calls / done:.1f}", loop_steps=number)
            else:
                shown.advance(0, loop_steps=number)
            yield step
