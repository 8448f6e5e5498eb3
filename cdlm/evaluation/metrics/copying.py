"""Copying: how much of a text stands word for word in the training text. Other measures take a copy for a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt64

from cdlm.data.order import mix
from cdlm.data.store import TokenStore

RUN = 16
"""Tokens in a row that the training text must have for them to count as copied; a power of two. Everyday phrases are
shorter: compare with the value of real text that was not trained on."""
MOST_TOKENS = 10_000_000
"""Of the training text that are searched: the first ones. Three million took 8 s of one core and 0.2 GB."""
_BASE = 0x9E3779B97F4A7C15
"""Of the polynomial that hashes a run modulo 2**64."""


@dataclass(frozen=True)
class Runs:
    """Every run of `RUN` tokens of a training text, as sorted 64-bit hashes."""

    hashes: UInt64[np.ndarray, " m"]

    @staticmethod
    def of(store: TokenStore, end: int, most: int = MOST_TOKENS) -> Runs:
        """The runs of a store's first `most` tokens, with the token `end` after each document."""
        tokens = np.asarray(store.tokens[:most], dtype=np.int64)
        ends = store.offsets[1:]
        return Runs(np.unique(_hashes(np.insert(tokens, ends[ends <= len(tokens)], end))))

    def copied(self, texts: Sequence[Sequence[int]]) -> float:
        """Share of the tokens of all texts that are part of a run of the training text, 0..1.

        Texts shorter than a run are left out, for they can hold none; NaN without others.
        """
        parts = [self._covered(np.asarray(tokens, dtype=np.int64)) for tokens in texts if len(tokens) >= RUN]
        total = sum(map(len, parts))
        return sum(int(part.sum()) for part in parts) / total if total else math.nan

    def _covered(self, tokens: np.ndarray) -> Bool[np.ndarray, " n"]:
        found = _hashes(tokens)
        places = np.minimum(np.searchsorted(self.hashes, found), max(len(self.hashes) - 1, 0))
        covered = np.zeros(len(tokens), dtype=np.bool_)
        for start in np.flatnonzero(self.hashes[places] == found) if len(self.hashes) else ():
            covered[start : start + RUN] = True
        return covered


def _hashes(tokens: np.ndarray) -> UInt64[np.ndarray, " m"]:
    """The hash of each run of `RUN` tokens, by doubling: that of 2w tokens is that of the first w, times the base to
    the power of w, plus that of the next w."""
    found, width, power = mix(tokens.astype(np.uint64)), 1, np.uint64(_BASE)
    while width < RUN:
        found = found[:-width] * power + found[width:]
        width, power = 2 * width, np.uint64(int(power) ** 2 % 2**64)
    return found
