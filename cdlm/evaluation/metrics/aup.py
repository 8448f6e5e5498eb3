"""Accuracy under parallelism: how long a way of decoding stays right while it makes more tokens a call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FALL = 5.0
"""Points that accuracy may fall below that of the first point; what falls deeper is left out."""
PENALTY = 3.0
"""Of the weight of what is less right than the best."""

Curve = Sequence[tuple[float, float]]
"""Points (tokens per forward, accuracy in per cent) of one method, in any order."""


def aup(curve: Curve, y_max: float) -> float:
    """The area under accuracy over tokens per forward, each accuracy weighted by how near it is to the best.

    With points (r_k, y_k) sorted by r, those with y_k < y_1 - 5 left out, and W(y) = min(exp(-3 (1 - y / y_max)), 1):
    r_1 y_1 + sum over k of (r_k - r_(k-1)) (y_k W(y_k) + y_(k-1) W(y_(k-1))) / 2. The first term has no weight. From
    d3LLM (ICML 2026), whose code refuses a curve that falls by more than 5 points; here the points are left out, as in
    the definition.

    Args:
        curve: of equal tokens per forward, the better point counts as the first.
        y_max: best accuracy of any method on the task, in per cent: areas with different ones do not compare.
    """
    ordered = sorted(curve, key=lambda point: (point[0], -point[1]))
    r, y = np.array([point for point in ordered if point[1] >= ordered[0][1] - FALL], np.float64).T
    weighted = y * np.minimum(np.exp(-PENALTY * (1 - y / y_max)), 1) if y_max > 0 else y
    return float(r[0] * y[0] + (np.diff(r) * (weighted[1:] + weighted[:-1]) / 2).sum())


def accuracy_of(loss: float, best: float) -> float:
    """What stands for accuracy where there are no answers: 100 exp(-(loss - best)), of losses in nats a token. Ours."""
    return float(100 * np.exp(best - loss))
