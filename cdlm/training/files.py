"""Files of a run folder: the checkpoint and the metrics."""

from __future__ import annotations

import csv
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import cannot_write, replacing, write_text
from cdlm.training.validation import BUCKETS

METRICS = (
    "step", "loss", "nats_per_token", "tokens_per_second", "lr", "gradient_norm", "t_q10", "t_q50", "t_q90",
    "prior_mismatch", "valid_nats", *(f"nats_u{i}" for i in range(BUCKETS)),
)  # fmt: skip
"""Columns of metrics.csv; a row leaves empty what was not measured at its step."""


def checkpoint_of(run_dir: Path) -> Path:
    """The file that a run is resumed from."""
    return run_dir / "checkpoints" / "last.ckpt"


def steps_done(checkpoint: Path) -> int:
    """Optimiser steps of a checkpoint, without reading its tensors.

    Raises:
        CdlmError: it is no checkpoint, or it is damaged.
    """
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CdlmError(
            f"{checkpoint} cannot be read, it is truncated or damaged ({first_line(error)}); copy it again"
        ) from error


class AtomicCheckpoints(CheckpointIO):
    """Checkpoints that are replaced in one move, after they have reached the disk, and read without running code.

    Raises:
        CdlmError: the disk is full or refuses; the former checkpoint is untouched.
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
        return torch.load(path, map_location="cpu", weights_only=True)

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

    def cut(self, step: int) -> None:
        """Drop the rows after `step`, which the run writes again, and a row that a dying process left unfinished."""
        if self.path.exists():
            rows = self.path.read_text().splitlines(keepends=True)[1:]
            kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
            write_text(self.path, "".join([",".join(METRICS), "\n", *kept]))
