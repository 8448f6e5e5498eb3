"""Foreign masked checkpoints on transformers' own architectures, which are imported when one is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdlm.core.devices import Precision

if TYPE_CHECKING:
    from cdlm.masked.checkpoints.model import ForeignModel


def opens(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of another library's model."""
    return "cdlm_format" not in config and "model_type" in config


def open_folder(
    folder: Path, config: Mapping[str, Any], *, device: str, precision: Precision | None,
    device_map: str | Mapping[str, int | str] | None,
) -> ForeignModel:  # fmt: skip
    """A LLaDA or Dream checkpoint; see `cdlm.masked.checkpoints.model.open_checkpoint`."""
    from cdlm.masked.checkpoints.model import open_checkpoint

    return open_checkpoint(folder, dtype=precision, device=device, device_map=device_map)
