"""Train the head of the halting rules `Learned` and `Stop`."""

from __future__ import annotations

from pathlib import Path

from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places, real_path
from cdlm.core.progress import to_stderr
from cdlm.halting.fit import Fitting, fit
from cdlm.halting.head import ABOUT, Head, write_head
from cdlm.recording.file import Recording, read_folder

FITTING = Fitting()


def train_halting(
    recordings: Path, out: Path, *, n: int | None = None, fitting: Fitting = FITTING, quiet: bool = False
) -> None:
    """Train a small head on recorded full runs, which says when a sample is done: the rules Learned and Stop.

    Args:
        recordings: folder that cdlm sample --record wrote, of one sampler; or one file of it.
        out: folder to write the head to, best the run folder of the model.
        n: first samples of each recording to train on; by default all.
        quiet: print errors only.
    """
    check_places(out / ABOUT)
    if real_path(out) == real_path(recordings.parent if recordings.is_file() else recordings):
        raise CdlmError(f"{out} is the folder of the recordings: write the head elsewhere, best beside the model")
    runs = [Recording.read(recordings)] if recordings.is_file() else list(read_folder(recordings).values())
    if n is not None and n < 1:
        raise CdlmError(f"n is the number of samples to train on and must be >= 1, got {n}")
    head = fit([run if n is None else run.first(n) for run in runs], fitting)
    digest = write_head(out, head)
    if not quiet:
        print(_said(head))
        to_stderr(f'{out / ABOUT}: head {digest}; try --halt "Learned({str(out)!r}, 0.9)"')


def _said(head: Head) -> str:
    """How well it does, in lines."""
    found = head.report
    return (
        f"{found['parameters']} parameters, {len(head.features)} features: {', '.join(head.features)}\n"
        f"{found['samples']} samples, {found['held_out']} of them held out; the best pass was {found['epochs']}\n"
        f"held out, whether a step is settled: AUC {found['auc']:.4f}, cross-entropy {found['cross_entropy']:.4f} nats"
        f" ({found['cross_entropy_of_the_mean']:.4f} for who knows the mean alone)\n"
        f"held out, the share of tokens that is lost: cross-entropy {found['loss_cross_entropy']:.4f} nats"
        f" ({found['loss_cross_entropy_of_the_mean']:.4f}), error {found['loss_error']:.4f}"
    )
