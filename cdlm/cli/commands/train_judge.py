"""Train a small judge."""

from __future__ import annotations

from pathlib import Path

from cdlm import api
from cdlm.core.devices import DeviceOptions
from cdlm.core.files import check_places
from cdlm.runs.train import RunText

DEVICE = DeviceOptions()


def train_judge(run: str, out: Path, *, steps: int | None = None, machine: DeviceOptions = DEVICE) -> None:
    """Train a small GPT-2 on a run's text, as a judge of AR-NLL.

    Args:
        run: run folder whose text and tokenizer are used.
        out: folder to write; a Hugging Face model like any other.
        steps: training steps; by default 500, or as many as read a small text 16 times.
    """
    check_places(out)
    text = RunText.of_run(run)
    api.small_judge(text, steps).open(machine.device, not machine.quiet).save(out)
