"""Oracles: where samples would end if one knew their full run. They bound what a rule can save, and cannot be run."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

SLACK = 1e-6
"""Of a share that is a whole number of units but for rounding."""


def last_change(losses: Float[np.ndarray, "steps m"]) -> Int[np.ndarray, " m"]:
    """Of each sample the first step (from 0) from which on nothing is lost, to the end.

    Args:
        losses: of a sample that ends at a step, against its full run; 0 at its last step and after it.
    """
    lossy = losses > 0
    after = len(losses) - lossy[::-1].argmax(0)
    return np.where(lossy.any(0), after, 0)


def hindsight(
    losses: Float[np.ndarray, "steps m"], calls: Int[np.ndarray, "steps m"], limit: float, grain: int
) -> Int[np.ndarray, " m"]:
    """The steps (from 0) at which samples end with the fewest calls in all, of those whose mean loss is within `limit`.

    It spends the limit where it saves most: a sample may lose much so that another need lose nothing. This is a
    knapsack in which each sample takes one of its steps, and it is solved by dynamic programming over the loss that is
    spent, not by a greedy choice, which is not exact. The answer is exact if all losses are multiples of 1 / `grain`;
    others are rounded up, so that the limit holds and the calls are at most a little more than the fewest.

    Args:
        losses: as in `last_change`, each from 0 to 1.
        calls: spent up to and with each step, rising until a sample leaves.
        limit: from 0 to 1.
        grain: units of a whole loss; time and memory grow with limit * m**2 * grain.
    """
    m = losses.shape[1]
    room = math.floor(limit * m * grain + SLACK)
    units = np.ceil(losses * grain - SLACK).astype(np.int64)
    spent = np.zeros(room + 1, np.int64)  # fewest calls of the samples so far that lose at most so many units
    taken = np.zeros((m, room + 1), np.uint32)
    for sample in range(m):
        before, spent = spent, np.full(room + 1, np.iinfo(np.int64).max)
        for step in _worth_taking(units[:, sample], room):
            lost = units[step, sample]
            total = before[: room + 1 - lost] + calls[step, sample]
            better = total < spent[lost:]
            spent[lost:][better] = total[better]
            taken[sample, lost:][better] = step
    ends = np.zeros(m, np.int64)
    for sample in reversed(range(m)):
        ends[sample] = taken[sample, room]
        room -= units[ends[sample], sample]
    return ends


def _worth_taking(units: Int[np.ndarray, " steps"], room: int) -> Int[np.ndarray, " k"]:
    """Steps that lose less than every earlier one, and fit; the others cost more calls for no less loss."""
    least = np.minimum.accumulate(units)
    lower = np.concatenate([[True], least[1:] < least[:-1]])
    return np.flatnonzero(lower & (units <= room))
