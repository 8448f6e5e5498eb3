"""Random splits of real text, which sets of texts are compared with by the distribution of their features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cdlm.core.errors import CdlmError
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.metrics.features import Features, Reader
from cdlm.evaluation.metrics.frechet import relative_frechet
from cdlm.evaluation.metrics.mauve import mauve
from cdlm.evaluation.texts import Corpus

Distance = Callable[[Float[np.ndarray, "m w"], Float[np.ndarray, "m w"], int], float]
"""Of two sets of features, with the seed of what is drawn at random."""

DISTANCES: dict[str, Distance] = {"mauve": mauve, "frechet": lambda p, q, seed: relative_frechet(p, q)}
"""Ways to compare two sides, by the key of their column."""


@dataclass(frozen=True)
class Spread:
    """One number for each random split of the real text."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the splits."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """Standard deviation over the splits; NaN of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def columns(self, key: str) -> dict[str, float]:
        """As columns of a table."""
        return {key: self.mean, f"{key}_sd": self.sd}


@dataclass(frozen=True, eq=False)
class Reference:
    """Splits of real text as features. Every set of texts is compared with the left side of each split.

    The two sides of a split give the value of real text against real text, which is the best that a set can reach.

    Args:
        name: of the real text.
        read: turns texts into features.
        sides: features of the two sides of each split, equally many texts each.
        texts: all texts of the sides.
    """

    name: str
    read: Reader
    sides: tuple[tuple[Float[np.ndarray, "m w"], Float[np.ndarray, "m w"]], ...]
    texts: frozenset[str]

    @staticmethod
    def of(splits: Sequence[tuple[Corpus, Corpus]], features: Features, readers: Readers) -> Reference:
        """Of `RealText.splits`."""
        corpora = [side for split in splits for side in split]
        read = features.reader(corpora, readers)
        sides = tuple((read(left), read(right)) for left, right in splits)
        return Reference(corpora[0].name, read, sides, frozenset(text for side in corpora for text in side.texts))

    @property
    def count(self) -> int:
        """Texts on each side."""
        return len(self.sides[0][0])

    def copied(self, corpus: Corpus) -> float:
        """Share of the texts of a set that are also in the reference."""
        return sum(text in self.texts for text in corpus.texts) / max(1, len(corpus.texts))

    def check_copies(self, corpus: Corpus) -> None:
        """Raise if most texts of a set are also in the reference: it was then taken from there."""
        if self.copied(corpus) > 0.5:
            raise CdlmError(
                f"{self.copied(corpus):.0%} of the texts of {corpus.name!r} are also in the {self.name} that they are"
                " compared with: measure texts that were not taken from it"
            )

    def compare(self, corpus: Corpus, distances: Mapping[str, Distance] = DISTANCES) -> dict[str, Spread]:
        """The distances of a set of texts to the left side of each split, by name.

        Args:
            corpus: as many texts as a side has, or more, of which so many are drawn.

        Raises:
            CdlmError: there are fewer texts.
        """
        features = self.read(corpus.some(self.count, seed=0))
        return self._spreads([(features, left) for left, _ in self.sides], distances)

    def ceiling(self, distances: Mapping[str, Distance] = DISTANCES) -> dict[str, Spread]:
        """The distances between the two sides of each split: real text against real text."""
        return self._spreads([(right, left) for left, right in self.sides], distances)

    def _spreads(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], distances: Mapping[str, Distance]
    ) -> dict[str, Spread]:
        return {
            name: Spread(tuple(distance(p, q, number) for number, (p, q) in enumerate(pairs, 1)))
            for name, distance in distances.items()
        }
