"""Ways to sample beside each other, each drawn at several temperatures: what a way costs, at equal sharpness.

One temperature is a trap: whatever sharpens the samples lowers their AR-NLL, and a plain sampler sharpens too when its
temperature is lowered. So a way is a curve, AR-NLL over the entropy inside a sample, and ways are compared where their
entropies meet (CANDI, arXiv 2510.22510, does so by eye). Two such comparisons are made.

The first takes the rival's best temperature where its samples are as sharp as the point's: entropies within `BAND`, and
Fréchet distances to real text within a factor of `DISTANCE_BAND`, since on simple text a temperature moves the entropy
inside a sample by less than its noise, and the distance by more. It is paired, and hard on the point, for the rival may
be the sharper one inside the bands. The second moves the rival along its curve to the very entropy of the point. A
curve is steep, often ten nats of AR-NLL for one of entropy, and the noise of the entropies is in its interval: it is
wide. Draw all ways at the same temperatures; a rival whose sharpest one decides might be better still at a lower one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from cdlm.core.errors import CdlmError
from cdlm.core.progress import progress
from cdlm.core.stats import Bootstrap, Scores
from cdlm.evaluation.bench import FEWEST_ROWS, SPLITS
from cdlm.evaluation.evaluate import read_by
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.metrics.diversity import sample_entropy
from cdlm.evaluation.metrics.features import NGrams
from cdlm.evaluation.metrics.reference import DISTANCES, Reference
from cdlm.evaluation.metrics.registry import METRICS, JudgedTexts
from cdlm.evaluation.texts import Corpus, Entry, RealText

BAND = 0.02
"""Nats within which two entropies inside a sample count as equal."""
DISTANCE_BAND = 1.1
"""Factor within which two Fréchet distances count as equal."""
SAME_CALLS = 1.02
"""Calls count as equal up to this factor."""
SHOWN = ("unigram_entropy", "dist_3", "duplicate_rate", "mean_nfe")
"""Further columns of a point."""
SHOWN_OF_PROMPTED = ("unigram_entropy", "mean_nfe")
"""Those of samples with prompts: what is generated there are pieces, and no texts."""

Noise = tuple[int | None, int | None]
"""Seed and number of a sample."""


@dataclass(frozen=True)
class Drawn:
    """Samples of one way at one temperature.

    Args:
        way: its name.
        sampling: how the samples were drawn, in full; the halting rule too, if there is one.
        corpus: the texts, in the order of their noise.
        noise: of each sample.
    """

    way: str
    sampling: str
    corpus: Corpus
    noise: tuple[Noise, ...]


def drawn_from(way: str, entries: Sequence[Entry], corpus: Callable[[str, Sequence[Entry]], Corpus]) -> list[Drawn]:
    """The samples of a way, those that were drawn alike together.

    Args:
        corpus: makes entries a corpus, such as `RealText.samples`.

    Raises:
        CdlmError: samples that do not say how they were drawn, or a sample that is there twice.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.sampling is None or entry.seed is None or entry.index is None or entry.nfe is None:
            raise CdlmError(
                f"the samples of {way} do not say how they were drawn: give files of cdlm sample --out, which have"
                " sampling, seed, index and nfe of each"
            )
        rule = "" if entry.halt in (None, "Never()") else f", halt={entry.halt}"
        groups.setdefault(entry.sampling + rule, []).append(entry)
    found = []
    for sampling, members in groups.items():
        members = sorted(members, key=lambda entry: (entry.seed, entry.index))
        noise = tuple((entry.seed, entry.index) for entry in members)
        if len(set(noise)) < len(noise):
            raise CdlmError(f"{way} has a sample twice: its files hold {sampling} with the same seed and number")
        found.append(Drawn(way, sampling, corpus(way, members), noise))
    return found


