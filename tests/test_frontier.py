"""Ways to sample beside each other at equal entropy."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.errors import CdlmError
from cdlm.core.stats import Scores
from cdlm.evaluation.frontier import BAND, Drawn, Frontier, Point, _entropies, check_noise, drawn_from
from cdlm.evaluation.frontier_table import families, label, markdown, over_calls, panels, to_dict
from cdlm.evaluation.texts import Corpus, Entry

Floats = Sequence[float]
N = 40
JUDGE = "own (small)"


H = 3.4
"""Nats of entropy in the middle."""


def point(way: str, temperature: float, entropy: Floats, nats: float, calls: int, seed: int = 0) -> Point:
    """Samples of these entropies, cycled through, and of a mean AR-NLL of `nats`."""
    noise = tuple((seed, i) for i in range(N))
    sampling = f"Diffusion(steps={calls}, score_temperature={temperature})"
    drawn = Drawn(way, sampling, Corpus(way, [[1]] * N, [""] * N, nfe=[calls] * N), noise)
    wave = np.cos(np.arange(N))
    return Point(
        drawn, Scores(np.resize(np.array(entropy), N), np.ones(N)),
        {JUDGE: Scores((nats + 0.1 * (wave - wave.mean())) * 10, np.full(N, 10.0))}, {"dist_3": 0.5},
    )  # fmt: skip


def curve(way: str, calls: int, shift: float = 0.0) -> list[Point]:
    """Three temperatures: the AR-NLL is ten times the entropy, plus a shift."""
    ends = ((0.8, H - 0.03), (0.9, H), (1.0, H + 0.03))
    return [point(way, temperature, [h], 10 * h + shift, calls) for temperature, h in ends]


def frontier(*curves: list[Point], rivals: Sequence[str] = ("plain",)) -> Frontier:
    return Frontier([p for points in curves for p in points], rivals, [JUDGE])


@given(st.floats(-0.3, 0.3), st.integers(4, 100))
def test_a_shifted_copy_of_a_curve_differs_by_the_shift_at_the_same_entropy(shift: float, calls: int) -> None:
    found = frontier(curve("mine", calls, shift), curve("plain", 50))
    match = found.match(found.curve("mine")[1], "plain", JUDGE)
    assert match is not None
    assert match.even == pytest.approx(shift, abs=1e-9)
    assert (match.even_low, match.even_high) == pytest.approx((shift, shift), abs=1e-9)  # the noise is the same


def test_a_point_between_two_temperatures_meets_the_line_between_them() -> None:
    mine = point("mine", 0.95, [H + 0.01], 3.0, 20)
    match = frontier([mine], curve("plain", 50)).match(mine, "plain", JUDGE)
    assert match is not None
    assert match.even == pytest.approx(3.0 - 10 * (H + 0.01), abs=1e-9)


def test_the_noise_of_the_entropies_is_in_the_interval_at_equal_entropy() -> None:
    """Of samples that differ in their entropies, the interval is as wide as slope times the noise of the mean."""
    mine = point("mine", 0.95, [H - 0.3, H + 0.3], 34.0, 20)
    plain = [point("plain", t, [h - 0.2, h, h + 0.2], 10 * h, 50) for t, h in ((0.8, H - 0.015), (1.0, H + 0.015))]
    match = frontier([mine], plain).match(mine, "plain", JUDGE)
    assert match is not None
    assert match.even_low is not None
    assert match.even_high is not None
    noise = np.resize([-0.3, 0.3], N) - np.resize([-0.2, 0.0, 0.2], N)
    assert match.even_high - match.even_low == pytest.approx(2 * 1.96 * 10 * noise.std() / np.sqrt(N), rel=0.1)
    assert match.high - match.low < (match.even_high - match.even_low) / 10


def test_the_rival_takes_its_best_temperature_within_the_band() -> None:
    near = [point("plain", t, [H], nats, 50) for t, nats in ((0.8, 5.0), (0.9, 4.0), (1.0, 6.0))]
    far = point("plain", 0.1, [1.0], 0.5, 50)  # far sharper, and no rival for that
    mine = point("mine", 0.9, [H], 4.5, 50)
    found = frontier([mine], [*near, far])
    match = found.match(mine, "plain", JUDGE)
    assert match is not None
    assert match.difference == pytest.approx(0.5)
    assert match.sampling.endswith("score_temperature=0.9)")
    assert not match.sharpest


def test_a_rival_of_another_entropy_is_no_rival_and_is_named() -> None:
    mine = point("mine", 1.0, [3.0], 3.0, 50)
    found = frontier([mine], curve("plain", 50))
    (saving,) = found.savings()
    assert saving.unmatched == ("plain",)
    assert saving.hardest is None
    assert saving.saved is None
    assert "plain" in markdown(found)


def test_savings_count_from_the_cheapest_rival_that_is_as_good() -> None:
    mine = point("mine", 0.9, [H], 3.0, 20)
    ways = [[point(f"plain-{calls}", 0.9, [H], nats, calls)] for calls, nats in ((20, 3.4), (50, 3.1), (100, 2.9))]
    found = Frontier([mine, *[p for way in ways for p in way]], ["plain-20", "plain-50", "plain-100"], [JUDGE])
    (saving,) = found.savings()
    assert saving.hardest is not None
    assert saving.hardest.rival == "plain-20"
    assert saving.hardest.high < 0
    assert saving.as_good is not None
    assert saving.as_good.rival == "plain-100"
    assert saving.saved == pytest.approx(0.8)
    worst = Frontier([mine, *ways[0], *ways[1]], ["plain-20", "plain-50"], [JUDGE])
    assert worst.savings()[0].as_good is None
    assert worst.savings()[0].saved_surely is None


def test_rivals_with_more_calls_do_not_decide_at_equal_calls() -> None:
    mine = point("mine", 0.9, [H], 3.0, 20)
    found = frontier([mine], [point("plain", 0.9, [H], 1.0, 21)])
    assert found.savings()[0].hardest is None
    found = frontier([mine], [point("plain", 0.9, [H], 1.0, 20)])
    assert found.savings()[0].hardest is not None


def test_a_way_that_is_a_rival_is_not_compared_with_itself() -> None:
    assert frontier(curve("plain", 50)).savings() == []


def test_tables_and_panels_hold_every_point() -> None:
    found = frontier(curve("mine", 20), curve("plain", 50))
    data = to_dict(found)
    assert [row["way"] for row in data["rows"]] == ["mine"] * 3 + ["plain"] * 3
    assert [row["rival"] for row in data["rows"]] == [False] * 3 + [True] * 3
    assert {row["point"] for row in data["rows"]} == {f"score_temperature={t}" for t in (0.8, 0.9, 1.0)}
    assert [row["sample_entropy"] for row in data["rows"][:3]] == pytest.approx([H - 0.03, H, H + 0.03])
    (panel,) = panels(found)
    assert [line.label for line in panel.lines] == ["mine, 20 calls", "plain, 50 calls"]
    assert list(panel.lines[0].x) == pytest.approx([H - 0.03, H, H + 0.03])


def test_a_label_is_what_differs() -> None:
    one, other = "D(steps=5, grid=G(), g=H(t=1.0, s=0.9))", "D(steps=5, grid=G(), g=H(t=1.0, s=1.0))"
    assert label(one, [one, other]) == "s=0.9"
    assert label(one, [one]) == ""


def corpus_of(name: str, entries: Sequence[Entry]) -> Corpus:
    return Corpus(name, [[1]] * len(entries), [entry.text for entry in entries])


def entry(seed: int, index: int, sampling: str = "A") -> Entry:
    return Entry(f"{seed} {index}", nfe=5, seed=seed, index=index, sampling=sampling)


def test_seeds_are_taken_together_and_temperatures_apart() -> None:
    entries = [entry(1, 0), entry(0, 1), entry(0, 0), entry(0, 0, "B")]
    first, second = drawn_from("way", entries, corpus_of)
    assert first.noise == ((0, 0), (0, 1), (1, 0))
    assert first.corpus.texts == ["0 0", "0 1", "1 0"]
    assert second.sampling == "B"
    assert second.noise == ((0, 0),)


def test_bad_samples_are_refused() -> None:
    with pytest.raises(CdlmError, match="do not say how they were drawn"):
        drawn_from("way", [Entry("text")], corpus_of)
    with pytest.raises(CdlmError, match="has a sample twice"):
        drawn_from("way", [entry(0, 0), entry(0, 0)], corpus_of)
    with pytest.raises(CdlmError, match="nothing to measure"):
        check_noise([])
    drawn = point("a", 1.0, [H], 1.0, 5).drawn
    with pytest.raises(CdlmError, match="not of the same seeds and numbers"):
        check_noise([drawn, point("b", 1.0, [H], 1.0, 5, seed=1).drawn])
    with pytest.raises(CdlmError, match="there is no way 'nothing'"):
        frontier(curve("mine", 3), rivals=["nothing"])


def test_a_rival_that_is_further_from_real_text_or_nearer_is_not_as_sharp() -> None:
    mine = replace(point("mine", 1.0, [H], 3.0, 50), columns={"frechet": 0.2})
    for distance, there in ((0.215, True), (0.185, True), (0.23, False), (0.17, False)):
        other = replace(point("plain", 1.0, [H], 3.0, 50), columns={"frechet": distance})
        assert (frontier([mine], [other]).match(mine, "plain", JUDGE) is not None) == there


def test_the_band_of_entropies() -> None:
    mine = point("mine", 1.0, [H], 3.0, 50)
    for distance, there in ((0.9, True), (1.1, False), (-0.9, True), (-1.1, False)):
        other = point("plain", 1.0, [H + distance * BAND], 3.0, 50)
        assert (frontier([mine], [other]).match(mine, "plain", JUDGE) is not None) == there


def test_of_prompted_samples_only_what_was_generated_counts() -> None:
    parts: list[list[tuple[int, int]]] = [[(0, 3)], []]
    corpus = Corpus("a", [[5, 5, 6, 7], [8, 8, 9, 9]], ["one two", "three"], parts, [[(1, 4)], [(0, 4)]])
    assert corpus.prompted
    assert corpus.made() == [[5, 6, 7], [8, 8, 9, 9]]
    assert corpus.first(1).made() == [[5, 6, 7]]
    assert _entropies(corpus).total == pytest.approx([np.log(3), np.log(2)])
    with pytest.raises(CdlmError, match="which tokens were generated is not known"):
        replace(corpus, generated=None).made()
    assert replace(corpus, given=None, generated=None).made() == corpus.tokens


def test_ways_with_other_prompts_are_refused() -> None:
    def drawn(way: str, text: str) -> Drawn:
        return Drawn(way, "", replace(corpus(way, [1, 2]), texts=[text]), ((0, 0),))

    check_noise([drawn("a", "one two"), drawn("b", "one three")])
    with pytest.raises(CdlmError, match="the samples of b have other prompts or lengths than those of a"):
        check_noise([drawn("a", "one two"), replace(drawn("b", "one two"), corpus=corpus("b", [3, 2]))])


def test_a_way_with_one_temperature_stands_with_those_of_its_family() -> None:
    """And a way that was not drawn at the family's is named."""
    curves = [[point("plain-8", 0.8, [H], 30, 8)], curve("plain-16", 16), curve("plain-32", 32)[1:]]
    found = frontier(*curves, rivals=("plain-8", "plain-16", "plain-32"))
    (low,) = families(replace(found, real=point("real text", 0.9, [H - 0.03], 30, 0)))
    assert (low.at, [p.calls for p in low.points]) == ("score_temperature=0.8, without plain-32", [8, 16])
    (high,) = families(replace(found, real=point("real text", 0.9, [H + 0.03], 30, 0)))
    assert (high.at, [p.calls for p in high.points]) == ("score_temperature=1.0, without plain-8", [16, 32])


