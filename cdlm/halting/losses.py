"""What a halting rule loses against the full run, and how surely it loses no more.

A loss that has no largest value, such as nats, is bounded by a bootstrap: that is right for many samples, and wrong
where the damage is rarer than one sample in the set, since no draw then holds it. A loss between 0 and 1 has a bound
that holds for any number of samples and any distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from cdlm.core.stats import Bootstrap, binomial_tail, hoeffding_bentkus, upper_bound

MOST_SAMPLES = 100_000
"""More are never advised."""


class Loss(ABC):
    """A loss that was measured on samples; 0 is none."""

    bound: ClassVar[str]
    """Name of the method that bounds it."""

    @property
    @abstractmethod
    def value(self) -> float:
        """The mean loss."""

    @abstractmethod
    def at_most(self, confidence: float) -> float:
        """The true loss is no more than this, with that confidence."""

    @abstractmethod
    def samples_for(self, limit: float, confidence: float) -> int | None:
        """About how many samples of this mean loss would show that it is at most `limit`; None if none would."""


@dataclass(frozen=True)
class Change(Loss):
    """A loss without a largest value.

    Args:
        change: signed: below 0 is a gain.
        two_sided: count a gain as a loss of the same size. Text that is easier to predict than the full run's is not
            better, it is sharper: a lower temperature does the same.
        samples: that it was measured on.
    """

    change: Bootstrap
    two_sided: bool
    samples: int
    bound = "bootstrap"

    @property
    def value(self) -> float:
        return self.change.value

    def at_most(self, confidence: float) -> float:
        return self.change.most(confidence) if self.two_sided else self.change.upper(confidence)

    def samples_for(self, limit: float, confidence: float) -> int | None:
        size = abs(self.value) if self.two_sided else self.value
        room, margin = limit - size, self.at_most(confidence) - size
        return None if room <= 0 else math.ceil(self.samples * (margin / room) ** 2)


@dataclass(frozen=True)
class Bounded(Loss):
    """A loss of each sample in [0, 1], such as the share of its tokens that differ (Hoeffding and Bentkus).

    See `cdlm.core.stats.hoeffding_bentkus`.
    """

    losses: Float[np.ndarray, " m"]
    bound = "hoeffding-bentkus"

    @property
    def value(self) -> float:
        return float(self.losses.mean())

    def p_value(self, limit: float, samples: int) -> float:
        """Of "the loss is above `limit`", from so many samples of this mean loss."""
        return hoeffding_bentkus(self.value, samples, limit)

    def at_most(self, confidence: float) -> float:
        return upper_bound(lambda limit: self.p_value(limit, len(self.losses)), self.value, confidence)

    def samples_for(self, limit: float, confidence: float) -> int | None:
        if self.value >= limit:
            return None
        samples = len(self.losses)
        while self.p_value(limit, samples) > 1 - confidence:
            samples = math.ceil(1.2 * samples)
            if samples > MOST_SAMPLES:
                return None
        return samples


@dataclass(frozen=True)
class Binary(Bounded):
    """A loss of each sample that is 0 or 1, such as an answer that is lost (exact binomial test)."""

    bound = "binomial"

    def p_value(self, limit: float, samples: int) -> float:
        return binomial_tail(round(self.value * samples), samples, limit)