@dataclass(frozen=True)
class Point:
    """A way at one temperature, measured.

    Args:
        entropies: of the tokens that were generated, inside each sample, in nats.
        nats: AR-NLL by judge, of all samples or of the first ones.
        columns: what else there is to say of it.
    """

    drawn: Drawn
    entropies: Scores
    nats: Mapping[str, Scores]
    columns: Mapping[str, Any]

    @property
    def calls(self) -> float:
        """Mean of a sample."""
        return float(np.mean(self.drawn.corpus.nfe or [np.nan]))

    def seen_by(self, judge: str) -> tuple[Bootstrap, Bootstrap]:
        """Entropy and AR-NLL of the samples that a judge read."""
        return self._seen[judge]

    @cached_property
    def _seen(self) -> dict[str, tuple[Bootstrap, Bootstrap]]:
        return {judge: (self.entropies.first(len(nats.total)).bootstrap(), nats.bootstrap())
                for judge, nats in self.nats.items()}  # fmt: skip


@dataclass(frozen=True)
class Match:
    """A point beside another way, at that way's best temperature of those that are as sharp as the point."""

    rival: str
    sampling: str
    """Of the rival, with its temperature."""
    calls: float
    ar_nll: float
    entropy: float
    difference: float
    """AR-NLL of the point less that of the rival: below 0 the point is better."""
    low: float
    high: float
    """95 % interval, bootstrap over samples of the same noise."""
    even: float | None
    """The same at the point's own entropy, between two temperatures; None where that is beyond the rival's curve."""
    even_low: float | None
    even_high: float | None
    """95 % interval, with the noise of the entropies."""
    sharpest: bool
    """Whether the rival is at its sharpest temperature, and may not have been drawn sharp enough."""


@dataclass(frozen=True)
class Saving:
    """What a point saves against all rivals."""

    way: str
    sampling: str
    judge: str
    calls: float
    hardest: Match | None
    """Of the rivals with at most as many calls, the one that is hardest to rule out; None without any."""
    as_good: Match | None
    """The rival with the fewest calls whose AR-NLL is not above that of the point; None if no rival is as good, or none
    was drawn with so few calls that it is not."""
    not_worse: Match | None
    """The same with the fewest calls that is not surely worse."""
    worse: float | None
    """The most calls of a rival below that, which is surely worse; None without any."""
    unmatched: tuple[str, ...]
    """Rivals that were not drawn as sharp as the point."""

    @property
    def saved(self) -> float | None:
        """Share of the calls of the rival that is as good."""
        return None if self.as_good is None else 1 - self.calls / self.as_good.calls

    @property
    def saved_surely(self) -> float | None:
        """Share of the calls of the rival that is not surely worse: the careful number. If that rival is surely better,
        the point stands between it and the next cheaper one, and the share is of the calls of the cheaper one."""
        if self.not_worse is None:
            return None
        if self.not_worse.low > 0 and self.worse is not None:
            return 1 - self.calls / self.worse
        return 1 - self.calls / self.not_worse.calls

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "saved": self.saved, "saved_surely": self.saved_surely}


