"""Files of a run folder: the checkpoint and the metrics."""

from __future__ import annotations

import csv
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import cannot_write, check_readable, reading, replacing, write_text
from cdlm.training.restore import advice_for, check_plain
from cdlm.training.validation import BUCKETS

METRICS = (
    "step", "loss", "nats_per_token", "tokens_per_second", "lr", "gradient_norm", "t_q10", "t_q50", "t_q90",
    "prior_mismatch", "valid_nats", *(f"nats_u{i}" for i in range(BUCKETS)),
)  # fmt: skip
"""Columns of metrics.csv; a row leaves empty what was not measured at its step."""


def steps_done(checkpoint: Path) -> int:
    """Optimiser steps of a checkpoint, without reading its tensors.

    Raises:
        CdlmError: it is no checkpoint, or it is damaged.
    """
    return _load(checkpoint, mmap=True)["global_step"]


def context_of(checkpoint: Path) -> Mapping[str, str | int]:
    """What must not change when a run goes on from a checkpoint, without reading its tensors.

    Raises:
        CdlmError: it is no checkpoint, or it is damaged.
    """
    return _load(checkpoint, mmap=True)["cdlm"]["context"]


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint whose plain values are as they must be. Nothing in it is run, it holds plain data and tensors."""
    check_readable(path)
    try:
        if not mmap:
            _check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of a damaged archive torch raises whatever it stumbles over
        why = (
            "it is no checkpoint, or holds more than tensors and plain data"
            if isinstance(error, UnpicklingError)
            else first_line(error)
        )
        raise CdlmError(
            f"{path} cannot be read, it is truncated or damaged ({why[:200]}); {advice_for(path)}"
        ) from error
    check_plain(checkpoint, path)
    return checkpoint


def _check_sums(path: Path) -> None:
    """Compare the content of the archive with its check sums, which torch writes and does not read."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, as no checkpoint is")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is not what was written")


class AtomicCheckpoints(CheckpointIO):
    """Checkpoints that are replaced in one move, after they have reached the disk, and read without running code.

    Raises:
        CdlmError: the disk is full or refuses; the former checkpoint is untouched. Or it is not one, or damaged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                _dump(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except CdlmError as error:
            kept = "; its former content is kept and can be resumed" if path.exists() else ""
            raise CdlmError(f"{error}{kept}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return _load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def _dump(checkpoint: dict[str, Any], file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:  # torch's answer to an OSError of a write
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


class MetricsFile(Logger):
    """metrics.csv: one row for each step that measured something, written at once."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not here: the configuration has a file of its own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, METRICS, lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow({"step": step, **metrics})
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def cut(self, step: int) -> int:
        """Drop the rows after `step`, which the run writes again, and those that a dying process left unfinished, that
        are no rows of metrics, or whose step is not after that of the row before.

        Returns:
            how many whole lines were none of the run's rows.
        """
        if not self.path.exists():
            return 0
        with reading(self.path, "remove it: its rows are lost, the run goes on"):
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1]
        steps = [_step_of(line) for line in lines]
        kept, last, odd = [], -1, 0
        for line, of in zip(lines, steps, strict=True):
            if of is None or of <= last:
                odd += 1
            elif of <= step:
                kept.append(line)
                last = of
        write_text(self.path, "\n".join([",".join(METRICS), *kept, ""]))
        return odd


def _step_of(line: str) -> int | None:
    """The step of a row of metrics; None if the line is none."""
    step, *values = line.split(",")
    if len(line) > 10_000 or len(values) != len(METRICS) - 1 or not (step.isascii() and step.isdigit()):
        return None
    try:
        [float(value) for value in values if value]
        return int(step)
    except ValueError:
        return None
