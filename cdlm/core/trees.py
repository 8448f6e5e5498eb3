"""Nests of tensors whose first axis is the row, and of `Rows`: drop, join and blank rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


class Rows(ABC):
    """What a nest has of each row that is no tensor with the row as its first axis."""

    @abstractmethod
    def take(self, rows: list[int]) -> Rows:
        """Some of the rows."""

    @abstractmethod
    def join(self, other: Any) -> Rows:
        """These rows, then those of the other."""


@dataclass(frozen=True, eq=False)
class Ragged(Rows):
    """Some entries of each row, row by row. Where there are none at all, they may have any shape."""

    values: Shaped[Tensor, "k ..."]
    counts: tuple[int, ...]
    """Entries of each row."""

    def take(self, rows: list[int]) -> Ragged:
        ends = list(accumulate(self.counts))
        parts = [self.values[ends[row] - self.counts[row] : ends[row]] for row in rows]
        return Ragged(torch.cat(parts) if parts else self.values[:0], tuple(self.counts[row] for row in rows))

    def join(self, other: Any) -> Ragged:
        parts = [part.values for part in (self, other) if len(part.values)]
        return Ragged(torch.cat(parts) if parts else other.values, self.counts + other.counts)


@dataclass(frozen=True, eq=False)
class Columns(Rows):
    """What the host knows of each row: subclasses have lists alone, with one entry of each row."""

    def take(self, rows: list[int]) -> Columns:
        return type(self)(*([column[row] for row in rows] for column in self._columns))

    def join(self, other: Any) -> Columns:
        return type(self)(*(one + two for one, two in zip(self._columns, other._columns, strict=True)))

    @property
    def _columns(self) -> list[list[Any]]:
        return [getattr(self, field.name) for field in fields(self)]


def take(tree: Any, index: Tensor) -> Any:
    """Rows `index` (int64 positions, best on the CPU) of every tensor in a nest of tuples, lists and dicts."""

    def some(x: Any) -> Any:
        return x.take(index.tolist()) if isinstance(x, Rows) else x.index_select(0, index.to(x.device))

    return _map(some, tree)


def join(first: Any, second: Any) -> Any:
    """Two nests of the same form, concatenated along the rows."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Rows):
        return first.join(second)
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: join(first[key], second[key]) for key in first}
    return _rebuild(first, [join(a, b) for a, b in zip(first, second, strict=True)])


def choose(which: Sequence[bool], first: Any, second: Any) -> Any:
    """Of two nests of the same form and rows, the rows of the first where `which` is true, else those of the second."""
    ours, theirs = ([i for i, flag in enumerate(which) if bool(flag) is side] for side in (True, False))
    parts = [torch.tensor(rows, dtype=torch.int64) for rows in (ours, theirs)]
    return take(join(take(first, parts[0]), take(second, parts[1])), torch.cat(parts).argsort())


def blank(tree: Any, rows: int) -> Any:
    """A nest of the same form with `rows` rows of zeros."""
    return _map(lambda x: x.new_zeros((rows, *x.shape[1:])), tree)


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, Tensor | Rows):
        return function(tree)
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    return _rebuild(tree, [_map(function, item) for item in tree])


def _rebuild(like: Any, items: Iterable[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
