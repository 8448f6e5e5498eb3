"""The record of a run, step by step: row signals, and tokens as a list of switches, which is small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from cdlm.core.errors import CdlmError


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

    t: Float[np.ndarray, "steps m"]
    """Noise level of each step, float64; NaN after a row has left."""
    nfe: Int[np.ndarray, "steps m"]
    """Denoiser calls spent up to and with each step; 0 after a row has left."""
    signals: Mapping[str, Float[np.ndarray, "steps m"]]
    """Row signals by name, float32; NaN after a row has left."""
    switches: Switches
    commits: Switches | None = None
    """Every token that was committed, with its step; None of a run that commits none."""
    budget: Int[np.ndarray, " m"] | None = None
    """Of a masked model: steps that each sample may take at most; None of a continuous one, whose grid says it."""
    ended: Bool[np.ndarray, " m"] | None = None
    """Samples that came to their end, where no rule halted them; None in records of earlier programs."""
    positions: Mapping[str, Float[np.ndarray, "steps m n"]] = field(default_factory=dict)
    """Signals of each open position by name, float16; NaN where nothing is open. Only of a run that is watched; files
    do not hold them."""

    @property
    def steps(self) -> int:
        return len(self.t)

    def __len__(self) -> int:
        return self.nfe.shape[1]

    @property
    def budgets(self) -> Int[np.ndarray, " m"]:
        """Steps that each sample may take at most."""
        return np.full(len(self), self.steps) if self.budget is None else self.budget

    @property
    def masked(self) -> bool:
        """Whether it is of a masked model, all of whose tokens are committed."""
        return self.budget is not None

    def last_step(self, committed: bool) -> Int[np.ndarray, " m"]:
        """The last recorded step of each sample; or, of a masked model, the one at which all is `committed`."""
        last = np.maximum((self.nfe > 0).sum(0) - 1, 0)
        if self.commits is None or not self.masked or not committed:
            return last
        full = np.zeros(len(self), np.int64)
        np.maximum.at(full, self.commits.sample, self.commits.step.astype(np.int64))
        return np.minimum(full, last)

    def settled(
        self, ends: Bool[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], last: Int[np.ndarray, " m"]
    ) -> Int[np.ndarray, " m"]:
        """Calls after which the text up to the first place where it may end was decided, of samples that leave at their
        own `last` step; of a continuous model all calls."""
        when = np.broadcast_to(last[:, None], given.shape).copy()
        if self.commits is not None and self.masked:
            step = self.commits.step.astype(np.int64)
            early = step < last[self.commits.sample]
            when[self.commits.sample[early], self.commits.position[early]] = step[early]
            end = np.logical_or.accumulate(ends, 1)
            after = np.concatenate([np.zeros_like(end[:, :1]), end[:, :-1]], 1)
            when[given | after] = 0
        return self.nfe[when.max(1), np.arange(len(self))].astype(np.int64)

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
        if self.commits is not None:  # a rule that halts fills what is open at its step, and nothing else
            before = self.commits.step < step[self.commits.sample]
            kept = Switches(*(part[before] for part in self.commits))
            tokens[kept.sample, kept.position] = kept.token
        return tokens

    def walk(self, start: Int[np.ndarray, "m n"]) -> Iterator[Int[np.ndarray, "m n"]]:
        """`tokens_at` of one step after the other, the same for all samples."""
        now, changes = start.copy(), [part for part in (self.switches, self.commits) if part is not None]
        ends = [np.searchsorted(part.step, np.arange(self.steps + 1)) for part in changes]
        for step in range(self.steps):
            # Switches count at their own step, commits from the next one on.
            for part, end, late in zip(changes, ends, (0, 1), strict=False):
                here = slice(end[max(step - late, 0)], end[step + 1 - late])
                now[part.sample[here], part.position[here]] = part.token[here]
            yield now.copy()

    def canvases(
        self, start: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], mask_id: int
    ) -> Int[np.ndarray, "steps m n"]:
        """Every sample after each step, `mask_id` where it is open.

        Raises:
            CdlmError: the run commits nothing and has no canvas.
        """
        if self.commits is None:
            raise CdlmError("a run that commits nothing has no canvas of masks: tokens_at gives its tokens at a step")
        now, frames = np.where(given, start, mask_id), []
        for step in range(self.steps):
            here = self.commits.step == step
            now = now.copy()
            now[self.commits.sample[here], self.commits.position[here]] = self.commits.token[here]
            frames.append(now)
        return np.stack(frames)

    def select(self, samples: Int[np.ndarray, " k"]) -> Record:
        """The samples of these columns, in this order; one that is named twice is there twice."""
        columns = np.arange(len(self))[samples]
        times = _times_before(columns)

        def once(switches: Switches, chosen: Bool[np.ndarray, " k"]) -> Switches:
            place = np.full(len(self), -1, np.int64)
            place[columns[chosen]] = np.flatnonzero(chosen)
            kept = place[switches.sample] >= 0
            switches = Switches(*(part[kept] for part in switches))
            return switches._replace(sample=place[switches.sample].astype(np.uint32))

        def of(switches: Switches) -> Switches:
            return in_order(joined([once(switches, times == time) for time in range(times.max(initial=0) + 1)]))

        return Record(
            self.t[:, samples],
            self.nfe[:, samples],
            {name: values[:, samples] for name, values in self.signals.items()},
            of(self.switches),
            None if self.commits is None else of(self.commits),
            None if self.budget is None else self.budget[samples],
            None if self.ended is None else self.ended[samples],
            {name: values[:, samples] for name, values in self.positions.items()},
        )

    @staticmethod
    def join(parts: Sequence[Record]) -> Record:
        """The samples of several records of the same grid, side by side."""
        first = np.cumsum([0, *(len(part) for part in parts)])
        commits = [part.commits for part in parts if part.commits is not None]
        ended = [part.ended for part in parts if part.ended is not None]
        steps = max(part.steps for part in parts)
        if any(part.steps < steps for part in parts):
            parts = [part.padded(steps) for part in parts]
        return Record(
            np.concatenate([part.t for part in parts], 1),
            np.concatenate([part.nfe for part in parts], 1),
            {name: np.concatenate([part.signals[name] for part in parts], 1) for name in parts[0].signals},
            _side_by_side([part.switches for part in parts], first),
            _side_by_side(commits, first) if commits else None,
            np.concatenate([part.budgets for part in parts]) if parts[0].masked else None,
            np.concatenate(ended) if len(ended) == len(parts) else None,
            {name: np.concatenate([part.positions[name] for part in parts], 1) for name in parts[0].positions},
        )

    def padded(self, steps: int) -> Record:
        """The same samples on a longer grid, which they left before its end."""
        more = [(0, steps - self.steps), (0, 0)]
        signals = {name: np.pad(values, more, constant_values=np.nan) for name, values in self.signals.items()}
        positions = {n: np.pad(v, [*more, (0, 0)], constant_values=np.nan) for n, v in self.positions.items()}
        t, budget = np.pad(self.t, more, constant_values=np.nan), self.budgets if self.masked else None
        return Record(t, np.pad(self.nfe, more), signals, self.switches, self.commits, budget, self.ended, positions)


def _times_before(columns: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """How often each entry stands before its place."""
    order, times = np.argsort(columns, kind="stable"), np.zeros(len(columns), np.int64)
    rising = columns[order]
    times[order] = np.arange(len(columns)) - np.searchsorted(rising, rising)
    return times


def _side_by_side(parts: Sequence[Switches], first: Int[np.ndarray, " k"]) -> Switches:
    """Switches of several records, whose columns begin at `first`."""
    shifted = [
        part._replace(sample=(part.sample + offset).astype(np.uint32))
        for part, offset in zip(parts, first, strict=False)
    ]
    return in_order(joined(shifted))


def joined(parts: Sequence[Switches]) -> Switches:
    """One after the other."""
    return Switches(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def in_order(switches: Switches) -> Switches:
    """Sorted by step."""
    order = np.argsort(switches.step, kind="stable")
    return Switches(*(part[order] for part in switches))
