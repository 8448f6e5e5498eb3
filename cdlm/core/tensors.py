"""Tensors in safetensors files: their names, types and shapes are known and checked before any content is read, and
equal content gives equal files, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cdlm.core.errors import CdlmError
from cdlm.core.files import check_readable, reading

TYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
    "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types by their names in a header, in the order in which the library writes their tensors."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights; what is quantised has others."""


class Spec(NamedTuple):
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Lazy = Callable[[], Tensor]
"""Reads one tensor; until it is called nothing of it is in memory."""


class Header(NamedTuple):
    """What a file says before its content."""

    specs: dict[str, Spec]
    metadata: dict[str, str]


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors that are made inside have shape and type, and no memory. None is drawn: there would be no numbers."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """On "meta", torch draws by means of its compiler, which takes seconds to import."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else given["tensor"]
        if func is torch.randn:
            return torch.empty(*args, **{name: value for name, value in given.items() if name != "generator"})
        return func(*args, **given)


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Shape and type of each tensor."""
    return {name: Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def read_header(path: Path, advice: str = "copy it again") -> Header:
    """The header of a safetensors file.

    Args:
        advice: what to do about a damaged file.

    Raises:
        CdlmError: there is no such file, it may not be read or is damaged, or has a type that torch has not.
    """
    from safetensors import SafetensorError, safe_open

    with reading(path, advice):
        if not path.is_file():  # a pipe would be waited for
            what = f"{path} is no file" if path.exists() else f"{path.parent} has no {path.name}"
            raise CdlmError(f"{what}: expected tensors; {advice}")
    check_readable(path, advice)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            kinds = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CdlmError(f"{path} cannot be read, it is truncated or damaged ({error}); {advice}") from error
    odd = {name: kind for name, (_, kind) in kinds.items() if kind not in TYPES}
    if odd:
        name = min(odd)
        raise CdlmError(f"tensor {name!r} of {path} is {odd[name]}, expected one of {', '.join(TYPES)}; {advice}")
    return Header({name: Spec(shape, TYPES[kind]) for name, (shape, kind) in kinds.items()}, metadata)


def read_tensors(path: Path, advice: str = "copy it again") -> dict[str, Tensor]:
    """All tensors of a file, mapped: what is not used is not read.

    Raises:
        CdlmError: as `read_header`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path, advice)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CdlmError(f"{path} cannot be read, it is truncated or damaged ({error}); {advice}") from error


def lazy_tensors(path: Path) -> dict[str, tuple[Spec, Lazy]]:
    """Shape, type and content of each tensor of a file: no more of them is in memory than are called for.

    Raises:
        CdlmError: as `read_header`.
    """
    return {name: (spec, lambda n=name: _content(path, n)) for name, spec in read_header(path).specs.items()}


def _content(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # opened anew: a map that stays open would keep all pages ever read in memory
        return file.get_tensor(name)


def write_tensors(
    path: Path, specs: Mapping[str, Spec], tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file as the library writes it, with sorted metadata: the header, then the content of each tensor in
    its type."""
    order = {dtype: (i, name) for i, (name, dtype) in enumerate(TYPES.items())}
    names = sorted(specs, key=lambda name: (order[specs[name].dtype], name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        spec, start, end = specs[name], end, end + specs[name].size
        kind = order[spec.dtype][1]
        header[name] = {"dtype": kind, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = tensors[name]().detach().cpu().to(specs[name].dtype)
            flat = value.contiguous().reshape(-1).as_strided((value.numel(),), (1,))  # one value may have any stride
            file.write(flat.view(torch.uint8).numpy().data)


def same_specs(place: Path, expected: Mapping[str, Spec], found: Mapping[str, Spec]) -> None:
    """Check that tensors are those of a model: the same names, in the same shapes, floats where it has floats.

    Args:
        place: file or folder of the tensors, for the error.

    Raises:
        CdlmError: a tensor is missing, unknown, of another shape or of another kind.
    """
    for what, odd in (("misses", expected.keys() - found.keys()), ("has an unknown", found.keys() - expected.keys())):
        if odd:
            raise CdlmError(
                f"{place} {what} tensor {min(odd)!r} ({len(odd)} in all): these are not the weights of config.json;"
                " copy both again"
            )
    for name, (shape, dtype) in expected.items():
        if found[name].shape != shape:
            raise CdlmError(
                f"tensor {name!r} of {place} has shape {found[name].shape}, config.json asks for {shape}: of another"
                " model; copy both again"
            )
        kinds = FLOATS if dtype.is_floating_point else (dtype,)
        if found[name].dtype not in kinds:
            raise CdlmError(
                f"tensor {name!r} of {place} is {_word(found[name].dtype)}, expected"
                f" {'floats, such as ' if dtype.is_floating_point else ''}{_word(dtype)}: take the unquantised model"
            )


def check_values(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that floats are finite and whole numbers are counts, 0 or more.

    Raises:
        CdlmError: a tensor has other values.
    """
    for name, value in tensors.items():
        check_value(place, name, value)


def check_value(place: Path, name: str, value: Tensor) -> Tensor:
    """The tensor, checked as by `check_values`."""
    # What is not finite stays so in a sum, which is quick; a finite sum may still overflow.
    if value.is_floating_point():
        if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            raise CdlmError(f"tensor {name!r} of {place} has values that are no numbers (NaN or infinite): train again")
    elif value.numel() and value.dtype.is_signed and bool((value < 0).any()):
        raise CdlmError(f"tensor {name!r} of {place} counts below 0: copy it again")
    return value


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
