"""Vectors of a frozen encoder, kept on disk."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from cdlm.core.errors import CdlmError, first_line
from cdlm.models.encoder import Encoder

PATIENCE = 60.0
"""Seconds that a process waits for another that writes into the same file."""


@dataclass(frozen=True)
class VectorCache:
    """Vectors of whole rows in an SQLite file, as float16, by the tokens that are seen and where they are.

    Args:
        file: of one encoder.
        dim: length of a vector.
    """

    file: Path
    dim: int

    def through(
        self, encoder: Encoder, tokens: Int[Tensor, "b n"], seen: Bool[Tensor, "b n"]
    ) -> Float32[Tensor, "b n d"]:
        """The encoder's vectors, rounded to float16: those that are kept are read, the others computed and kept. Zero
        where nothing is seen."""
        places = seen.cpu()
        keys = _keys(tokens.cpu(), places)
        found = self.read(keys)
        missing = [row for row, key in enumerate(keys) if key not in found]
        if missing:
            made = encoder(tokens[missing], seen[missing]).half().cpu().numpy()
            if not np.isfinite(made[places[missing].numpy()]).all():
                raise CdlmError(
                    f"vectors of the encoder {encoder.source} are too long for float16: leave the cache out"
                )
            rows = zip(missing, made, strict=True)
            self.write({keys[row]: vectors[places[row].numpy()].tobytes() for row, vectors in rows})
            found = self.read(keys)  # another process may have been first
        result = np.zeros((*tokens.shape, self.dim), dtype=np.float16)
        for row, key in enumerate(keys):
            result[row, places[row].numpy()] = self._vectors(found[key], int(places[row].sum()))
        return torch.from_numpy(result).to(tokens.device, torch.float32)

    def read(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """What is kept of these rows."""
        with self._opened() as file:
            rows = {key: file.execute("SELECT content FROM vectors WHERE row = ?", (key,)).fetchone() for key in keys}
        return {key: row[0] for key, row in rows.items() if row is not None}

    def write(self, rows: Mapping[bytes, bytes]) -> None:
        """Keep rows; those that are there stay."""
        with self._opened() as file:
            file.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows.items())

    def _vectors(self, content: bytes, count: int) -> np.ndarray:
        if not isinstance(content, bytes) or len(content) != count * self.dim * 2:
            raise CdlmError(f"{self.file} was altered: delete it, and it will be made again")
        return np.frombuffer(content, dtype=np.float16).reshape(count, self.dim)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each use: none is shared by threads or inherited by processes."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            file = sqlite3.connect(self.file, timeout=PATIENCE)
            try:
                with file:  # all of it is written, or nothing
                    file.execute("CREATE TABLE IF NOT EXISTS vectors (row BLOB PRIMARY KEY, content BLOB NOT NULL)")
                    yield file
            finally:
                file.close()
        except (sqlite3.Error, OSError) as error:
            raise CdlmError(
                f"the vectors in {self.file} cannot be used ({first_line(error)}): delete the file, or leave the cache"
                " out"
            ) from error


def _keys(tokens: Int[Tensor, "b n"], seen: Bool[Tensor, "b n"]) -> list[bytes]:
    """A hash of each row's seen tokens and their places."""
    ids = torch.where(seen, tokens, -1).long().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in ids]