@pytest.mark.parametrize("broken", [2.0, math.nan, None])
def test_a_family_is_shown_where_it_is_nearest_to_real_text(broken: float | None) -> None:
    """A temperature that breaks the text may have the entropy of real text."""
    distances = (0.2, broken, 0.1)
    points = [replace(one, columns={"frechet": far}) for one, far in zip(curve("a-8", 8), distances, strict=True)]
    (shown,) = families(replace(frontier(points, rivals=("a-8",)), real=point("real text", 0.9, [H], 30, 0)))
    assert shown.at == "score_temperature=1.0"


def test_a_point_between_two_rivals_saves_what_the_cheaper_one_takes() -> None:
    """It is surely better than the rival with 16 calls, and surely worse than that with 64."""
    mine = [point("mine", 0.9, [H], 10 * H + 0.05, 24)]
    rivals = curve("plain-16", 16, shift=0.2), curve("plain-64", 64)
    (saving,) = frontier(mine, *rivals, rivals=("plain-16", "plain-64")).savings()
    assert saving.not_worse is not None
    assert (saving.not_worse.rival, saving.not_worse.low > 0, saving.worse) == ("plain-64", True, 16)
    assert saving.saved_surely == pytest.approx(1 - 24 / 16)
    (equal,) = frontier([point("mine", 0.9, [H], 10 * H, 24)], *rivals, rivals=("plain-16", "plain-64")).savings()
    assert equal.saved_surely == pytest.approx(1 - 24 / 64)


