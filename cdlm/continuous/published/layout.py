"""What a published file format has to say for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cdlm.core.tensors import Lazy, Spec


def given(value: Tensor) -> tuple[Spec, Lazy]:
    """A tensor that stands in no file of weights."""
    return Spec(tuple(value.shape), value.dtype), lambda: value


class Official(NamedTuple):
    """A checkpoint in a published format."""

    config: Mapping[str, Any]
    """What rebuilds the system: the part `model` of our config.json."""
    length: int
    """Positions it was trained on."""
    tensors: Mapping[str, tuple[Spec, Lazy]]
    """By our names: shape, type and content of each."""


class Layout(ABC):
    """A published format, read and written one tensor at a time."""

    @abstractmethod
    def read(self, folder: Path) -> Official:
        """What is in the folder; no weight is read yet.

        Raises:
            CdlmError: a file or a tensor is missing, or it is not this format.
        """

    @abstractmethod
    def write(self, official: Official, folder: Path) -> None:
        """The same, into files of the published format.

        Raises:
            CdlmError: the system has no such format (it was trained on the shared backbone).
        """
