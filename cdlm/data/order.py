"""The order of training rows, a pure function of (seed, position), and the loader that follows it.

An interrupted run continues exactly because nothing about the order is remembered except how many batches were
handed out: the shuffle is arithmetic, not a state.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch.utils.data import DataLoader, Subset

from cdlm.core.checks import check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.types import Batch
from cdlm.data.store import Row, TextRows

_ROUNDS = 8  # of the Feistel network; each changes one half of the index


@dataclass(frozen=True)
class Order:
    """An endless walk over `n_rows` rows, each epoch a different permutation; position counts rows over all epochs.

    The permutation of an epoch is a Feistel network over Z_a x Z_b with a b >= n_rows, walked until the result is a row
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): no memory, any position in constant time,
    and the same on every machine and library version.
    """

    n_rows: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise CdlmError(f"Order: expected at least one row, got {self.n_rows}; check the corpus")

    def row(self, position: int) -> int:
        """The row at one position."""
        return int(self.rows(np.array([position], dtype=np.int64))[0])

    def rows(self, positions: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        """The rows at several positions, each at least 0."""
        epoch, index = np.divmod(positions.astype(np.uint64), np.uint64(self.n_rows))
        key = mix(mix(np.full_like(epoch, self.seed % 2**64)) + epoch)
        index = self._permute(index, key)
        while (outside := index >= self.n_rows).any():
            index[outside] = self._permute(index[outside], key[outside])
        return index.astype(np.int64)

    def _permute(self, index: UInt64[np.ndarray, " b"], key: UInt64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
        """A keyed permutation of {0, ..., a b - 1}, which holds the rows and fewer than a indices more."""
        a = np.uint64(int(np.ceil(np.sqrt(self.n_rows))))
        b = np.uint64(-(-self.n_rows // int(a)))
        left, right = np.divmod(index, b)
        for turn in range(0, _ROUNDS, 2):
            left = (left + mix(key + np.uint64(turn) ^ mix(right)) % a) % a
            right = (right + mix(key + np.uint64(turn + 1) ^ mix(left)) % b) % b
        return left * b + right


class RowLoader:
    """An endless iterable of training batches that resumes exactly.

    Global batch g is made of the positions g * world * batch_size onwards; rank r takes every world-th of them from the
    r-th on, so that the ranks together read what one process with world * batch_size rows a batch would. `workers`
    processes read ahead without changing the order. The state counts the batches handed out, not those read ahead.

    As Lightning's training loader it is saved and restored with a checkpoint. Lightning itself takes one batch ahead of
    an iterable without a length, and would skip that batch on resuming, unless its Trainer has an integer
    `limit_train_batches`.

    Args:
        rows: The rows to read.
        batch_size: Rows a batch on this rank, at least 1.
        seed: Fixes the order.
        rank, world: Which process this is, of how many.
        workers: Reading processes; 0 reads in this one.
    """

    def __init__(
        self, rows: TextRows, batch_size: int, seed: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> None:
        check_whole("a loader", batch_size=batch_size, world=world)
        if not 0 <= rank < world:
            raise CdlmError(f"a loader needs a rank in [0, world), got rank {rank} of world {world}")
        self.rows, self.batch_size, self.rank, self.world, self.workers = rows, batch_size, rank, world, workers
        self.order = Order(len(rows), seed)
        self._batches = 0

    def __iter__(self) -> Iterator[Batch]:
        """Continue after the batches already handed out."""
        for batch in self._read(self._indices(self._batches)):
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out."""
        return {"batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iterator start after `state["batches"]` batches."""
        self._batches = int(state["batches"])

    def _indices(self, batch: int) -> Iterator[list[int]]:
        """The row indices of this rank's batches from the given one on, without end."""
        while True:
            first = batch * self.batch_size * self.world + self.rank
            yield self.order.rows(first + self.world * np.arange(self.batch_size, dtype=np.int64)).tolist()
            batch += 1

    def _read(self, indices: Iterator[list[int]]) -> Iterator[Batch]:
        if not self.workers:
            return (collate([self.rows[i] for i in chosen]) for chosen in indices)
        # the generator keeps the loader from drawing its workers' seeds from the global one
        return iter(DataLoader(self.rows, batch_sampler=_Endless(indices), num_workers=self.workers,
                               collate_fn=collate, generator=torch.Generator()))  # fmt: skip


def fixed_batches(rows: TextRows, batch_size: int, limit: int | None = None) -> DataLoader:
    """The first `limit` rows (all if None) in order, each once, for validation; the last batch may be smaller."""
    check_whole("a loader", batch_size=batch_size)
    check_whole("a loader", optional=True, limit=limit)
    chosen = range(len(rows) if limit is None else min(limit, len(rows)))
    return DataLoader(Subset(rows, chosen), batch_size, collate_fn=collate, generator=torch.Generator())


def collate(rows: list[Row]) -> Batch:
    """Stack rows of equal length."""
    valid = torch.from_numpy(np.stack([row.valid for row in rows]))
    # A mask that masks nothing would keep attention from its fastest kernels.
    mask = None if bool(valid.all()) else valid
    return Batch(torch.from_numpy(np.stack([row.tokens for row in rows])), mask, target=valid)


class _Endless:
    """An iterator as the batch sampler of a DataLoader, which wants to call iter() itself."""

    def __init__(self, indices: Iterator[list[int]]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices


def mix(x: UInt64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
    """Numbers spread over 64 bits: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), after one step of its
    counter."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