def test_prompts_are_compared_by_their_tokens() -> None:
    """A given token that is a part of a character decodes as what was generated beside it lets it."""
    one, two = (replace(corpus("a", [1, 2]), texts=[text], given=[[(0, 1)]]) for text in ("\u00e9", "\ufffdx"))
    check_noise([Drawn("a", "", one, ((0, 0),)), Drawn("b", "", two, ((0, 0),))])


def test_ways_of_other_lengths_are_refused_and_texts_of_several_are_no_whole_ones() -> None:
    def drawn(way: str, lengths: list[int]) -> Drawn:
        return Drawn(way, "", Corpus(way, [[1], [2]], ["a", "b"], lengths=lengths), ((0, 0), (0, 1)))

    check_noise([drawn("a", [4, 5]), drawn("b", [4, 5])])
    with pytest.raises(CdlmError, match="other prompts or lengths"):
        check_noise([drawn("a", [4, 5]), drawn("b", [5, 5])])
    assert drawn("a", [5, 5]).corpus.whole
    assert not drawn("a", [4, 5]).corpus.whole


def corpus(way: str, tokens: list[int]) -> Corpus:
    """One text of two tokens, of which the first was given."""
    return Corpus(way, [tokens], ["one two"], [[(0, 3)]], [[(1, 2)]], [2])