@dataclass(frozen=True)
class Frontier:
    """Points of several ways under several judges.

    Args:
        points: of all ways.
        rivals: ways that all others are compared with.
        judges: their names.
        real: text like that the model was trained on, measured alike; None where the samples are no whole texts.

    Raises:
        CdlmError: a rival that is no way.
    """

    points: Sequence[Point]
    rivals: Sequence[str]
    judges: Sequence[str]
    real: Point | None = None

    def __post_init__(self) -> None:
        if missing := [name for name in self.rivals if name not in self.ways]:
            raise CdlmError(f"there is no way {missing[0]!r} to compare with: there is {', '.join(self.ways)}")

    @property
    def ways(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(point.drawn.way for point in self.points))

    def curve(self, way: str) -> list[Point]:
        """The points of a way, from low to high entropy."""
        own = [point for point in self.points if point.drawn.way == way]
        return sorted(own, key=self._entropy)

    def entropy(self, points: Sequence[Point]) -> float:
        """Inside a sample, the mean over points."""
        return float(np.mean([self._entropy(point) for point in points]))

    def _entropy(self, point: Point) -> float:
        return point.seen_by(self.judges[0])[0].value

    def savings(self) -> list[Saving]:
        """Of every point of every way that is no rival, under each judge."""
        points = [point for way in self.ways if way not in self.rivals for point in self.curve(way)]
        return [self.saving(point, judge) for point in points for judge in self.judges]

    def saving(self, point: Point, judge: str) -> Saving:
        """A point beside all rivals."""
        found = {rival: self.match(point, rival, judge) for rival in self.rivals}
        matches = [match for match in found.values() if match is not None]
        cheaper = [match for match in matches if match.calls <= SAME_CALLS * point.calls]
        not_worse = _least(point.calls, matches, [match for match in matches if match.high >= 0])
        worse = [match.calls for match in matches if not_worse is not None and match.calls < not_worse.calls]
        return Saving(
            point.drawn.way, point.drawn.sampling, judge, point.calls,
            hardest=max(cheaper, key=lambda match: match.high, default=None),
            as_good=_least(point.calls, matches, [match for match in matches if match.difference >= 0]),
            not_worse=not_worse, worse=max(worse, default=None),
            unmatched=tuple(rival for rival, match in found.items() if match is None),
        )  # fmt: skip

    def match(self, point: Point, rival: str, judge: str) -> Match | None:
        """A point beside a way; None where the way was not drawn as sharp."""
        entropy, ar_nll = point.seen_by(judge)
        curve = [(other, *other.seen_by(judge)) for other in self.curve(rival)]
        near = [each for each in curve if abs(each[1].value - entropy.value) <= BAND and _as_far(each[0], point)]
        if not near:
            return None
        best, there, nats = min(near, key=lambda each: each[2].value)
        difference = ar_nll - nats
        moved = _at([(h, nll) for _, h, nll in curve], entropy)
        even = None if moved is None else ar_nll - moved
        ends = (None, None, None) if even is None else (even.value, *even.interval95)
        return Match(
            rival, best.drawn.sampling, best.calls, nats.value, there.value, difference.value, *difference.interval95,
            *ends, sharpest=len(curve) > 1 and nats.value == min(nll.value for _, _, nll in curve),
        )  # fmt: skip


def _as_far(first: Point, second: Point) -> bool:
    """Whether both are about as far from real text; of too few samples nobody knows, and all are."""
    here, there = (point.columns.get("frechet") for point in (first, second))
    return here is None or there is None or max(here, there) <= DISTANCE_BAND * min(here, there)


def _least(calls: float, matches: Sequence[Match], passing: Sequence[Match]) -> Match | None:
    """The rival with the fewest calls that passes. It has to be known that fewer would not do: a rival with fewer calls
    fails, or it takes no more calls than the point itself."""
    best = min(passing, key=lambda match: match.calls, default=None)
    if best is None or best.calls <= SAME_CALLS * calls or any(match.calls < best.calls for match in matches):
        return best
    return None


def _at(curve: Sequence[tuple[Bootstrap, Bootstrap]], entropy: Bootstrap) -> Bootstrap | None:
    """AR-NLL of a curve of (entropy, AR-NLL) at an entropy, linear between two points; None beyond its ends.

    In each draw of the bootstrap the entropies differ a little from where they meet; the slope there corrects that.
    """
    points = sorted(curve, key=lambda point: point[0].value)
    for (h, nll), (next_h, next_nll) in pairwise(points):
        if h.value <= entropy.value <= next_h.value and h.value < next_h.value:
            share = (entropy.value - h.value) / (next_h.value - h.value)
            slope = (next_nll.value - nll.value) / (next_h.value - h.value)
            there, nats = ((1 - share) * a.draws + share * b.draws for a, b in ((h, next_h), (nll, next_nll)))
            value = (1 - share) * nll.value + share * next_nll.value
            return Bootstrap(value, nats + slope * (entropy.draws - there))
    return None


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    drawn: Sequence[Drawn], text: RealText, readers: Sequence[Readers], rivals: Sequence[str], *,
    few: int | None = None, shown: bool = False,
) -> Frontier:  # fmt: skip
    """Measure the samples of all ways.

    Args:
        drawn: as many samples each, of the same noise.
        text: of the run, that the Fréchet distance is to.
        readers: the judges.
        rivals: ways that the others are compared with.
        few: samples that judges after the first read; by default all.
        shown: show a bar.

    Raises:
        CdlmError: nothing to measure, samples of other noise, or a rival that is no way.
    """
    check_noise(drawn)
    whole = all(each.corpus.whole for each in drawn)
    reference = _reference(drawn, text, readers[0]) if whole else None
    points = [
        Point(each, _entropies(each.corpus), *_measured(each, readers, few, reference, text))
        for each in progress(drawn, total=len(drawn), label="points measured", shown=shown)
    ]
    real = _real(text, len(drawn[0].noise), readers, few, reference) if whole else None
    return Frontier(points, rivals, [reader.judge.name for reader in readers], real)


