"""Bootstraps in blocks, and bounds that hold for any number of samples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.stats import (
    APART,
    Bootstrap,
    Scores,
    binomial_tail,
    block_length,
    bootstrap,
    hoeffding_bentkus,
    upper_bound,
)


def autoregression(samples: int, correlation: float, seed: int) -> np.ndarray:
    """A series of unit variance whose neighbours have this correlation."""
    rng, values = np.random.default_rng(seed), np.zeros(samples)
    for i, step in enumerate(rng.normal(size=samples)):
        values[i] = correlation * (values[i - 1] if i else 0) + step * math.sqrt(1 - correlation**2)
    return values


def deviation(values: np.ndarray, serial: bool) -> float:
    return float(Scores(values, np.ones(len(values)), serial).bootstrap().draws.std())


def test_the_error_of_a_correlated_mean_is_seen_in_blocks_and_missed_without():
    truth = math.sqrt((1 + 0.8) / (1 - 0.8) / 400)
    series = [autoregression(400, 0.8, seed) for seed in range(40)]
    blocks, single = (np.mean([deviation(values, serial) for values in series]) for serial in (True, False))
    assert 0.7 * truth < blocks < 1.1 * truth
    assert single < 0.4 * truth


def test_independent_samples_are_drawn_one_by_one():
    lengths = [block_length(autoregression(400, 0.0, seed)) for seed in range(60)]
    assert np.mean(lengths) < 1.5


@pytest.mark.parametrize("samples", [1, 2, 9, 10, 11, 30, 400])
def test_a_block_is_never_longer_than_a_third_of_the_series(samples):
    values = np.cumsum(np.random.default_rng(1).normal(size=samples))
    assert 1 <= block_length(values) <= max(1, math.ceil(samples / 3))


def test_a_constant_series_has_no_blocks():
    assert block_length(np.full(50, 2.5)) == 1


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_draw_has_as_many_samples_as_there_are(samples, block):
    drawn = bootstrap(lambda times: times.sum(1), samples, block)
    assert drawn.value == samples
    assert (drawn.draws == samples).all()


def test_statistics_of_one_set_are_paired_and_of_two_sets_are_not():
    values = np.random.default_rng(0).normal(size=300)
    scores = Scores(values, np.ones(300))
    assert (scores.bootstrap() - scores.bootstrap()).interval95 == (0, 0)
    low, high = (scores.bootstrap() - scores.bootstrap(APART)).interval95
    assert low < -0.05 < 0.05 < high


def test_differences_and_ratios_are_taken_draw_by_draw():
    a, b = Bootstrap(3.0, np.array([2.0, 4.0])), Bootstrap(2.0, np.array([1.0, 8.0]))
    assert ((a - b).value, (a - b).draws.tolist()) == (1.0, [1.0, -4.0])
    assert ((a / b).value, (a / b).draws.tolist()) == (1.5, [2.0, 0.5])


def test_the_two_sided_bound_sees_a_gain_as_well_as_a_loss():
    draws = np.random.default_rng(0).normal(size=4000)
    gain, loss = Bootstrap(-0.3, draws / 100 - 0.3), Bootstrap(0.3, draws / 100 + 0.3)
    assert gain.upper(0.95) < -0.28
    assert gain.most(0.95) == pytest.approx(0.3 + 1.645 / 100, abs=2e-3)
    assert loss.most(0.95) == loss.upper(0.95)


# Values of specs/new_methods.md, section 5.
@pytest.mark.parametrize(
    ("mean", "samples", "limit", "expected"),
    [(0.0, 299, 0.01, 0.0495), (0.002, 512, 0.01, 0.0851), (0.0, 500, 0.02, 4.1e-5)],
)
def test_golden_values_of_hoeffding_and_bentkus(mean, samples, limit, expected):
    assert hoeffding_bentkus(mean, samples, limit) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_the_binomial_tail_is_the_sum_of_its_terms(count):
    terms = [math.comb(40, k) * 0.1**k * 0.9 ** (40 - k) for k in range(count + 1)]
    assert binomial_tail(count, 40, 0.1) == pytest.approx(sum(terms), rel=1e-12)


def test_ends_of_the_tests():
    assert hoeffding_bentkus(0.5, 10, 0.5) == hoeffding_bentkus(0.6, 10, 0.5) == 1
    assert hoeffding_bentkus(0.5, 10, 1.0) == 0
    assert binomial_tail(10, 10, 1.0) == 1
    assert binomial_tail(9, 10, 1.0) == 0
    # none of 59 lost bounds the share by 5 %
    assert upper_bound(lambda limit: binomial_tail(0, 59, limit), 0.0, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59))


@given(st.floats(0.0, 1.0), st.integers(1, 2000), st.floats(0.01, 0.99))
def test_a_looser_limit_is_never_harder_to_reject(mean, samples, limit):
    assert hoeffding_bentkus(mean, samples, limit) >= hoeffding_bentkus(mean, samples, min(1.0, limit + 0.01)) - 1e-12


@pytest.mark.parametrize("law", ["rare ruin", "many small", "coin"])
def test_the_finite_sample_bound_fails_at_most_as_often_as_promised(law):
    """The upper bound of the mean loss lies below the true one in at most 10 % of 1000 experiments."""
    rng, n = np.random.default_rng(3), 200
    draws = {
        "rare ruin": (rng.random((1000, n)) < 1 / 300).astype(float),
        "many small": rng.beta(0.5, 20, (1000, n)),
        "coin": (rng.random((1000, n)) < 0.3).astype(float),
    }[law]
    truth = {"rare ruin": 1 / 300, "many small": 0.5 / 20.5, "coin": 0.3}[law]
    means = draws.mean(1)
    bounds = {m: upper_bound(lambda limit, m=m: hoeffding_bentkus(m, n, limit), m, 0.9) for m in set(means.tolist())}
    failed = np.mean([bounds[m] < truth for m in means.tolist()])
    assert failed <= 0.1
