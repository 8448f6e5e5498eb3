import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.errors import CdlmError
from cdlm.evaluation.metrics.diversity import (
    distinct_n,
    duplicate_rate,
    empty_rate,
    sample_entropy,
    self_bleu,
    unigram_entropy,
    zipf_coefficient,
)

CORPORA = st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=6)


def test_distinct_n_counts_ngrams_inside_texts():
    assert distinct_n([[1, 2, 1, 2]], 1) == 2 / 4
    assert distinct_n([[1, 2, 1, 2]], 2) == 2 / 3  # 12, 21, 12
    assert distinct_n([[1, 2], [2, 1]], 2) == 1.0  # 22 would cross the texts
    assert distinct_n([[7] * 10] * 10, 3) == 1 / 80
    assert math.isnan(distinct_n([[1, 2], []], 3))


@given(CORPORA, st.integers(1, 3))
def test_distinct_n_is_a_share_and_never_rises_when_the_corpus_is_doubled(corpus, n):
    value = distinct_n(corpus, n)
    if math.isnan(value):
        return
    assert 0 < value <= 1
    assert distinct_n(corpus * 2, n) == pytest.approx(value / 2)


def test_entropies_of_known_corpora():
    assert unigram_entropy([[0, 1, 2, 3]]) == pytest.approx(math.log(4))
    assert unigram_entropy([[0, 0, 0, 1]]) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert unigram_entropy([[5, 5], [5]]) == 0
    assert sample_entropy([[0, 1], [2, 2]]) == pytest.approx(math.log(2) / 2)
    assert sample_entropy([[0, 1], []]) == pytest.approx(math.log(2) / 2)
    assert math.isnan(unigram_entropy([[]]))
    assert math.isnan(sample_entropy([]))


def test_each_entropy_sees_its_own_collapse():
    same_text = [[0, 1, 2, 3]] * 4
    one_token_each = [[i] * 4 for i in range(4)]
    assert unigram_entropy(same_text) == pytest.approx(unigram_entropy(one_token_each)) == pytest.approx(math.log(4))
    assert sample_entropy(same_text) > 1
    assert sample_entropy(one_token_each) == 0


@given(CORPORA, st.permutations(range(6)))
def test_renaming_tokens_changes_nothing(corpus, names):
    renamed = [[names[token] for token in tokens] for tokens in corpus]
    for measure in (unigram_entropy, sample_entropy, zipf_coefficient, lambda c: distinct_n(c, 2)):
        assert measure(renamed) == pytest.approx(measure(corpus), nan_ok=True)


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, 1.5])
def test_zipf_coefficient_recovers_the_power(power):
    counts = (1e6 / np.arange(1, 41) ** power).astype(int) if power else np.full(40, 50)
    assert zipf_coefficient([[token] * (count // 1000 or 1) for token, count in enumerate(counts)]) == pytest.approx(
        power, abs=0.05
    )


def test_zipf_coefficient_of_two_ranks_is_exact():
    assert zipf_coefficient([[0] * 8 + [1] * 2]) == pytest.approx(2.0)  # ln(8/2) / ln(2/1)
    assert math.isnan(zipf_coefficient([[3, 3, 3]]))


def test_self_bleu_of_known_corpora():
    one = "the quick brown fox jumps over the lazy dog"
    assert self_bleu([one] * 5) == pytest.approx(100)
    assert self_bleu([one, "colourless green ideas sleep furiously", "", "it rained"]) < 1
    mixed = [f"{one} number {word}" for word in ("one", "two", "three", "four")]
    assert 50 < self_bleu(mixed) < 100
    assert math.isnan(self_bleu([one, "", " "]))


def test_self_bleu_is_decided_by_its_seed():
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(list("abcdef"), 8)) for _ in range(60)]
    first, same, other = (self_bleu(texts, sample=5, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_self_bleu_without_sacrebleu_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(CdlmError, match="pip install sacrebleu"):
        self_bleu(["a", "b"])


def test_duplicates_and_empties():
    texts = ["a", "b", "a", "a", "", " \n"]
    assert duplicate_rate(texts) == pytest.approx(2 / 6)
    assert empty_rate(texts) == pytest.approx(2 / 6)
    assert duplicate_rate(["a", "b"]) == 0
    assert empty_rate(["a"]) == 0
    assert math.isnan(duplicate_rate([]))
    assert math.isnan(empty_rate([]))
