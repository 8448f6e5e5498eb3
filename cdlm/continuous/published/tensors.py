"""Weights in files, one tensor at a time: no more of them is in memory than the largest tensor."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cdlm.continuous.published.layout import Lazy
from cdlm.core.errors import CdlmError, first_line

NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of types in a safetensors header, in the order in which the library writes their tensors."""


class Spec(NamedTuple):
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_state(path: Path) -> dict[str, tuple[tuple[int, ...], Lazy]]:
    """The state dict in a file that torch.save has written: shape and content of each tensor, nothing unpickled but
    tensors.

    Raises:
        CdlmError: the file is missing or damaged, or holds anything else.
    """
    return {name: (tuple(value.shape), lambda n=name: _mapped(path)[n]) for name, value in _mapped(path).items()}


def _mapped(path: Path) -> dict[str, Tensor]:
    # Opened anew for each tensor: a map that stays open would keep in memory all pages that were ever read.
    if not path.exists():
        raise CdlmError(f"{path.parent} has no {path.name}: copy the whole archive")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CdlmError(f"{path} cannot be read as tensors ({first_line(error)}); copy it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CdlmError(f"{path} is no state dict: expected names with tensors, got a {type(state).__name__}")
    return dict(state)


def read_safetensors(path: Path) -> dict[str, tuple[tuple[int, ...], Lazy]]:
    """Shape and content of each tensor of a safetensors file.

    Raises:
        CdlmError: the file is missing or damaged.
    """
    if not path.exists():
        raise CdlmError(f"{path.parent} has no {path.name}: copy the whole folder")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CdlmError(f"{path} cannot be read, it is truncated or damaged ({error}); copy it again") from error
    return {name: (shape, lambda n=name: _content(path, n)) for name, shape in shapes.items()}


def _content(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # opened anew for each tensor, see `_mapped`
        return file.get_tensor(name)


def write_safetensors(path: Path, specs: Mapping[str, Spec], tensors: Mapping[str, Lazy]) -> None:
    """A safetensors file, as the library writes it: the header, then the content of each tensor in its type."""
    order = {dtype: i for i, dtype in enumerate(NAMES)}
    names = sorted(specs, key=lambda name: (order[specs[name].dtype], name))
    header, end = {}, 0
    for name in names:
        spec, start, end = specs[name], end, end + specs[name].size
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name]().detach().to(specs[name].dtype).contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
