"""When a sample is settled: what studies read off a record."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from cdlm.recording.record import Record


def zero_switch(record: Record) -> Int[np.ndarray, " m"]:
    """The step, from 1, at which each sample's last token changed: no later step changes the text.

    A sample whose last step still changes a token has the number of steps.
    """
    last = np.zeros(len(record), np.int64)
    np.maximum.at(last, record.switches.sample, record.switches.step.astype(np.int64) + 1)
    return last


def position_zero_switch(record: Record, positions: int) -> Int[np.ndarray, "m n"]:
    """The same for each position; 0 where nothing was generated."""
    last = np.zeros((len(record), positions), np.int64)
    switches = record.switches
    np.maximum.at(last, (switches.sample, switches.position), switches.step.astype(np.int64) + 1)
    return last


def reached(values: Float[np.ndarray, "steps m"], level: float) -> Int[np.ndarray, " m"]:
    """The step, from 1, from which each column stays at or above `level`; steps + 1 if it ends below."""
    below = values < level
    steps = len(values)
    return np.where(below.any(0), steps - np.argmax(below[::-1], axis=0), 0) + 1


def settled_by(steps: Int[np.ndarray, " m"], budget: int) -> Float[np.ndarray, " budget"]:
    """Share of samples whose step is at most 1, 2, ... budget."""
    return np.cumsum(np.bincount(np.minimum(steps, budget + 1), minlength=budget + 2)[1 : budget + 1]) / len(steps)
