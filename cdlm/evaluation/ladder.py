"""A ladder of worse and worse text, to see whether a distance sees what it should.

Real text, the same with 5, 10, 20 and 40 per cent of its tokens replaced at random, with its tokens shuffled, and
tokens drawn at random. A distance that does not put them in this order says nothing of generated text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from cdlm.evaluation.judge import Readers
from cdlm.evaluation.metrics.features import Features
from cdlm.evaluation.metrics.reference import DISTANCES, Distance, Reference, Spread
from cdlm.evaluation.texts import Corpus, RealText

SHARES = (0.05, 0.1, 0.2, 0.4)
"""Of tokens that are replaced."""


def corrupted(corpus: Corpus, share: float, decode: Callable[[list[int]], str], seed: int) -> Corpus:
    """The corpus with a share of its tokens replaced, each by any kind of token that occurs in it."""
    draw = np.random.default_rng(seed)
    kinds = np.unique([token for line in corpus.tokens for token in line])
    tokens = []
    for line in corpus.tokens:
        changed = np.array(line, dtype=np.int64)
        hit = draw.random(len(changed)) < share
        changed[hit] = draw.choice(kinds, int(hit.sum()))
        tokens.append(changed.tolist())
    return replace(corpus, name=f"{share:.0%}", tokens=tokens, texts=[decode(line) for line in tokens])


def rungs(corpus: Corpus, decode: Callable[[list[int]], str], seed: int) -> list[Corpus]:
    """The corpus and all that is made of it, from best to worst."""
    worse = [corrupted(corpus, share, decode, seed) for share in SHARES]
    floors = [corpus.shuffled(decode, seed), corpus.salad(decode, seed)]
    return [replace(corpus, name="real"), *worse, *floors]


def ladder(
    text: RealText, count: int, features: Features, readers: Readers, splits: int = 5,
    distances: Mapping[str, Distance] = DISTANCES,
) -> dict[str, dict[str, Spread]]:  # fmt: skip
    """The distances of every rung, by the names of rung and distance.

    Of each split of the real text, one side is made worse and compared with the other as it is.

    Args:
        count: texts a side.

    Raises:
        CdlmError: there is too little real text.
    """
    pairs = text.splits(count, splits)
    reference = Reference.of(pairs, features, readers)
    found = dict[str, dict[str, list[float]]]()
    for number, ((_, right), (left, _)) in enumerate(zip(pairs, reference.sides, strict=True), 1):
        for rung in rungs(right, text.decode, number):
            values = found.setdefault(rung.name, {name: [] for name in distances})
            read = reference.read(rung)
            for name, distance in distances.items():
                values[name].append(distance(read, left, number))
    return {rung: {name: Spread(tuple(line)) for name, line in values.items()} for rung, values in found.items()}
