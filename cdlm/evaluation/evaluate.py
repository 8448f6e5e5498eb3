"""Samples, real text, and real text without its order, under every metric at once.

No number stands alone. AR-NLL has the entropy beside it. MAUVE and the Fréchet distance have the value of real text
against real text, and those of real text whose tokens are shuffled, or drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cdlm.core.checks import Settings, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.files import plain
from cdlm.core.parallel import workers_on
from cdlm.core.ranks import Group
from cdlm.core.stats import RESAMPLES
from cdlm.evaluation.judge import Judge, Readers
from cdlm.evaluation.metrics import diversity
from cdlm.evaluation.metrics import mauve as mauve_metric
from cdlm.evaluation.metrics.ar_nll import ArNll, ar_nll
from cdlm.evaluation.metrics.features import MOST_TOKENS, Features, NGrams
from cdlm.evaluation.metrics.reference import DISTANCES, Reference
from cdlm.evaluation.metrics.registry import METRICS, OF_THE_JUDGE, JudgedTexts
from cdlm.evaluation.table import Evaluation, Row
from cdlm.evaluation.texts import Corpus, Entry, RealText

ENTROPY_MARGIN = 0.1
"""Nats by which samples may stay under the entropy of real text before the table warns."""


@dataclass(frozen=True)
class Distances(Settings):
    """How sets of texts are compared with real text by their distribution.

    Args:
        features: what of the texts.
        splits: random splits of the real text; 0 leaves all distances out.
        mauve: compute MAUVE too, which needs the package mauve-text; by default if that is installed.
    """

    features: Features = field(default_factory=NGrams)
    splits: int = 5
    mauve: bool | None = None

    def __post_init__(self) -> None:
        check_whole("a comparison with real text", least=0, splits=self.splits)

    @property
    def with_mauve(self) -> bool:
        """Whether MAUVE is computed."""
        return mauve_metric.is_installed() if self.mauve is None else self.mauve

    @property
    def names(self) -> list[str]:
        """Keys of the columns."""
        return [name for name in DISTANCES if self.with_mauve or name != "mauve"]


@dataclass(frozen=True)
class Beside:
    """The real text that samples stand beside.

    Args:
        rows: sets of it, the held-out one first; what the AR-NLL and the entropy of samples are compared with is last.
        splits: pairs of disjoint sets that distances are computed from, of `RealText.splits`.
        decode: turns the generator's tokens into text.
        copied: share of a set's tokens that are copied from the training text, see `RealText.copied`.
    """

    rows: Sequence[Corpus]
    decode: Callable[[list[int]], str]
    splits: Sequence[tuple[Corpus, Corpus]] = ()
    copied: Callable[[Corpus], float | None] = lambda corpus: None

    @property
    def side(self) -> int:
        """Texts on each side of a split; 0 without splits."""
        return len(self.splits[0][0].texts) if self.splits else 0

    @staticmethod
    def of(text: RealText, count: int, splits: int) -> Beside:
        """Held-out text in `count` rows, and text like the training text in as many, or all there are.

        Raises:
            CdlmError: there is less held-out text.
        """
        rows = [text.corpus("held out", count)]
        if text.unread is not None:
            rows.append(text.corpus("like training", min(count, len(text.unread))))
        side = min(count, text.most)
        return Beside(rows, text.decode, text.splits(side, splits) if side and splits else (), text.copied)


def evaluate_files(
    files: Mapping[str, Sequence[Entry]],
    text: RealText,
    judges: Sequence[Callable[[str], Judge]],
    *,
    distances: Distances | None = None,
    device: str = "cpu",
    devices: int | Group = 1,
    notes: Sequence[str] = (),
) -> Evaluation:
    """The table of sets of texts, by name, beside real text; see `evaluate`.

    Args:
        files: equally many texts each, from `read_texts`.
        text: of the run that the texts are compared with.
        judges: each gives a judge on a device, once in each process, and only when all that can be checked without it
            is checked.
        device, devices: where the judges run, and on how many processes.
        notes: to stand under the table.

    Raises:
        CdlmError: there is too little held-out text, or a package is missing.
    """
    distances = Distances() if distances is None else distances
    if distances.splits and distances.with_mauve:
        mauve_metric.library()  # its absence is better known before the long work
    samples = [text.samples(name, entries) for name, entries in files.items()]
    encoded_anew = [
        f"{corpus.name} has tokens of another tokenizer: its texts were encoded anew."
        for corpus, entries in zip(samples, files.values(), strict=True)
        if corpus.foreign and any(entry.tokens is not None for entry in entries)
    ]
    beside = Beside.of(text, check_sizes(samples), distances.splits)
    pools = [workers_on(devices, opens, device) for opens in judges]
    try:
        readers = [Readers(opens(device), pool) for opens, pool in zip(judges, pools, strict=True)]
        return evaluate(samples, beside, readers, distances=distances, notes=[*notes, *encoded_anew])
    finally:
        for pool in pools:
            pool.close()


def evaluate(
    samples: Sequence[Corpus],
    beside: Beside,
    readers: Sequence[Readers],
    *,
    distances: Distances | None = None,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Measure sets of samples, real text, and held-out text with its tokens shuffled and drawn at random.

    Args:
        samples: what is judged, one row each, equally many texts each.
        beside: the real text.
        readers: the judges; the first one's numbers are compared with those of real text.
        distances: how to compare with the splits of `beside`.
        seed: of the shuffling, of the salad, and of the texts drawn for self-BLEU.
        notes: more of them, to stand first.

    Raises:
        CdlmError: nothing to evaluate, unequal numbers of samples, samples that are real text themselves, or two rows
            of one name.
    """
    count, distances = check_sizes(samples), Distances() if distances is None else distances
    held_out, target = beside.rows[0], beside.rows[-1]
    floors = [held_out.shuffled(beside.decode, seed), held_out.salad(beside.decode, seed)]
    corpora = [*samples, *beside.rows, *floors]
    _check_names(corpora)
    reference = _reference(corpora, beside, distances, readers[0])
    if reference is not None:
        for corpus in samples:
            reference.check_copies(corpus)
    far = [{**_distances(corpus, reference, distances), "copied": beside.copied(corpus)} for corpus in corpora]
    rows = [{**row, **more} for row, more in zip(_judged(corpora, readers, seed), far, strict=True)]
    real = rows[len(samples) + len(beside.rows) - 1]
    found = [note for row in rows[: len(samples)] for note in _notes(row, real, target.name)]
    settings: dict[str, Any] = {
        "texts": count, "seed": seed, "bootstrap": RESAMPLES, "entropy_margin": ENTROPY_MARGIN,
        "compared_with": target.name,
        "self_bleu": {"scored": diversity.BLEU_SCORED, "references_from": diversity.BLEU_POOL},
        "distances": reference and _settings(reference, corpora, distances, readers[0].judge),
    }  # fmt: skip
    return Evaluation(
        tuple(reader.judge.describe() for reader in readers),
        settings,
        tuple(plain(row) for row in rows),
        (*notes, *found, *_notes_of_distances(count, beside, distances)),
    )


