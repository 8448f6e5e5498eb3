"""Weights in files that torch.save has written, one tensor at a time: no more of them is in memory than the largest."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.tensors import Lazy, Spec, specs_of


def read_state(path: Path, parts: Sequence[str] = ()) -> dict[str, tuple[Spec, Lazy]]:
    """The state dict in a file that torch.save has written: shape, type and content of each tensor, nothing unpickled
    but tensors and plain values.

    Args:
        parts: names of state dicts in a file that may hold several things; the first that is there is taken.

    Raises:
        CdlmError: the file is missing or damaged, or holds anything else.
    """
    specs = specs_of(_mapped(path, parts))
    return {name: (spec, lambda n=name: _mapped(path, parts)[n]) for name, spec in specs.items()}


def _mapped(path: Path, parts: Sequence[str]) -> dict[str, Tensor]:
    # Opened anew for each tensor: a map that stays open would keep in memory all pages that were ever read.
    if not path.exists():
        raise CdlmError(f"{path.parent} has no {path.name}: copy the whole archive")
    if not path.is_file():  # a pipe would be waited for
        raise CdlmError(f"{path} is no file: copy it again")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CdlmError(f"{path} cannot be read as tensors ({first_line(error)}); copy it again") from error
    if isinstance(state, Mapping):
        state = next((state[part] for part in parts if part in state), state)
    if not isinstance(state, Mapping) or not all(_is_plain(value) for value in state.values()):
        raise CdlmError(f"{path} is no state dict: expected names with tensors, got a {type(state).__name__}")
    return {str(name): value for name, value in state.items()}


def _is_plain(value: object) -> bool:
    """Whether it is a tensor whose values all lie in the file."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta
