"""The token store: a corpus tokenised once into a memory-mapped folder, and the rows cut from it.

A store is a folder of `tokens.npy` (ids of all documents end to end, without EOS; uint16 where the vocabulary allows,
else uint32), `offsets.npy` (int64, where each document starts, and the end) and `meta.json`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from torch.utils.data import Dataset

from cdlm.core.checks import check_whole
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import reading, replacing
from cdlm.core.progress import announce
from cdlm.core.schema import Positive, Whole, checked
from cdlm.data.sources import Source, Split
from cdlm.data.tokenizer import encode_batch
from cdlm.models.foreign import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 2  # change it whenever the files change meaning: stores are then built anew, beside the old ones
_CHUNK = 1000  # documents tokenised at a time
DOUBTFUL, HOPELESS = 0.01, 0.9
"""Shares of unknown tokens above which a text is warned of and refused."""


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
    unknown: int = 0
    """Tokens that stand for text that the tokenizer does not know."""
    vocab: int = 2**32

    @staticmethod
    def open(path: Path) -> "TokenStore":
        """Map the store at `path` into memory.

        Raises:
            CdlmError: The folder is not a complete store of this format.
        """
        advice = "delete the folder and it will be built again"
        try:
            with reading(path / "meta.json"):
                stated = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            meta = checked(stated, Meta, "meta.json", "it was altered")
            with reading(path / "tokens.npy"):
                tokens = np.load(path / "tokens.npy", mmap_mode="r")
            with reading(path / "offsets.npy"):
                offsets = np.load(path / "offsets.npy", mmap_mode="r")
            if wrong := _wrong(path, meta, tokens, offsets):
                raise ValueError(wrong)
        except (CdlmError, EOFError, ValueError, RecursionError, TokenError) as error:  # numpy lets the last one out
            raise CdlmError(f"{path} is not a complete token store ({first_line(error)}); {advice}") from error
        ids = meta["eos_id"], meta["pad_id"]
        return TokenStore(path, tokens, offsets, *ids, meta["key"], meta["unknown"], meta["vocab"])

    def cut(self, begin: int, end: int) -> Shaped[np.ndarray, " k"]:
        """Tokens from `begin` to before `end`.

        Raises:
            CdlmError: some are none of the vocabulary.
        """
        tokens = self.tokens[begin:end]
        if tokens.max(initial=0) >= self.vocab:
            raise CdlmError(f"{self.path} has tokens beyond its vocabulary; delete the folder, it will be built again")
        return tokens

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        """Travel to reading processes as a path: a pickled memory map would be a copy of the corpus."""
        return TokenStore.open, (self.path,)


class Meta(TypedDict):
    """What meta.json holds."""

    format: int
    key: str
    split: Split
    eos_id: Whole
    pad_id: Whole
    vocab: Positive
    documents: Positive
    tokens: Positive
    unknown: Whole
    offsets: str
    """SHA-256 of the content of offsets.npy."""


def _wrong(path: Path, meta: Meta, tokens: np.ndarray, offsets: np.ndarray) -> str | None:
    """What does not fit together; None if all does. The tokens themselves are not read."""
    if meta["format"] != _FORMAT:
        return f"it has format {meta['format']}, and this version {_FORMAT}"
    right = {
        f"the key of {path.name}": path.name == f"{meta['key'][:32]}-{_FORMAT}",
        "end and padding of its vocabulary": max(meta["eos_id"], meta["pad_id"]) < meta["vocab"],
        f"{meta['tokens']} tokens": tokens.shape == (meta["tokens"],) and tokens.dtype in (np.uint16, np.uint32),
        f"{meta['documents']} documents": offsets.shape == (meta["documents"] + 1,) and offsets.dtype == np.int64,
        "the offsets that were written": _digest(offsets) == meta["offsets"],
        "no more unknown tokens than tokens": meta["unknown"] <= meta["tokens"],
    }
    return next((f"expected {what}" for what, holds in right.items() if not holds), None)


def _digest(offsets: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(offsets).data).hexdigest()


def build_store(source: Source, split: Split, tokenizer: "PreTrainedTokenizerFast", cache_dir: Path) -> TokenStore:
    """Tokenise a split of a source into a store under `cache_dir`, or open the store if it is already there.

    The folder's name is a hash of everything the tokens depend on, so a changed file, setting or tokenizer gives
    another store. Documents are read and tokenised in chunks. The folder appears whole or not at all, and processes
    that build the same one at the same time all end with a good one.

    Raises:
        CdlmError: The source is at fault, the tokenizer has no EOS, or the folder cannot be written (disk full).
    """
    key = _key(source, split, tokenizer)
    folder = cache_dir / f"{key[:32]}-{_FORMAT}"
    if not folder.exists():
        with suppress(_Taken), replacing(folder) as building:
            building.mkdir()
            _write(building, source.documents(split), tokenizer, {"format": _FORMAT, "key": key, "split": split})
            if folder.exists():
                raise _Taken
    store = TokenStore.open(folder)
    if (share := store.unknown / len(store.tokens)) > DOUBTFUL:
        announce(
            f"warning: {share:.0%} of the text's tokens are unknown to the tokenizer, and no model learns what they"
            " stand for: choose a tokenizer of this language, or leave tokenizer out to train one"
        )
    return store


class _Taken(Exception):
    """Another process was first; its store is the same."""


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
        tokens[~is_eos] = self.store.cut(begin, begin + self.length - int(is_eos.sum()))
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
        text = self.store.cut(begin, min(end, begin + self.length))
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
    # The first is the format of the stores that named it so: runs and judges know their text by this key.
    parts = [1, source.fingerprint(), split, tokenizer_hash(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(folder: Path, documents: Iterator[str], tokenizer: "PreTrainedTokenizerFast", meta: dict[str, Any]) -> None:
    """Write the three files of a store."""
    if tokenizer.eos_token_id is None:
        raise CdlmError("the tokenizer has no end-of-text token (eos_token), which joins documents; choose another")
    largest = max(tokenizer.get_vocab().values())
    dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
    lengths: list[np.ndarray] = []
    unknown = 0
    with (folder / "tokens.npy").open("wb") as file:
        _write_header(file, dtype, 0)
        while chunk := list(islice(documents, _CHUNK)):
            encoded = encode_batch(tokenizer, chunk)
            ids = np.concatenate([np.asarray(ids, dtype=dtype) for ids in encoded])
            _append(file, ids)
            unknown += 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())
            lengths.append(np.array([len(ids) for ids in encoded], dtype=np.int64))
        offsets = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *lengths]))
        if not offsets[-1]:
            raise CdlmError(f"the {meta['split']} split has no text; check the source")
        if (share := unknown / int(offsets[-1])) > HOPELESS:
            raise CdlmError(
                f"{share:.0%} of the {meta['split']} split's tokens are unknown to the tokenizer: choose one of this"
                " language, or leave tokenizer out to train one"
            )
        _write_header(file, dtype, int(offsets[-1]))
    with (folder / "offsets.npy").open("wb") as file:
        _write_header(file, offsets.dtype, len(offsets))
        _append(file, offsets)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    meta = meta | {"eos_id": eos, "pad_id": eos if pad is None else pad}
    meta = meta | {"vocab": largest + 1, "documents": len(offsets) - 1, "tokens": int(offsets[-1])}
    meta = meta | {"unknown": unknown, "offsets": _digest(offsets)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    """Write the .npy header at the start; NumPy pads it so that it keeps its size as the count grows."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )


def _append(file: BinaryIO, values: np.ndarray) -> None:
    file.write(values.tobytes())  # ndarray.tofile would not tell a full disk from other failures
