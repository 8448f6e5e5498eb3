"""Accuracy under parallelism: published areas, known answers, and what cannot raise it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.evaluation.metrics.aup import accuracy_of, aup

PUBLISHED = {  # d3LLM's table of LLaDA on GSM8K-CoT, whose best accuracy is 74.98
    "LLaDA": ([(1.0, 72.55)], 72.55),
    "Fast-dLLM": ([(1.0, 74.79), (2.77, 74.68)], 205.78),
    "dParallel": ([(1.0, 74.0), (5.14, 72.63)], 358.14),
    "d3LLM": ([(1.0, 74.02), (9.11, 73.09)], 637.65),
}
shares = st.floats(0, 100)
curves = st.lists(st.tuples(st.floats(0.1, 50), shares), min_size=1, max_size=6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_areas_of_the_published_table(name: str) -> None:
    curve, area = PUBLISHED[name]
    assert aup(curve, 74.98) == pytest.approx(area, abs=0.005)
    assert aup(curve[::-1], 74.98) == aup(curve, 74.98), "in any order"


def test_a_method_as_good_as_the_best_has_the_plain_area() -> None:
    assert aup([(1.0, 80.0), (3.0, 80.0), (8.0, 80.0)], 80.0) == pytest.approx(8 * 80)
    assert aup([(2.0, 40.0)], 80.0) == 80.0, "the first term has no weight"
    assert aup([(1.0, 80.0), (2.0, 76.0)], 80.0) == pytest.approx(80 + (80 + 76 * math.exp(-3 * 4 / 80)) / 2)


def test_what_falls_by_more_than_five_points_is_left_out() -> None:
    assert aup([(1.0, 80.0), (4.0, 75.0)], 80.0) > aup([(1.0, 80.0)], 80.0)
    assert aup([(1.0, 80.0), (4.0, 74.9)], 80.0) == aup([(1.0, 80.0)], 80.0)
    assert aup([(1.0, 80.0), (2.0, 10.0), (4.0, 79.0)], 80.0) == aup([(1.0, 80.0), (4.0, 79.0)], 80.0)


@given(curves, st.floats(0, 20), shares)
def test_a_better_rival_never_raises_an_area(curve: list[tuple[float, float]], more: float, best: float) -> None:
    y_max = max(best, *(y for _, y in curve))
    assert aup(curve, y_max + more) <= aup(curve, y_max) * (1 + 1e-12)


@given(curves)
def test_a_faster_point_that_is_as_right_never_lowers_it(curve: list[tuple[float, float]]) -> None:
    fastest, y = max(curve)
    y_max = max(y for _, y in curve)
    longer = [*curve, (fastest + 1, y)]
    assert aup(longer, y_max) >= aup(curve, y_max) * (1 - 1e-12)
    assert 0 <= aup(curve, y_max) <= fastest * y_max * (1 + 1e-12)


def test_where_nothing_is_right_the_area_is_nothing() -> None:
    assert aup([(1.0, 0.0), (3.0, 0.0)], 0.0) == 0


def test_a_loss_stands_for_accuracy() -> None:
    assert accuracy_of(2.0, 2.0) == 100
    assert accuracy_of(2.0 + math.log(2), 2.0) == pytest.approx(50)
