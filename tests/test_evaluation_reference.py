"""Distances to splits of real text: known values of the Fréchet distance, and what may be compared."""

import math

import numpy as np
import pytest
from evaluation_toys import random_judge
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.errors import CdlmError
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.metrics.features import NGrams
from cdlm.evaluation.metrics.frechet import WIDEST, frechet, relative_frechet
from cdlm.evaluation.metrics.reference import DISTANCES, Reference, Spread
from cdlm.evaluation.texts import Corpus

ONLY_FRECHET = {"frechet": DISTANCES["frechet"]}


def exact(mean: list[float], deviations: list[float]) -> np.ndarray:
    """Vectors with exactly this mean and a diagonal covariance with these deviations."""
    d = len(mean)
    corners = np.concatenate([np.eye(d), -np.eye(d)]) * np.sqrt((2 * d - 1) / 2)
    return corners * deviations + mean


def test_equal_sets_are_at_distance_zero() -> None:
    p = np.random.default_rng(0).normal(size=(50, 6))
    assert frechet(p, p[::-1]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("means", "deviations", "expected"),
    [
        (([0, 0], [3, 4]), ([1, 1], [1, 1]), 25),
        (([0, 0], [0, 0]), ([1, 2], [3, 2]), 4),
        (([1, 0, 2], [1, 1, 0]), ([1, 2, 0], [2, 2, 3]), 5 + 1 + 9),
    ],
)
def test_gaussians_of_diagonal_covariance_have_a_known_distance(means, deviations, expected) -> None:
    """|m_p - m_q|^2 + sum (s_p - s_q)^2."""
    p, q = (exact(list(mean), list(deviation)) for mean, deviation in zip(means, deviations, strict=True))
    assert frechet(p, q) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 10**6))
def test_the_distance_is_one(seed: int) -> None:
    """Symmetric, not negative, the same after rotating and shifting both sides, and four times at twice the size."""
    draw = np.random.default_rng(seed)
    p, q = draw.normal(size=(12, 4)), draw.normal(size=(9, 4)) @ draw.normal(size=(4, 4)) + 1
    rotation = np.linalg.qr(draw.normal(size=(4, 4)))[0]
    value = frechet(p, q)
    assert value > 0
    assert frechet(q, p) == pytest.approx(value, rel=1e-6)
    assert frechet(p @ rotation + 5, q @ rotation + 5) == pytest.approx(value, rel=1e-6)
    assert frechet(2 * p, 2 * q) == pytest.approx(4 * value, rel=1e-6)
    assert relative_frechet(2 * p, 2 * q) == pytest.approx(relative_frechet(p, q), rel=1e-6)


def test_fewer_texts_than_dimensions_are_no_trouble() -> None:
    p, q = (np.random.default_rng(seed).normal(size=(5, 40)) for seed in (0, 1))
    assert 0 < frechet(p, q) < 200
    assert frechet(np.ones((4, 3)), np.ones((6, 3))) == pytest.approx(0, abs=1e-12)
    assert math.isnan(relative_frechet(p, np.ones((6, 40))))
    with pytest.raises(CdlmError, match="two texts a side"):
        frechet(p[:1], q)


def test_wide_features_are_projected() -> None:
    p, q = (np.random.default_rng(seed).normal(size=(3000, 2 * WIDEST)) + 0.5 * seed for seed in (0, 1))
    exactly = frechet(p, q) / q.var(0, ddof=1).sum()
    assert relative_frechet(p, q) == pytest.approx(exactly, rel=0.35)
    assert relative_frechet(p, q) == relative_frechet(p, q)


def test_a_spread_has_a_mean_and_a_deviation() -> None:
    spread = Spread((1.0, 2.0, 3.0))
    assert spread.columns("x") == {"x": 2, "x_sd": 1}
    assert math.isnan(Spread((1.0,)).sd)


def words(count: int, seed: int, kinds: int = 30) -> Corpus:
    draw = np.random.default_rng(seed)
    lines = draw.integers(1, kinds, (count, 12)).tolist()
    return Corpus(f"words {seed}", lines, [" ".join(map(str, line)) for line in lines])


def reference(texts: int = 40, times: int = 3) -> Reference:
    splits = [(words(texts, 2 * k), words(texts, 2 * k + 1)) for k in range(times)]
    return Reference.of(splits, NGrams((1,), 16), Readers(random_judge()))


def test_texts_are_compared_with_the_left_sides() -> None:
    found = reference()
    other = words(40, 99, kinds=15)
    near, far = (found.compare(corpus, ONLY_FRECHET)["frechet"] for corpus in (words(40, 98), other))
    assert len(near.values) == 3
    features = found.read(other)
    assert far.values == tuple(relative_frechet(features, left) for left, _ in found.sides)
    ceiling = found.ceiling(ONLY_FRECHET)["frechet"]
    assert ceiling.values == tuple(relative_frechet(right, left) for left, right in found.sides)
    assert far.mean > 2 * near.mean
    assert abs(near.mean - ceiling.mean) < 0.1 * far.mean


def test_more_texts_are_cut_to_equal_sides_and_fewer_are_refused() -> None:
    found, more = reference(), words(90, 97)
    cut = more.some(40, seed=0)
    assert len(cut.texts) == 40
    assert found.compare(more, ONLY_FRECHET) == found.compare(cut, ONLY_FRECHET)
    assert cut.texts == [text for text in more.texts if text in set(cut.texts)]
    with pytest.raises(CdlmError, match="at least 40 texts in 'words 96', got 30"):
        found.compare(words(30, 96), ONLY_FRECHET)


def test_texts_of_the_reference_are_refused() -> None:
    found, fresh, old = reference(), words(40, 95), words(40, 1)
    with pytest.raises(CdlmError, match="100% of the texts of 'words 1' are also in the words 0") as caught:
        found.check_copies(old)
    assert "\n" not in str(caught.value)
    half = Corpus("half", fresh.tokens[:20] + old.tokens[:20], fresh.texts[:20] + old.texts[:20])
    found.check_copies(half)
    most = Corpus("most", fresh.tokens[:19] + old.tokens[:21], fresh.texts[:19] + old.texts[:21])
    with pytest.raises(CdlmError, match="52% of the texts"):
        found.check_copies(most)


def test_mauve_takes_the_number_of_the_split_as_its_seed() -> None:
    pytest.importorskip("mauve", reason="mauve-text is optional")
    found = reference()
    features = found.read(words(40, 98))
    expected = tuple(DISTANCES["mauve"](features, left, k) for k, (left, _) in enumerate(found.sides, 1))
    assert found.compare(words(40, 98))["mauve"].values == expected