def test_settings_of_a_halting_rule_are_points_of_their_own() -> None:
    def entry(halt: str) -> Entry:
        return Entry("x", [1], nfe=3, seed=0, index=0, sampling="Diffusion(steps=9)", halt=halt)

    found = drawn_from("entropy", [entry("Never()"), entry("Entropy(0.1)")], lambda name, e: Corpus(name, [[1]], ["x"]))
    assert [each.sampling for each in found] == ["Diffusion(steps=9)", "Diffusion(steps=9), halt=Entropy(0.1)"]


def test_over_calls_ways_that_differ_in_a_number_are_one_curve_at_one_temperature() -> None:
    curves = [curve("plain-8", 8), curve("plain-16", 16), curve("commit-8", 8, -0.1), curve("commit-4", 4, -0.1)]
    found = replace(frontier(*curves, rivals=("plain-8", "plain-16")), real=point("real text", 0.9, [H - 0.02], 30, 0))
    (panel,) = over_calls(found)
    assert [(c.label, c.rival) for c in panel.curves] == [
        ("plain, score_temperature=0.8", True), ("commit, score_temperature=0.8", False),
    ]  # fmt: skip
    assert [c.calls for c in panel.curves] == [[8, 16], [4, 8]]
    assert panel.curves[1].value == pytest.approx([10 * (H - 0.03) - 0.1] * 2)
    assert panel.levels == [("real text", pytest.approx(30))]
    shown = [(row["way"], row["point"]) for row in to_dict(found)["rows"] if row["on_calls"]]
    assert shown == [(way, "score_temperature=0.8") for way in ("plain-8", "plain-16", "commit-8", "commit-4")]
    assert [one["way"] for one in to_dict(found)["savings"] if one["on_calls"]] == ["commit-8", "commit-4"]
    (without,) = over_calls(replace(found, real=None))
    assert without.curves[0].label == "plain, score_temperature=0.9"
    assert without.levels == []