def check_sizes(samples: Sequence[Corpus]) -> int:
    """How many texts each set of samples has, n.

    Raises:
        CdlmError: none, or not equally many.
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
    return count


def _check_names(corpora: Sequence[Corpus]) -> None:
    """Raise if two rows would have one name: the row of the reference is known by it."""
    names = [corpus.name for corpus in corpora]
    for name in names:
        if names.count(name) > 1:
            raise CdlmError(f"two rows of the table would be named {name!r}: give your texts another name")


# --- rows -------------------------------------------------------------------------------------------------------------


def _judged(corpora: Sequence[Corpus], readers: Sequence[Readers], seed: int) -> list[Row]:
    """The rows, without distances."""
    names = [reader.judge.name for reader in readers]
    if len(set(names)) < len(names):
        raise CdlmError(f"expected judges of different names, got {', '.join(names)}: give each once")
    rows = []
    for corpus in corpora:
        score, *others = (JudgedTexts(corpus, read_by(reader, corpus), seed) for reader in readers)
        judged = {
            name: {metric.key: metric.measure(other) for metric in OF_THE_JUDGE}
            for name, other in zip(names[1:], others, strict=True)
        }
        row: Row = {"name": corpus.name, "n": len(corpus.texts), **{m.key: m.measure(score) for m in METRICS}}
        if judged:
            row["judged"] = judged
        if clash := row.keys() & corpus.extra.keys():
            raise CdlmError(f"expected new names for extra columns, got {sorted(clash)}; rename them")
        rows.append({**row, **corpus.extra})
    return rows


def read_by(readers: Readers, corpus: Corpus) -> ArNll:
    """AR-NLL of texts, divided among the processes of a judge."""
    given = corpus.given or [[] for _ in corpus.texts]
    merged = ArNll.merge(readers.map(_ar_nll_of, list(zip(corpus.texts, given, strict=True))))
    return replace(merged, serial=corpus.serial)


def _ar_nll_of(judge: Judge, texts: Sequence[tuple[str, list[tuple[int, int]]]]) -> ArNll:
    return ar_nll(judge, [text for text, _ in texts], [given for _, given in texts])


def _reference(corpora: Sequence[Corpus], beside: Beside, distances: Distances, readers: Readers) -> Reference | None:
    if beside.side < mauve_metric.FEWEST_TEXTS:
        return None
    return Reference.of(beside.splits, distances.features.suited(corpora), readers)


def _distances(corpus: Corpus, reference: Reference | None, distances: Distances) -> Row:
    """The columns that need other texts. The row of the reference shows one side of it against the other."""
    if reference is None:
        return {}
    measures = {name: DISTANCES[name] for name in distances.names}
    own = corpus.name == reference.name
    found = reference.ceiling(measures) if own else reference.compare(corpus, measures)
    return {key: value for name, spread in found.items() for key, value in spread.columns(name).items()}


def _settings(reference: Reference, corpora: Sequence[Corpus], distances: Distances, judge: Judge) -> dict[str, Any]:
    found: dict[str, Any] = {
        "features": str(distances.features.suited(corpora)), "feature_tokens": min(MOST_TOKENS, judge.context),
        "reference": reference.name, "splits": len(reference.sides), "texts": reference.count,
    }  # fmt: skip
    return {**found, "mauve": mauve_metric.settings(reference.count) if distances.with_mauve else None}


def _notes(samples: Row, real: Row, name: str) -> list[str]:
    """Warnings; a NaN compares as false and warns of nothing."""
    notes = []
    for key, what in (("sample_entropy", "inside a sample"), ("unigram_entropy", "over all samples")):
        here, there = samples[key], real[key]
        if here < there - ENTROPY_MARGIN:
            notes.append(
                f"the entropy {what} is {there - here:.2f} nats under that of {name} ({here:.2f} against {there:.2f}): "
                "the samples are poorer, and a low AR-NLL is then no sign of quality."
            )
    if samples["ar_nll"] < real["ar_nll"]:
        notes.append(f"the samples' AR-NLL is under that of {name}: they are easier to predict, which is not better.")
    if samples["unscored"]:
        notes.append(
            f"{samples['unscored']} of {samples['n']} samples gave the judge nothing to score (empty or too short)."
        )
    return notes


def _notes_of_distances(count: int, beside: Beside, distances: Distances) -> list[str]:
    """What is left out of the distances, and warnings of too few texts."""
    if not distances.splits:
        return []
    side, fewest, enough = beside.side, mauve_metric.FEWEST_TEXTS, mauve_metric.ENOUGH_TEXTS
    if side < fewest:
        return [f"no MAUVE and no Fréchet distance: they need {fewest} texts a side, here are {side}."]
    notes, both = [], "MAUVE and the Fréchet distance"
    if distances.mauve is None and not distances.with_mauve:
        notes.append("MAUVE is left out: it is an extra under the GPL-3, pip install 'cdlm[mauve]'.")
    if side < count:
        notes.append(f"{both} are of {side} of the {count} texts: for two sides, the real text has no more.")
    if side < enough:
        notes.append(
            f"{both} are of {side} texts a side and want {enough}: with few texts both are pushed up, and small"
            " differences cannot be seen."
        )
    return notes
