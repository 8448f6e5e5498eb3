"""The columns of the table. A new metric is a function in a file of this folder, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdlm.evaluation.metrics import diversity
from cdlm.evaluation.metrics.ar_nll import ArNll
from cdlm.evaluation.texts import Corpus


@dataclass(frozen=True)
class JudgedTexts:
    """What a metric is computed from.

    Args:
        corpus: texts, tokens, and what is known of how they were made.
        score: AR-NLL of the texts.
        seed: of what is drawn at random.
    """

    corpus: Corpus
    score: ArNll
    seed: int = 0


@dataclass(frozen=True)
class Metric:
    """One number of a set of texts, and its column.

    Args:
        key: its name in evaluation.json. `KEY_ci` and `KEY_sd` are shown beside it: an interval, a deviation.
        heading: of the column; empty leaves it out of the tables.
        measure: computes it; NaN or None where there is nothing to compute it from.
        decimals: that are shown.
        percent: show it as a percentage.
        quality: show it in the first table, that of quality; the second is that of diversity.
    """

    key: str
    heading: str
    measure: Callable[[JudgedTexts], Any]
    decimals: int = 2
    percent: bool = False
    quality: bool = False

    def show(self, row: dict[str, Any]) -> str:
        """Its cell in the table."""
        value, interval, sd = (row.get(key) for key in (self.key, f"{self.key}_ci", f"{self.key}_sd"))
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        text = f"{100 * value:.1f} %" if self.percent else f"{value:.{self.decimals}f}"
        if interval and None not in interval:
            text += f" [{interval[0]:.{self.decimals}f}, {interval[1]:.{self.decimals}f}]"
        return text if sd is None else f"{text} ± {sd:.{self.decimals}f}"


def _mean_calls(of: JudgedTexts) -> float | None:
    return float(np.mean(of.corpus.nfe)) if of.corpus.nfe else None


def _mean_tokens(of: JudgedTexts) -> float:
    return float(np.mean([len(line) for line in of.corpus.tokens]))


AR_NLL = Metric("ar_nll", "AR-NLL", lambda of: of.score.nats_per_token, quality=True)
OF_THE_JUDGE = (
    AR_NLL,
    Metric("ar_nll_ci", "", lambda of: list(of.score.interval95)),
    Metric("bits_per_char", "bits/char", lambda of: of.score.bits_per_char, quality=True),
    Metric("judge_tokens", "", lambda of: of.score.tokens),
    Metric("unscored", "", lambda of: of.score.unscored),
)
"""What a judge says. The first judge's numbers are columns of the row, those of others stand under its name."""

METRICS = (
    *OF_THE_JUDGE,
    Metric("sample_entropy", "H sample", lambda of: diversity.sample_entropy(of.corpus.tokens), quality=True),
    Metric("mauve", "MAUVE", lambda of: None, decimals=3, quality=True),  # these need other texts: `evaluate` fills
    Metric("mauve_sd", "", lambda of: None),
    Metric("frechet", "Fréchet", lambda of: None, decimals=3, quality=True),
    Metric("frechet_sd", "", lambda of: None),
    Metric("mean_nfe", "calls", _mean_calls, decimals=1, quality=True),
    Metric("unigram_entropy", "H corpus", lambda of: diversity.unigram_entropy(of.corpus.tokens)),
    Metric("dist_1", "dist-1", lambda of: diversity.distinct_n(of.corpus.tokens, 1), decimals=3),
    Metric("dist_2", "dist-2", lambda of: diversity.distinct_n(of.corpus.tokens, 2), decimals=3),
    Metric("dist_3", "dist-3", lambda of: diversity.distinct_n(of.corpus.tokens, 3), decimals=3),
    Metric("self_bleu", "self-BLEU", lambda of: diversity.self_bleu(of.corpus.texts, seed=of.seed), decimals=1),
    Metric("zipf", "Zipf", lambda of: diversity.zipf_coefficient(of.corpus.tokens)),
    Metric("mean_tokens", "tokens", _mean_tokens, decimals=1),
    Metric("duplicate_rate", "duplicate", lambda of: diversity.duplicate_rate(of.corpus.texts), percent=True),
    Metric("copied", "copied", lambda of: None, percent=True),  # needs the training text: `evaluate` fills it
    Metric("empty_rate", "empty", lambda of: diversity.empty_rate(of.corpus.texts), percent=True),
)
