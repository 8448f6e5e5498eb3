"""Making the record of a run, step by step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from cdlm.core.types import LoopStep
from cdlm.recording.record import Record, Switches, in_order, joined

OPEN = -1
"""In place of the token at an open position of a continuous model."""


class Recorder:
    """The record of m samples while they are drawn.

    Args:
        names: row signals to record, as far as the steps have them.
        budget: most steps of a sample.
        start: tokens of the samples before the first step.
        mask_id: the mask of a masked model; None of a continuous one, in whose canvases open positions are `OPEN`.
        watched: names of signals of each position to keep, as far as the steps have them.
    """

    def __init__(
        self, names: Sequence[str], budget: int, start: Int[Tensor, "m n"], mask_id: int | None = None,
        watched: Collection[str] = (),
    ):  # fmt: skip
        self.names, self.mask_id, self.watched, count = names, mask_id, sorted(watched), len(start)
        self.tokens = np.full(start.shape, -1, np.int64)
        self.t = np.full((budget, count), np.nan)
        self.nfe = np.zeros((budget, count), np.int32)
        self.budget, self.ended = np.full(count, budget), np.zeros(count, bool)
        self.signals: dict[str, np.ndarray] = {}
        self.positions: dict[str, np.ndarray] = {}
        self.switches: list[Switches] = []
        self.commits: list[Switches] = []

    def write(self, step: LoopStep, columns: Int[np.ndarray, " b"]) -> None:
        """Record one step of the rows whose places among the samples are `columns`."""
        state, canvas = step.state, step.canvas
        self.ended[columns] = (step.done & ~step.halted).numpy()
        steps, tokens = state.step.cpu().numpy(), state.tokens.cpu().numpy()
        self.nfe[steps, columns], self.budget[columns] = state.nfe.cpu().numpy(), state.budget.cpu().numpy()
        for name in self.names:
            if name in state.signals:
                values = self.signals.setdefault(name, np.full(self.nfe.shape, np.nan, np.float32))
                values[steps, columns] = state.signals[name].cpu().numpy()
        open_ = state.open.cpu().numpy()
        for name in self.watched:
            if name in state.signals:
                if name not in self.positions:
                    self.positions[name] = np.full((*self.nfe.shape, open_.shape[1]), np.nan, np.float16)
                values = state.signals[name].float().cpu().numpy()
                self.positions[name][steps, columns] = np.where(open_, values, np.nan)
        self.switches.append(_changes(tokens, self.tokens[columns], open_, steps, columns))
        self.tokens[columns] = tokens
        self.t[steps, columns] = state.t.cpu().numpy()
        if canvas is not None:
            after = canvas.cpu().numpy()
            before = np.full_like(after, OPEN if self.mask_id is None else self.mask_id)
            self.commits.append(_changes(after, before, open_, steps, columns))

    def record(self) -> Record:
        """The record of all steps so far."""
        commits = in_order(joined(self.commits)) if self.commits else None
        budget = None if self.mask_id is None else self.budget
        switches = in_order(joined(self.switches))
        return Record(self.t, self.nfe, self.signals, switches, commits, budget, self.ended, self.positions)


def _changes(
    now: Int[np.ndarray, "b n"], before: Int[np.ndarray, "b n"], open_: Bool[np.ndarray, "b n"],
    steps: Int[np.ndarray, " b"], columns: Int[np.ndarray, " b"],
) -> Switches:  # fmt: skip
    """Open positions whose token is another than before."""
    row, position = np.nonzero((now != before) & open_)
    changed = (steps[row], columns[row], position, now[row, position])
    kinds = (np.uint32, np.uint32, np.uint16, np.uint32)
    return Switches(*(part.astype(kind) for part, kind in zip(changed, kinds, strict=True)))
