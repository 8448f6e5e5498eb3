"""What a run leaves behind step by step, small enough to keep: row statistics, and tokens as the switches they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

RECORDED = ("mean_entropy", "mean_kl", "margin", "span_margin", "z_norm", "x0_norm", "score_cosine")
"""Row signals that a record keeps, beside each step's tokens."""


class Switches(NamedTuple):
    """Every switch of an open position's most likely token, in order of step; a first prediction is a switch too."""

    step: Integer[np.ndarray, " e"]
    sample: Integer[np.ndarray, " e"]
    """Column of the record."""
    position: Integer[np.ndarray, " e"]
    token: Integer[np.ndarray, " e"]
    """What the position switched to."""


@dataclass(frozen=True)
class Record:
    """m samples over the steps of their grid."""

    t: Float[np.ndarray, " steps"]
    """Noise level of each step, float64; NaN where no row came."""
    nfe: Int[np.ndarray, "steps m"]
    """Denoiser calls spent up to and with each step; 0 after a row has left."""
    signals: Mapping[str, Float[np.ndarray, "steps m"]]
    """Row signals by name, float32; NaN after a row has left."""
    switches: Switches

    @property
    def steps(self) -> int:
        return len(self.t)

    def __len__(self) -> int:
        return self.nfe.shape[1]

    def switch_counts(self) -> Int[np.ndarray, "steps m"]:
        """The signal `switches`: how many positions switch at each step."""
        cell = self.switches.step.astype(np.int64) * len(self) + self.switches.sample
        return np.bincount(cell, minlength=self.steps * len(self)).reshape(self.steps, len(self))

    def tokens_at(self, step: Int[np.ndarray, " m"], start: Int[np.ndarray, "m n"]) -> Int[np.ndarray, "m n"]:
        """Tokens of each sample at its own step, over `start`, which holds the prompts."""
        past = self.switches.step <= step[self.switches.sample]
        tokens = start.copy()
        # Of several switches of one position the last is the one that stays.
        tokens[self.switches.sample[past], self.switches.position[past]] = self.switches.token[past]
        return tokens

    def select(self, samples: Int[np.ndarray, " k"]) -> Record:
        """The samples of these columns, in this order."""
        place = np.full(len(self), -1, np.int64)
        place[samples] = np.arange(len(samples))
        kept = place[self.switches.sample] >= 0
        switches = Switches(*(part[kept] for part in self.switches))
        return Record(
            self.t,
            self.nfe[:, samples],
            {name: values[:, samples] for name, values in self.signals.items()},
            switches._replace(sample=place[switches.sample].astype(np.uint32)),
        )

    @staticmethod
    def join(parts: Sequence[Record]) -> Record:
        """The samples of several records of the same grid, side by side."""
        first = np.cumsum([0, *(len(part) for part in parts)])
        shifted = [
            part.switches._replace(sample=(part.switches.sample + offset).astype(np.uint32))
            for part, offset in zip(parts, first, strict=False)
        ]
        return Record(
            np.fmax.reduce([part.t for part in parts]),  # of parts that halted early the longest knows the levels
            np.concatenate([part.nfe for part in parts], 1),
            {name: np.concatenate([part.signals[name] for part in parts], 1) for name in parts[0].signals},
            in_order(Switches(*(np.concatenate(column) for column in zip(*shifted, strict=True)))),
        )


def in_order(switches: Switches) -> Switches:
    """Sorted by step."""
    order = np.argsort(switches.step, kind="stable")
    return Switches(*(part[order] for part in switches))
