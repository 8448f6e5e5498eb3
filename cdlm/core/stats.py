"""Ratios of sums over samples, and their bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
"""Sets of samples that a bootstrap draws."""


@dataclass(frozen=True)
class Bootstrap:
    """A statistic of a set of samples, and its values on samples drawn with replacement."""

    value: float
    draws: Float[np.ndarray, " r"]

    @property
    def interval95(self) -> tuple[float, float]:
        """Percentile interval."""
        return self._quantile(0.025), self._quantile(0.975)

    def upper(self, confidence: float) -> float:
        """One-sided bound: the true value is below it with this confidence."""
        return self._quantile(confidence)

    def _quantile(self, share: float) -> float:
        """Of the draws that have a value: one of samples without any weight has none. NaN if none has."""
        known = self.draws[~np.isnan(self.draws)]
        return float(np.quantile(known, share)) if len(known) else math.nan


def bootstrap(statistic: Callable[[Float[np.ndarray, "r m"]], Float[np.ndarray, " r"]], samples: int) -> Bootstrap:
    """`statistic` of the multiplicities of the samples: once each, then drawn with replacement, always the same draws.

    Statistics of one set of samples are therefore paired, draw by draw.
    """
    return Bootstrap(float(statistic(np.ones((1, samples)))[0]), statistic(_multiplicities(samples)))


@lru_cache(4)
def _multiplicities(samples: int) -> Float[np.ndarray, "r m"]:
    rng = np.random.default_rng(0)
    return rng.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES).astype(np.float64)


@dataclass(frozen=True)
class Scores:
    """A measure that is a ratio of sums over samples, such as nats per token; NaN where the weights sum to 0."""

    total: Float[np.ndarray, " m"]
    weight: Float[np.ndarray, " m"]

    def __call__(self, times: Float[np.ndarray, "r m"]) -> Float[np.ndarray, " r"]:
        total, weight = times @ self.total, times @ self.weight
        return np.divide(total, weight, out=np.full(len(times), np.nan), where=weight != 0)

    def bootstrap(self) -> Bootstrap:
        """The measure with its resampled values."""
        return bootstrap(self, len(self.total))

    def relative_to(self, full: Scores) -> Bootstrap:
        """self / full - 1 on the same samples: 0.01 is one per cent more."""
        return bootstrap(lambda times: self(times) / full(times) - 1, len(self.total))
