"""Nests of tensors whose first axis is the row: drop, join and blank rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def take(tree: Any, index: Tensor) -> Any:
    """Rows `index` (int64 positions) of every tensor in a nest of tuples, lists and dicts."""
    return _map(lambda x: x.index_select(0, index), tree)


def join(first: Any, second: Any) -> Any:
    """Two nests of the same form, concatenated along the rows."""
    import torch

    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: join(first[key], second[key]) for key in first}
    return _rebuild(first, [join(a, b) for a, b in zip(first, second, strict=True)])


def blank(tree: Any, rows: int) -> Any:
    """A nest of the same form with `rows` rows of zeros."""
    return _map(lambda x: x.new_zeros((rows, *x.shape[1:])), tree)


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    return _rebuild(tree, [_map(function, item) for item in tree])


def _rebuild(like: Any, items: Iterable[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
