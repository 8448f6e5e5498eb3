"""The table: samples, held-out real text, and the same text with shuffled tokens, under every metric at once.

No number stands alone. AR-NLL has the entropy beside it, MAUVE its real-versus-real ceiling, and all rows have the same
number of texts, since most of these measures move with it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_text
from cdlm.evaluation.judge import Judge, features
from cdlm.evaluation.metrics import diversity
from cdlm.evaluation.metrics import mauve as mauve_metric
from cdlm.evaluation.metrics.ar_nll import RESAMPLES, ArNll, Spans, ar_nll

Value = str | int | float | None
Row = dict[str, Any]
Score = Callable[[Judge, list[str], Spans | None], ArNll]
Feature = Callable[[Judge, list[str]], np.ndarray]

ENTROPY_MARGIN = 0.1
"""Nats by which samples may stay under the entropy of real text before the table warns."""

FEATURE_TOKENS = 256


@dataclass(frozen=True)
class Corpus:
    """Texts of one origin, in the order of their tokens.

    Attributes:
        name: heading of the row.
        tokens: the generator's own token ids of each text, without padding.
        texts: the decoded texts.
        given: character spans of each text that came from a prompt and are not scored; None for no prompts.
        nfe: model calls spent on each text; None where nothing was generated.
        extra: more columns of this row, by name (grammar rate, steps, ...).
    """

    name: str
    tokens: list[list[int]]
    texts: list[str]
    given: Spans | None = None
    nfe: list[int] | None = None
    extra: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("tokens", "given", "nfe"):
            part = getattr(self, what)
            if part is not None and len(part) != len(self.texts):
                count = len(self.texts)
                raise CdlmError(f"expected {what} for each of the {count} texts of {self.name!r}, got {len(part)}")

    def first(self, count: int) -> "Corpus":
        """The first `count` texts with all that belongs to them."""
        return replace(
            self,
            tokens=self.tokens[:count],
            texts=self.texts[:count],
            given=None if self.given is None else self.given[:count],
            nfe=None if self.nfe is None else self.nfe[:count],
        )

    def shuffled(self, decode: Callable[[list[int]], str], seed: int) -> "Corpus":
        """The same tokens in random order inside each text; scored whole, since no prompt keeps its place."""
        draw = np.random.default_rng(seed)
        tokens = [draw.permutation(np.array(line, dtype=np.int64)).tolist() for line in self.tokens]
        return Corpus(f"{self.name}, tokens shuffled", tokens, [decode(line) for line in tokens])


@dataclass(frozen=True)
class Evaluation:
    """A finished table: the judge, the settings, one dictionary a row, and warnings in plain words."""

    judge: Mapping[str, Value]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what cannot be computed is None, never NaN. `steps` is that of the first row."""
        return {
            "steps": self.rows[0].get("steps"),
            "judge": dict(self.judge),
            "settings": self.settings,
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """Two Markdown tables, the notes, and the line that names judge and settings."""
        tables = [_markdown_table(lines) for lines in _two_tables(self.rows)]
        notes = [f"> **Note:** {note}" for note in self.notes]
        return "\n\n".join([*tables, *notes, self._footer()]) + "\n"

    def terminal(self) -> str:
        """The same as aligned plain text."""
        tables = [_aligned_table(lines) for lines in _two_tables(self.rows)]
        notes = [f"note: {note}" for note in self.notes]
        return "\n\n".join([*tables, *notes, self._footer()])

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.json` and `evaluation.md` into `folder`, each whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(folder) / "evaluation.json", text + "\n")
        write_text(Path(folder) / "evaluation.md", self.markdown())

    def _footer(self) -> str:
        judge, size = self.judge, f"{int(self.judge['parameters'] or 0) / 1e6:.1f} M parameters"
        revision = f", revision {judge['revision']}" if judge["revision"] else ""
        return (
            f"Judge: {judge['name']} ({size}, {judge['dtype']}{revision}). AR-NLL in nats per judge token, "
            "95 % interval over texts; H, entropy of the generator's tokens in nats; MAUVE on features of this judge, "
            "± sd over k-means seeds; the MAUVE of real text is the ceiling. "
            "Compare only with the same judge, settings and number of texts."
        )


def evaluate(
    samples: Sequence[Corpus],
    real: Corpus,
    judge: Judge,
    *,
    decode: Callable[[list[int]], str],
    mauve_reference: Corpus | None = None,
    mauve_seeds: int = 5,
    seed: int = 0,
    score: Score = ar_nll,
    feature: Feature = features,
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
        score, feature: how the judge is asked; others may spread the same work over processes.

    Raises CdlmError when there is less real text than samples, or nothing to evaluate.
    """
    count = _check_sizes(samples, real, mauve_reference)
    real = real.first(count)
    corpora = [*samples, real, real.shuffled(decode, seed)]
    rows = [_row(corpus, score(judge, corpus.texts, corpus.given), seed) for corpus in corpora]
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
        settings["mauve"] = _add_mauve(rows, corpora, mauve_reference.first(count), seeds, partial(feature, judge))
    return Evaluation(judge.describe(), settings, tuple(_without_nan(row) for row in rows), tuple(notes))


def _check_sizes(samples: Sequence[Corpus], real: Corpus, reference: Corpus | None) -> int:
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
        mauve_metric.library()  # say that it is missing before the long work, not after
    return count


def _row(corpus: Corpus, score: ArNll, seed: int) -> Row:
    row: Row = {
        "name": corpus.name,
        "n": len(corpus.texts),
        "ar_nll": score.nats_per_token,
        "ar_nll_ci": list(score.interval95),
        "bits_per_char": score.bits_per_char,
        "judge_tokens": score.tokens,
        "unscored": score.unscored,
        "unigram_entropy": diversity.unigram_entropy(corpus.tokens),
        "sample_entropy": diversity.sample_entropy(corpus.tokens),
        "mauve": None,
        "mauve_sd": None,
        "mean_nfe": float(np.mean(corpus.nfe)) if corpus.nfe else None,
        **{f"dist_{n}": diversity.distinct_n(corpus.tokens, n) for n in (1, 2, 3)},
        "self_bleu": diversity.self_bleu(corpus.texts, seed=seed),
        "zipf": diversity.zipf_coefficient(corpus.tokens),
        "mean_tokens": float(np.mean([len(line) for line in corpus.tokens])),
        "duplicate_rate": diversity.duplicate_rate(corpus.texts),
        "empty_rate": diversity.empty_rate(corpus.texts),
    }
    if clash := row.keys() & corpus.extra.keys():
        raise CdlmError(f"expected new names for extra columns, got {sorted(clash)}; rename them")
    return {**row, **corpus.extra}


def _add_mauve(
    rows: list[Row],
    corpora: list[Corpus],
    reference: Corpus,
    seeds: tuple[int, ...],
    feature: Callable[..., np.ndarray],
) -> dict[str, Any]:
    """Fill in MAUVE of every row against the reference; returns the settings behind the numbers."""
    target = feature(reference.texts)
    settings: dict[str, Any] = {}
    for row, corpus in zip(rows, corpora, strict=True):
        result = mauve_metric.mauve(feature(corpus.texts), target, seeds)
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


# --- how numbers look -------------------------------------------------------------------------------------------------

FIRST = {
    "name": "texts", "n": "n", "ar_nll": "AR-NLL", "bits_per_char": "bits/char", "sample_entropy": "H sample",
    "unigram_entropy": "H corpus", "mauve": "MAUVE", "mean_nfe": "calls",
}  # fmt: skip
SECOND = {
    "name": "texts", "dist_1": "dist-1", "dist_2": "dist-2", "dist_3": "dist-3", "self_bleu": "self-BLEU",
    "zipf": "Zipf", "mean_tokens": "tokens", "duplicate_rate": "duplicate", "empty_rate": "empty",
}  # fmt: skip
HIDDEN = {"ar_nll_ci", "mauve_sd", "judge_tokens", "unscored"}
PERCENT = {"duplicate_rate", "empty_rate", "halted", "grammar"}
DECIMALS = {"mauve": 3, "dist_1": 3, "dist_2": 3, "dist_3": 3, "self_bleu": 1, "mean_nfe": 1, "mean_tokens": 1}


def _two_tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Quality and entropy first, diversity and extra columns second; each a heading line and one line a row."""
    extra = [key for row in rows for key in row if key not in FIRST.keys() | SECOND.keys() | HIDDEN]
    second = {**SECOND, **{key: key.replace("_", " ") for key in extra}}
    return [[list(names.values()), *[[_cell(row, key) for key in names] for row in rows]] for names in (FIRST, second)]


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    text = f"{100 * value:.1f} %" if key in PERCENT else f"{value:.{DECIMALS.get(key, 2)}f}"
    interval, sd = row.get("ar_nll_ci"), row.get("mauve_sd")
    if key == "ar_nll" and interval and None not in interval:
        text += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    if key == "mauve" and sd is not None:
        text += f" ± {sd:.3f}"
    return text


def _markdown_table(lines: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    ruler = [":--"] + ["--:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ruler, *body])


def _aligned_table(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    head, *body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    ]
    return "\n".join([head, "─" * (sum(widths) + 2 * len(widths) - 2), *body])