def _real(
    text: RealText, count: int, readers: Sequence[Readers], few: int | None, reference: Reference | None
) -> Point:
    """As many rows of the text that samples are compared with; their distance is that of real text to real text."""
    part = text.reference_part
    corpus = text.corpus(part, min(count, len(text.rows(part))))
    nats, columns = _measured(Drawn(corpus.name, "", corpus, ()), readers, few, None, text)
    if reference is not None:
        columns |= reference.ceiling({"frechet": DISTANCES["frechet"]})["frechet"].columns("frechet")
    return Point(Drawn(corpus.name, "", corpus, ()), _entropies(corpus), nats, columns)


def check_noise(drawn: Sequence[Drawn]) -> None:
    """Raise unless all samples are of the same noise and have the same prompts: differences are paired.

    Raises:
        CdlmError: they are not, or there are none.
    """
    if not drawn:
        raise CdlmError("there is nothing to measure: give folders with files of samples")
    for each in drawn[1:]:
        if each.noise != drawn[0].noise:
            raise CdlmError(
                f"the samples of {each.way} are not of the same seeds and numbers as those of {drawn[0].way}"
                f" ({len(each.noise)} and {len(drawn[0].noise)} samples): draw all ways with the same --n and --seed"
            )
        if _asked(each.corpus) != _asked(drawn[0].corpus):
            raise CdlmError(
                f"the samples of {each.way} have other prompts or lengths than those of {drawn[0].way}: draw all ways"
                " with the same --prompt, --length or --workload"
            )


def _reference(drawn: Sequence[Drawn], text: RealText, readers: Readers) -> Reference | None:
    side = min(len(drawn[0].noise), text.most)
    return Reference.of(text.splits(side, SPLITS), NGrams(), readers) if side >= FEWEST_ROWS else None


def _asked(corpus: Corpus) -> list[Any]:
    """What each text was to be: the tokens that were given, in their places, and its length. Of texts that do not know
    their tokens, the parts that were given."""
    lengths = corpus.lengths or [None] * len(corpus.texts)
    if not corpus.prompted:
        return lengths
    if corpus.generated is None:
        given = corpus.given or []
        return [[text[start:end] for start, end in spans] for text, spans in zip(corpus.texts, given, strict=True)]
    made = [{place for span in spans for place in range(*span)} for spans in corpus.generated]
    given = [
        [(place, token) for place, token in enumerate(line) if place not in there]
        for line, there in zip(corpus.tokens, made, strict=True)
    ]
    return list(zip(given, lengths, strict=True))


def _entropies(corpus: Corpus) -> Scores:
    each = np.array([sample_entropy([tokens]) for tokens in corpus.made()])
    return Scores(each, np.ones(len(each)))


def _measured(
    drawn: Drawn, readers: Sequence[Readers], few: int | None, reference: Reference | None, text: RealText
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """AR-NLL by judge, and the further columns."""
    first, *others = readers
    score = read_by(first, drawn.corpus)
    nats = {first.judge.name: score.scores}
    nats |= {reader.judge.name: read_by(reader, drawn.corpus.first(few)).scores for reader in others}
    shown = SHOWN_OF_PROMPTED if drawn.corpus.prompted else SHOWN
    made = JudgedTexts(replace(drawn.corpus, tokens=drawn.corpus.made()), score)
    columns = {m.key: m.measure(made) for m in METRICS if m.key in shown} | {"copied": text.copied(drawn.corpus)}
    if reference is not None:
        spread = reference.compare(drawn.corpus, {"frechet": DISTANCES["frechet"]})["frechet"]
        columns |= spread.columns("frechet")
    return nats, {**columns, **drawn.corpus.extra}
