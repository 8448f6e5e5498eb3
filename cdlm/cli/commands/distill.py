"""Distil a run to students of few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cdlm.core.devices import DeviceOptions
from cdlm.core.files import check_places
from cdlm.core.progress import to_stderr
from cdlm.runs.distill import STEPS, DistillSettings
from cdlm.runs.distill import distill as distilled

SETTINGS, DEVICE = DistillSettings(), DeviceOptions()


def distill(
    run: str,
    out: Path,
    *,
    steps: Sequence[int] = STEPS,
    settings: DistillSettings = SETTINGS,
    machine: DeviceOptions = DEVICE,
) -> None:
    """Distil a continuous model to students that take few steps, in rounds of fewer and fewer.

    Args:
        run: folder of the run, whose model is the teacher of all.
        out: folder of the students: OUT/8, OUT/4, ..., each a model like any other. Rounds that are finished are not
            done again, and an interrupted one goes on.
        steps: of the students.
    """
    check_places(out / "8")
    students = distilled(run, out, steps=steps, settings=settings, device=machine.device, progress=not machine.quiet)
    if not machine.quiet:
        for count in students:
            to_stderr(f"{out / str(count)}: {count} steps a sample, cdlm sample {out / str(count)}")
