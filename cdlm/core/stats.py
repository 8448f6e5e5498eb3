"""Ratios of sums over samples, their bootstrap, and bounds that hold for any number of samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
"""Sets of samples that a bootstrap draws."""
PAIRED, APART = 0, 1
"""Seeds of a bootstrap: of one set of samples, whose statistics are paired, and of a set beside it."""


@dataclass(frozen=True)
class Bootstrap:
    """A statistic of a set of samples, and its values on samples drawn with replacement.

    Differences and ratios are taken draw by draw: of two statistics of the same samples, or of independent sets.
    """

    value: float
    draws: Float[np.ndarray, " r"]

    @property
    def interval95(self) -> tuple[float, float]:
        """Percentile interval."""
        return self._quantile(0.025), self._quantile(0.975)

    def upper(self, confidence: float) -> float:
        """One-sided bound: the true value is below it with this confidence."""
        return self._quantile(confidence)

    def most(self, confidence: float) -> float:
        """Bound of the absolute value: the true value is within plus or minus this with the confidence.

        Two one-sided bounds, each with the whole confidence (Schuirmann, 1987): a value outside fails one of them only.
        """
        return max(self._quantile(confidence), -self._quantile(1 - confidence))

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        return Bootstrap(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: Bootstrap) -> Bootstrap:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.float64(self.value) / other.value
            return Bootstrap(float(value), self.draws / other.draws)

    def _quantile(self, share: float) -> float:
        """Of the draws that have a value: one of samples without any weight has none. NaN if none has."""
        known = self.draws[~np.isnan(self.draws)]
        return float(np.quantile(known, share)) if len(known) else math.nan


def bootstrap(
    statistic: Callable[[Float[np.ndarray, "r m"]], Float[np.ndarray, " r"]],
    samples: int,
    block: int = 1,
    seed: int = PAIRED,
) -> Bootstrap:
    """`statistic` of the multiplicities of the samples: once each, then drawn with replacement.

    The draws depend on the arguments alone, so statistics of one set of samples are paired, draw by draw.

    Args:
        block: samples that are drawn together, neighbours in a circle (circular block bootstrap, Politis and Romano,
            1992); for samples in an order where neighbours are alike.
        seed: of the draws; another one for a set of samples that has nothing to do with the first.
    """
    return Bootstrap(float(statistic(np.ones((1, samples)))[0]), statistic(_multiplicities(samples, block, seed)))


@lru_cache(8)
def _multiplicities(samples: int, block: int, seed: int) -> Float[np.ndarray, "r m"]:
    rng = np.random.default_rng(seed)
    if block == 1:
        return rng.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES).astype(np.float64)
    starts = rng.integers(0, samples, (RESAMPLES, math.ceil(samples / block)))
    drawn = ((starts[:, :, None] + np.arange(block)) % samples).reshape(RESAMPLES, -1)[:, :samples]
    return np.stack([np.bincount(row, minlength=samples) for row in drawn]).astype(np.float64)


def block_length(values: Float[np.ndarray, " m"]) -> int:
    """How many neighbours to draw together in a bootstrap of the mean of a series, at least 1.

    Politis and White (2004) for the circular block bootstrap, as corrected by Patton, Politis and White (2009): a
    series without correlation gives 1. A block has at most 3 sqrt(n) values: a text of a few long stretches, such as
    four restaurants, has a larger error than this can see.
    """
    n, centred = len(values), values - values.mean()
    if n < 10 or not centred.any():
        return 1
    near = max(5, math.ceil(math.sqrt(math.log10(n))))
    most = min(math.ceil(math.sqrt(n)) + near, n - near - 1)
    covariance = np.array([centred[: n - lag] @ centred[lag:] for lag in range(most + near + 1)]) / n
    small = np.abs(covariance / covariance[0]) < 2 * math.sqrt(math.log10(n) / n)
    last = next((m for m in range(most) if small[m + 1 : m + 1 + near].all()), most)
    if last == 0:
        return 1
    window = min(2 * last, most)
    lags = np.arange(-window, window + 1)
    weight = np.minimum(1, 2 * (1 - np.abs(lags) / window)) * covariance[np.abs(lags)]
    spectrum = weight.sum() ** 2
    if not spectrum > 0:
        return 1
    best = (1.5 * (np.abs(lags) @ weight) ** 2 / spectrum) ** (1 / 3) * n ** (1 / 3)
    return int(max(1, min(math.ceil(best), math.ceil(min(3 * math.sqrt(n), n / 3)))))


@dataclass(frozen=True)
class Scores:
    """A measure that is a ratio of sums over samples, such as nats per token; NaN where the weights sum to 0.

    Args:
        serial: the samples are in the order of a text, where neighbours are alike: they are drawn in blocks.
    """

    total: Float[np.ndarray, " m"]
    weight: Float[np.ndarray, " m"]
    serial: bool = False

    def __call__(self, times: Float[np.ndarray, "r m"]) -> Float[np.ndarray, " r"]:
        total, weight = times @ self.total, times @ self.weight
        return np.divide(total, weight, out=np.full(len(times), np.nan), where=weight != 0)

    @property
    def block(self) -> int:
        """Samples that a bootstrap draws together."""
        ratio = self.total.sum() / max(self.weight.sum(), np.finfo(np.float64).tiny)
        return block_length(self.total - ratio * self.weight) if self.serial else 1

    def bootstrap(self, seed: int = PAIRED) -> Bootstrap:
        """The measure with its resampled values."""
        return bootstrap(self, len(self.total), self.block, seed)

    def relative_to(self, full: Scores) -> Bootstrap:
        """self / full - 1 on the same samples: 0.01 is one per cent more."""
        return bootstrap(lambda times: self(times) / full(times) - 1, len(self.total))

    def first(self, count: int) -> Scores:
        """Of the first samples alone."""
        return self.of(slice(count))

    def of(self, chosen: slice) -> Scores:
        """Of some of the samples alone."""
        return Scores(self.total[chosen], self.weight[chosen], self.serial)


# --- bounds that hold for any number of samples -----------------------------------------------------------------------


def hoeffding_bentkus(mean: float, samples: int, limit: float) -> float:
    """p-value of "the expected loss is above `limit`", of independent losses in [0, 1] with this mean.

    The smaller of Hoeffding's and Bentkus' bounds (Bates et al., arXiv 2101.02703, section 3.1.2): valid for any
    distribution and any number of samples.
    """
    if mean >= limit:
        return 1.0
    ratio = _binary_divergence(mean, limit)
    return min(
        1.0, math.exp(-samples * ratio), math.e * binomial_tail(math.ceil(samples * mean - 1e-9), samples, limit)
    )


def binomial_tail(count: int, samples: int, limit: float) -> float:
    """p-value of "losses are 1 with a probability above `limit`", of `count` losses of 1 among independent 0s and 1s.

    The exact one-sided binomial test, whose bound is that of Clopper and Pearson (1934).
    """
    if limit >= 1:
        return float(count >= samples)
    terms = (
        math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1)
        + k * math.log(limit) + (samples - k) * math.log1p(-limit)
        for k in range(count + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, terms)))


def _binary_divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of coins, in nats."""
    if b == 1:
        return 0.0 if a == 1 else math.inf
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def upper_bound(p_value: Callable[[float], float], mean: float, confidence: float) -> float:
    """Least limit in [mean, 1] that a test rejects: the loss is below it with this confidence.

    Args:
        p_value: of "the loss is above a limit"; falls as the limit grows.
    """
    low, high = mean, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(middle) <= 1 - confidence else (middle, high)
    return high
