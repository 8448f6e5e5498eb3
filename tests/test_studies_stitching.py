"""Stitching: the parts of an answer, how a judge reads them, and what is made of several samples."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from evaluation_toys import byte_tokenizer, random_judge, tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st

from cdlm.data.arithmetic import problems
from cdlm.evaluation.judge import Judge
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.studies.stitching import Reader, Reading, Trace, stitch, vote, write

SOLVED = list(problems(20, 0, "valid", (1, 3, 5)))
JUDGE = random_judge()


def answer(problem: int) -> str:
    """Right reasoning and answer."""
    return SOLVED[problem].document.partition("\n")[2]


# --- the parts of an answer ---


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["1 + 1 = 2.", "3.5", ".", " ", "\n", "####", "a"]), max_size=12).map("".join) | st.text()
)
def test_parts_joined_are_the_text_again(text: str) -> None:
    trace = Trace.of(text)
    assert trace.text == "".join(trace.whole) == text
    assert all(trace.parts)
    assert "####" not in "".join(trace.parts[:-1])
    assert Trace.of("".join(trace.parts)).parts == trace.parts


def test_a_step_is_an_equation_or_a_line() -> None:
    for problem in SOLVED:
        trace = Trace.of(problem.document.partition("\n")[2])
        assert [part.strip() for part in trace.parts] == [*problem.reasoning.replace(". ", ".|").split("|"), "####"]
        assert trace.rest == f" {problem.answer}"
    lines = Trace.of("He pays 1.50 dollars.\nThat is 3 * 2 = 6\n#### 6")
    assert lines == (("He pays 1.50 dollars.", "\nThat is 3 * 2 = 6", "\n####"), " 6")
    assert Trace.of("1 + 1 = 2. 2 ") == (("1 + 1 = 2.", " 2"), " ")


# --- votes ---


def test_the_most_frequent_answer_wins_and_of_equals_the_first() -> None:
    assert vote(["2", "1", "1"]) == "1"
    assert vote(["2", "1", "1", "2"]) == "2"
    assert vote([None, None, "3"]) == "3"
    assert vote([None, None]) is None


# --- the judge reads ---


def test_a_reading_is_the_judge_s_own_measure_of_each_part() -> None:
    before, parts = "the cat", (" sees", "", " a dog, größer", ".")
    (found,) = Reader(JUDGE)([(before, parts)])
    text, starts = before + "".join(parts), np.cumsum([len(before), *map(len, parts)])
    for i, (start, end) in enumerate(pairwise(starts)):
        alone = ar_nll(JUDGE, [text], [[(0, int(start)), (int(end), len(text))]])
        assert found.tokens[i] == alone.tokens
        assert found.nats[i] == pytest.approx(alone.text_nats[0], rel=1e-5)
    whole = ar_nll(JUDGE, [text], [[(0, len(before))]])
    assert found.mean == pytest.approx(whole.nats_per_token, rel=1e-5)
    assert found.worst == pytest.approx(
        max(n / k for n, k in zip(found.nats, found.tokens, strict=True) if k), rel=1e-9
    )
    assert found.length == len(text.encode())


def test_texts_read_together_are_read_as_one_by_one_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        ("the cat", (" sees",)),
        ("a", ()),
        ("the cat", (" sees", " it")),
        ("", ("x" * 50,)),
        ("the cat", (" sees",)),
    ]
    read = Reader(JUDGE)
    together, alone = read(texts), [Reader(JUDGE)([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-5)
        assert one.tokens.tolist() == other.tokens.tolist()
    assert together[1].mean == together[1].worst == float("inf")
    monkeypatch.setattr("cdlm.evaluation.judge.Judge.encode", lambda self, texts: pytest.fail("again") if texts else [])
    assert [id(found) for found in read(texts)] == [id(found) for found in together]


def test_what_a_judge_writes_is_its_likeliest_token_each_time_and_ends_with_its_context() -> None:
    judge = Judge(tiny_gpt2(n_positions=12), byte_tokenizer(), "short")
    prompts = ["ab", "abc", "xy", "x" * 12]
    found = write(judge, prompts, 4)
    assert [tokens for _, tokens in found] == [6, 7, 6, 0]
    assert found[3][0] == ""
    assert found == [write(judge, [prompt], 4)[0] for prompt in prompts]
    assert [tokens for _, tokens in write(judge, prompts, 20)] == [12, 12, 12, 0]


# --- stitching ---


class Knowing:
    """Reads as a judge that knows the right text: 0 nats for a part that goes on with it, 1 for others. It keeps what
    it was asked."""

    def __init__(self, right: str):
        self.right, self.asked = right, list[tuple[str, tuple[str, ...]]]()

    def __call__(self, texts: Sequence[tuple[str, tuple[str, ...]]]) -> list[Reading]:
        self.asked += texts
        nats = [float(not self.right.startswith(before + "".join(parts))) for before, parts in texts]
        return [Reading(np.array([value]), np.ones(1, np.int64), 10) for value in nats]


def test_samples_that_agree_give_their_own_reasoning_and_nothing_is_read() -> None:
    pools = [[Trace.of(answer(i))] * 3 for i in range(4)]
    read = Knowing("")
    made = stitch(read, ["?"] * 4, pools)
    assert [one.text + pool[0].rest for one, pool in zip(made, pools, strict=True)] == [answer(i) for i in range(4)]
    assert all((one.texts, one.tokens) == (0, 0) for one in made)
    assert not read.asked


def test_steps_of_which_each_is_right_somewhere_become_one_right_reasoning() -> None:
    right = "1 + 1 = 2. 2 + 3 = 5. 5 * 2 = 10. ####"
    said = [
        "1 + 1 = 3. 2 + 3 = 5. 5 * 2 = 11. #### 11", "1 + 1 = 2. 2 + 3 = 6. #### 6", "",
        "1 + 1 = 2. 2 + 3 = 6. 5 * 2 = 10. 9. #### 9", "1 + 1 = 4. 2 + 3 = 5. 5 * 2 = 11. #### 8",
    ]  # fmt: skip
    read = Knowing(f"?{right}")
    first, second = stitch(read, ["?", "!"], [[Trace.of(text) for text in said], [Trace.of("1 + 1 = 2. #### 2")]])
    assert first == (right, 10, 100)
    assert second == ("1 + 1 = 2. ####", 0, 0)
    asked = {"": 3, "1 + 1 = 2.": 2, "1 + 1 = 2. 2 + 3 = 5.": 3, "1 + 1 = 2. 2 + 3 = 5. 5 * 2 = 10.": 2}
    assert Counter(before for before, _ in read.asked) == {f"?{text}": count for text, count in asked.items()}


def test_a_reasoning_without_an_end_stops_where_no_sample_goes_on() -> None:
    pool = [Trace.of("1 + 1 = 2. 2 + 2"), Trace.of("1 + 1 = 2.")]
    made = stitch(Knowing(""), ["?", "?"], [pool, [Trace.of("")]])
    assert [one.text for one in made] == ["1 + 1 = 2. 2 + 2", ""]


def test_of_equals_the_first_that_was_drawn_is_taken() -> None:
    pool = [Trace.of("b. ####"), Trace.of("a. ####")]
    assert stitch(Knowing(""), ["?"], [pool])[0].text == "b. ####"
