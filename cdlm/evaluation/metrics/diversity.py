"""Diversity: is the text rich, and are the texts different from each other? Each measure catches another failure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from cdlm.core.errors import CdlmError

ZIPF_RANKS = 5000
BLEU_POOL = 1000
BLEU_SCORED = 100


def distinct_n(token_lists: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the corpus, in 0..1; n-grams do not cross texts. NaN without n-grams.

    It falls with the size of the corpus, so compare equally many tokens only.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def unigram_entropy(token_lists: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the token frequencies of the whole corpus; NaN without tokens."""
    counts = Counter(token for tokens in token_lists for token in tokens)
    return _entropy(counts) if counts else math.nan


def sample_entropy(token_lists: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the token frequencies inside one text, mean over texts; an empty text has 0.

    Low when texts repeat themselves; blind to texts that repeat each other.
    """
    return float(np.mean([_entropy(Counter(tokens)) for tokens in token_lists])) if token_lists else math.nan


def _entropy(counts: Counter[int]) -> float:
    total = counts.total()
    return math.log(total) - sum(c * math.log(c) for c in counts.values()) / total if total else 0.0


def zipf_coefficient(token_lists: Sequence[Sequence[int]]) -> float:
    """Minus the slope of ln(count) on ln(rank) over the 5000 most frequent tokens; natural text is near 1.

    Least squares, each rank one point. NaN with fewer than two kinds of token.
    """
    counts = Counter(token for tokens in token_lists for token in tokens)
    ordered = np.array(sorted(counts.values(), reverse=True)[:ZIPF_RANKS], dtype=np.float64)
    if len(ordered) < 2:
        return math.nan
    x, y = np.log(np.arange(1, len(ordered) + 1)), np.log(ordered)
    x -= x.mean()
    return -float((x * y).sum() / (x * x).sum())


def self_bleu(texts: Sequence[str], sample: int = BLEU_SCORED, seed: int = 0) -> float:
    """BLEU of a text against all other texts as references, 0..100, mean over texts; 100 when texts repeat each other.

    Sentence BLEU-4 of sacrebleu (13a words, exponential smoothing, effective order). To bound the cost, 1000 texts are
    drawn and `sample` of these are scored against the other 999, about 5 s for short texts. The value grows with the
    number of references: compare equally many texts only. Empty texts are left out here (see `empty_rate`); NaN with
    fewer than two others.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise CdlmError(
            f"expected the package sacrebleu for self-BLEU, got: {error}; install it with `pip install sacrebleu`"
        ) from error
    filled = [text for text in texts if text.strip()]
    if len(filled) < 2:
        return math.nan
    order = np.random.default_rng(seed).permutation(len(filled))[:BLEU_POOL]
    pool = [filled[i] for i in order]
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, pool[:i] + pool[i + 1 :]).score for i, text in enumerate(pool[:sample])]
    return min(100.0, float(np.mean(scores)))  # sacrebleu rounds a perfect match to a hair over 100


def duplicate_rate(texts: Sequence[Hashable]) -> float:
    """Share of texts that are equal to an earlier one, 0..1; NaN without texts."""
    return 1 - len(set(texts)) / len(texts) if texts else math.nan


def empty_rate(texts: Sequence[str]) -> float:
    """Share of texts that are empty or white space, 0..1; NaN without texts."""
    return sum(not text.strip() for text in texts) / len(texts) if texts else math.nan
