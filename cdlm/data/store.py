"""The token store: a corpus tokenised once into a memory-mapped folder, and the rows cut from it.

A store is a folder of `tokens.npy` (ids of all documents end to end, without EOS; uint16 where the vocabulary allows,
else uint32), `offsets.npy` (int64, where each document starts, and the end) and `meta.json`.
"""

import errno
import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from torch.utils.data import Dataset

from cdlm.core.checks import check_whole
from cdlm.core.errors import CdlmError
from cdlm.data.sources import Source, Split
from cdlm.data.tokenizer import encode_batch, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 1  # change it whenever the files change meaning: old stores are then rebuilt
_CHUNK = 1000  # documents tokenised at a time


class Row(NamedTuple):
    """One training row: token ids, and False on padding."""

    tokens: Int64[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An opened store; document i is `tokens[offsets[i]:offsets[i + 1]]`."""

    path: Path
    tokens: Shaped[np.ndarray, " t"]
    offsets: Int64[np.ndarray, " k"]
    eos_id: int
    pad_id: int
    key: str

    @staticmethod
    def open(path: Path) -> "TokenStore":
        """Map the store at `path` into memory.

        Raises:
            CdlmError: The folder is not a complete store of this format.
        """
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            tokens = np.load(path / "tokens.npy", mmap_mode="r")
            offsets = np.load(path / "offsets.npy", mmap_mode="r")
            stated = (meta["format"], meta["documents"] + 1, meta["tokens"], meta["tokens"])
            found = (_FORMAT, len(offsets), len(tokens), int(offsets[-1]))
            if stated != found:
                raise ValueError(f"meta.json states format, offsets, tokens and end {stated}, found {found}")
            return TokenStore(path, tokens, offsets, meta["eos_id"], meta["pad_id"], meta["key"])
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            raise CdlmError(
                f"{path} is not a complete token store ({type(error).__name__}: {error}); "
                "delete the folder and it will be built again"
            ) from error

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        """Travel to reading processes as a path: a pickled memory map would be a copy of the corpus."""
        return TokenStore.open, (self.path,)


def build_store(source: Source, split: Split, tokenizer: "PreTrainedTokenizerFast", cache_dir: Path) -> TokenStore:
    """Tokenise a split of a source into a store under `cache_dir`, or open the store if it is already there.

    The folder's name is a hash of everything the tokens depend on, so a changed file, setting or tokenizer gives
    another store. Documents are read and tokenised in chunks. The folder appears whole or not at all, and processes
    that build the same one at the same time all end with a good one.

    Raises:
        CdlmError: The source is at fault, the tokenizer has no EOS, or the folder cannot be written (disk full).
    """
    key = _key(source, split, tokenizer)
    folder = cache_dir / key[:32]
    if not folder.exists():
        with _appearing_whole(folder) as building:
            _write(building, source.documents(split), tokenizer, {"format": _FORMAT, "key": key, "split": split})
    return TokenStore.open(folder)


class TextRows(ABC, Dataset[Row]):
    """Rows of `length` positions, by index; `key` tells which rows of which corpus, for checks on resuming."""

    length: int
    key: str

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """One row of `length` positions."""

    def documents(self) -> Int64[np.ndarray, " rows"]:
        """For each row the number of the document that it begins in; by default each row is a document."""
        return np.arange(len(self))


class PackedRows(TextRows):
    """Documents joined end to end, an EOS after each, and cut into rows; the rest after the last whole row is dropped.

    No row has padding, and nothing is held in memory: a row is found by bisection in the store's offsets.

    Raises:
        CdlmError: The corpus is shorter than one row.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        check_whole("a row", length=length)
        total = len(store.tokens) + len(store)
        if total < length:
            raise CdlmError(
                f"the corpus has {total} tokens (EOS included), fewer than one row of {length}; "
                f"set the length to {total} or less, or give more text"
            )
        self.store, self.length = store, length
        self.key = f"packed-{length}-{store.key}"
        self._count = total // length

    def __len__(self) -> int:
        """The number of whole rows."""
        return self._count

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from the end if negative."""
        start = range(self._count)[index] * self.length
        first, last = self._document(start), self._document(start + self.length - 1)
        # document i ends with its EOS at offsets[i + 1] + i of the joined stream
        ends = self.store.offsets[first + 1 : last + 2] + np.arange(first, last + 1) - start
        is_eos = np.zeros(self.length, dtype=np.bool_)
        is_eos[ends[ends < self.length]] = True
        tokens = np.full(self.length, self.store.eos_id, dtype=np.int64)
        begin = start - first  # every earlier document put one EOS before this point
        tokens[~is_eos] = self.store.tokens[begin : begin + self.length - int(is_eos.sum())]
        return Row(tokens, np.ones(self.length, dtype=np.bool_))

    def documents(self) -> Int64[np.ndarray, " rows"]:
        """For each row the number of the document that it begins in: no number is below the one before."""
        starts = self.store.offsets[:-1] + np.arange(len(self.store))
        return np.searchsorted(starts, np.arange(self._count) * self.length, side="right") - 1

    def _document(self, position: int) -> int:
        """The document that holds a position of the joined stream."""
        documents, offsets = range(len(self.store)), self.store.offsets
        return bisect_right(documents, position, key=lambda i: int(offsets[i]) + i) - 1


class DocumentRows(TextRows):
    """One document a row: its tokens and EOS, cut to `length`, padded on the right (valid is False there)."""

    def __init__(self, store: TokenStore, length: int) -> None:
        check_whole("a row", length=length)
        self.store, self.length = store, length
        self.key = f"documents-{length}-{store.key}"

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.store)

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from the end if negative."""
        index = range(len(self))[index]
        begin, end = int(self.store.offsets[index]), int(self.store.offsets[index + 1])
        text = self.store.tokens[begin : min(end, begin + self.length)]
        tokens = np.full(self.length, self.store.pad_id, dtype=np.int64)
        tokens[: len(text)] = text
        tokens[len(text) : len(text) + 1] = self.store.eos_id
        return Row(tokens, np.arange(self.length) <= len(text))


class FilledRows(DocumentRows):
    """One document a row, filled up with EOS, which counts as text: so a model learns where to end (LLaDA, 2502.09992,
    section 2.3). A sample may then have more positions than its answer needs."""

    def __init__(self, store: TokenStore, length: int) -> None:
        super().__init__(store, length)
        self.key = f"filled-{self.key}"

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from the end if negative."""
        tokens, valid = super().__getitem__(index)
        return Row(np.where(valid, tokens, self.store.eos_id), np.ones_like(valid))


StoredRows = PackedRows | DocumentRows
"""Rows of a store."""


def _key(source: Source, split: Split, tokenizer: "PreTrainedTokenizerFast") -> str:
    parts = [_FORMAT, source.fingerprint(), split, tokenizer_hash(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(folder: Path, documents: Iterator[str], tokenizer: "PreTrainedTokenizerFast", meta: dict[str, Any]) -> None:
    """Write the three files of a store."""
    if tokenizer.eos_token_id is None:
        raise CdlmError("the tokenizer has no end-of-text token (eos_token), which joins documents; choose another")
    largest = max(tokenizer.get_vocab().values())
    dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
    lengths: list[np.ndarray] = []
    with (folder / "tokens.npy").open("wb") as file:
        _write_header(file, dtype, 0)
        while chunk := list(islice(documents, _CHUNK)):
            encoded = encode_batch(tokenizer, chunk)
            _append(file, np.concatenate([np.asarray(ids, dtype=dtype) for ids in encoded]))
            lengths.append(np.array([len(ids) for ids in encoded], dtype=np.int64))
        offsets = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *lengths]))
        if not offsets[-1]:
            raise CdlmError(f"the {meta['split']} split has no text; check the source")
        _write_header(file, dtype, int(offsets[-1]))
    with (folder / "offsets.npy").open("wb") as file:
        _write_header(file, offsets.dtype, len(offsets))
        _append(file, offsets)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    meta = meta | {"eos_id": eos, "pad_id": eos if pad is None else pad}
    meta = meta | {"documents": len(offsets) - 1, "tokens": int(offsets[-1])}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    """Write the .npy header at the start; NumPy pads it so that it keeps its size as the count grows."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )


def _append(file: BinaryIO, values: np.ndarray) -> None:
    file.write(values.tobytes())  # ndarray.tofile would not tell a full disk from other failures


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` on success and disappears on any failure."""
    building = folder.with_name(f".building-{folder.name}-{uuid4().hex}")
    try:
        building.mkdir(parents=True)
        yield building
        if not _rename(building, folder):
            shutil.rmtree(building)  # another process was first; its store is the same
    except BaseException as error:
        written = sum(file.stat().st_size for file in building.glob("*"))
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(folder.parent, error, written) from error
        raise


def _rename(building: Path, folder: Path) -> bool:
    """Put a finished folder in its place; False if the place is taken."""
    try:
        os.replace(building, folder)
    except OSError:
        if not folder.exists():
            raise
        return False
    return True


def _cannot_write(cache_dir: Path, error: OSError, written: int) -> CdlmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(cache_dir).free
        return CdlmError(
            f"no space left for the token store in {cache_dir}: {free:,} bytes free, more than {written:,} needed; "
            "free some space or choose another cache folder"
        )
    reason = error.strerror or error
    return CdlmError(f"cannot write the token store in {cache_dir} ({reason}); choose another cache folder")
