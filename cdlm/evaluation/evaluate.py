"""Samples, held-out real text, and the same text with shuffled tokens, under every metric at once.

No number stands alone. AR-NLL has the entropy beside it, MAUVE its real-versus-real ceiling, and all rows have the same
number of texts, since most of these measures move with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from cdlm.core.errors import CdlmError
from cdlm.core.parallel import Workers, deal, interleaved
from cdlm.core.stats import RESAMPLES
from cdlm.evaluation.judge import Judge, features
from cdlm.evaluation.metrics import diversity
from cdlm.evaluation.metrics import mauve as mauve_metric
from cdlm.evaluation.metrics.ar_nll import ArNll, ar_nll
from cdlm.evaluation.metrics.registry import METRICS, JudgedTexts
from cdlm.evaluation.table import Evaluation, Row
from cdlm.evaluation.texts import Corpus, Entry, RealText, Value

T = TypeVar("T")

ENTROPY_MARGIN = 0.1
"""Nats by which samples may stay under the entropy of real text before the table warns."""

FEATURE_TOKENS = 256


def evaluate_files(
    files: Mapping[str, Sequence[Entry]],
    text: RealText,
    open_judge: Callable[[str], Judge],
    *,
    mauve_seeds: int = 5,
    device: str = "cpu",
    devices: int = 1,
) -> Evaluation:
    """The table of sets of texts, by name, beside held-out text; see `evaluate`.

    Args:
        files: equally many texts each, from `read_texts`.
        text: of the run that the texts are compared with.
        open_judge: gives the judge on a device, once in each process, and only when all that can be checked without it
            is checked.
        mauve_seeds: k-means seeds; 0 leaves MAUVE out.
        device, devices: where the judge runs, and on how many processes.

    Raises:
        CdlmError: there is too little held-out text, or the package of MAUVE is missing.
    """
    samples = [text.samples(name, entries) for name, entries in files.items()]
    count = len(samples[0].texts)
    real, reference = text.corpus("held out", count), None
    if mauve_seeds:
        left, reference = text.splits(count, 1)[0]
        real = real if text.unread else replace(left, name=real.name, extra=real.extra)
    check_sizes(samples, real, reference)
    with Workers(open_judge, devices, device) as workers:
        return evaluate(
            samples, real, open_judge(device), decode=text.decode, mauve_reference=reference,
            mauve_seeds=mauve_seeds, workers=workers,
        )  # fmt: skip


def evaluate(
    samples: Sequence[Corpus],
    real: Corpus,
    judge: Judge,
    *,
    decode: Callable[[list[int]], str],
    mauve_reference: Corpus | None = None,
    mauve_seeds: int = 5,
    seed: int = 0,
    workers: Workers[Judge] | None = None,
) -> Evaluation:
    """Measure sets of samples, held-out real text, and that text with shuffled tokens, equally many texts each.

    Args:
        samples: what is judged, one row each; the first sets the number of texts n, the others must have as many.
        real: held-out text, at least n; the first n are used.
        judge: see `Judge`.
        decode: turns the generator's tokens into text, for the shuffled row.
        mauve_reference: more real text, at least n, disjoint from `real`: every row's MAUVE is against its first n, so
            the row of real text shows the ceiling. None leaves MAUVE out.
        mauve_seeds: number of k-means seeds.
        seed: of the shuffling and of the texts drawn for self-BLEU.
        workers: further processes with the same judge; they change the result by rounding alone.

    Raises CdlmError when there is less real text than samples, or nothing to evaluate.
    """
    count = check_sizes(samples, real, mauve_reference)
    real = real.first(count)
    corpora = [*samples, real, real.shuffled(decode, seed)]
    readers = _Readers(judge, workers)
    rows = [_row(corpus, readers.ar_nll(corpus), seed) for corpus in corpora]
    settings: dict[str, Any] = {
        "texts": count, "seed": seed, "bootstrap": RESAMPLES, "entropy_margin": ENTROPY_MARGIN,
        "feature_tokens": min(FEATURE_TOKENS, judge.context),
        "self_bleu": {"scored": diversity.BLEU_SCORED, "references_from": diversity.BLEU_POOL}, "mauve": None,
    }  # fmt: skip
    notes = [note for row in rows[: len(samples)] for note in _notes(row, rows[len(samples)])]
    if mauve_reference is not None and count < mauve_metric.FEWEST_TEXTS:
        notes.append(f"no MAUVE: it needs at least {mauve_metric.FEWEST_TEXTS} texts a side, here are {count}.")
    elif mauve_reference is not None:
        seeds = tuple(range(1, mauve_seeds + 1))
        settings["mauve"] = _add_mauve(rows, corpora, mauve_reference.first(count), seeds, readers.features)
    return Evaluation(judge.describe(), settings, tuple(_without_nan(row) for row in rows), tuple(notes))


def check_sizes(samples: Sequence[Corpus], real: Corpus, reference: Corpus | None) -> int:
    """How many texts each set of samples has, n.

    Raises:
        CdlmError: none, or not equally many; less real text; or MAUVE is to be computed and its package is missing.
    """
    count = len(samples[0].texts) if samples else 0
    if count == 0:
        raise CdlmError("expected at least one sample to evaluate, got none")
    for corpus in samples[1:]:
        if len(corpus.texts) != count:
            raise CdlmError(
                f"expected {count} texts in {corpus.name!r} as in {samples[0].name!r}, got {len(corpus.texts)}: most"
                " measures move with the number of texts; draw equally many"
            )
    for corpus in (real, reference):
        if corpus is not None and len(corpus.texts) < count:
            raise CdlmError(
                f"expected at least {count} texts in {corpus.name!r}, as many as samples, got {len(corpus.texts)}; "
                "pass more real text or fewer samples"
            )
    if reference is not None:
        mauve_metric.library()  # its absence is better known before the long work
    return count


def _row(corpus: Corpus, score: ArNll, seed: int) -> Row:
    texts = JudgedTexts(corpus, score, seed)
    row: Row = {
        "name": corpus.name, "n": len(corpus.texts), **{metric.key: metric.measure(texts) for metric in METRICS},
    }  # fmt: skip
    if clash := row.keys() & corpus.extra.keys():
        raise CdlmError(f"expected new names for extra columns, got {sorted(clash)}; rename them")
    return {**row, **corpus.extra}


def _add_mauve(
    rows: list[Row],
    corpora: list[Corpus],
    reference: Corpus,
    seeds: tuple[int, ...],
    features_of: Callable[[Corpus], np.ndarray],
) -> dict[str, Any]:
    """Fill in MAUVE of every row against the reference; returns the settings behind the numbers."""
    target = features_of(reference)
    settings: dict[str, Any] = {}
    for row, corpus in zip(rows, corpora, strict=True):
        result = mauve_metric.mauve(features_of(corpus), target, seeds)
        row["mauve"], row["mauve_sd"], settings = result.mean, result.sd, result.settings
    return {**settings, "reference": reference.name}


def _notes(samples: Row, real: Row) -> list[str]:
    """Warnings; a NaN compares as false and warns of nothing."""
    notes = []
    for key, what in (("sample_entropy", "inside a sample"), ("unigram_entropy", "over all samples")):
        here, there = samples[key], real[key]
        if here < there - ENTROPY_MARGIN:
            notes.append(
                f"the entropy {what} is {there - here:.2f} nats under real text's ({here:.2f} against {there:.2f}): "
                "the samples are poorer, and a low AR-NLL is then no sign of quality."
            )
    if samples["ar_nll"] < real["ar_nll"]:
        notes.append("the samples' AR-NLL is under that of real text: they are easier to predict, which is not better.")
    if samples["unscored"]:
        notes.append(
            f"{samples['unscored']} of {samples['n']} samples gave the judge nothing to score (empty or too short)."
        )
    return notes


def _without_nan(row: Row) -> Row:
    def finite(value: Value) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    return {
        key: [entry if finite(entry) else None for entry in value]
        if isinstance(value, list)
        else (value if finite(value) else None)
        for key, value in row.items()
    }


# --- the judge on several processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Readers:
    """A judge, here and on further processes: each reads every N-th text."""

    judge: Judge
    workers: Workers[Judge] | None

    def ar_nll(self, corpus: Corpus) -> ArNll:
        given = corpus.given or [[] for _ in corpus.texts]
        merged = ArNll.merge(self._map(_ar_nll, list(zip(corpus.texts, given, strict=True))))
        return replace(merged, serial=corpus.serial)

    def features(self, corpus: Corpus) -> Float[np.ndarray, "m w"]:
        return interleaved(self._map(features, corpus.texts))

    def _map(self, work: Callable[[Judge, Any], T], items: Sequence[Any]) -> list[T]:
        if self.workers is None:
            return [work(self.judge, items)]
        return self.workers.map(work, self.judge, deal(items, len(self.workers)))


def _ar_nll(judge: Judge, texts: Sequence[tuple[str, list[tuple[int, int]]]]) -> ArNll:
    return ar_nll(judge, [text for text, _ in texts], [given for _, given in texts])
