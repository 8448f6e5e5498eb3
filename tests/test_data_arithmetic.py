"""Problems with answers: generated ones are right and split for good, files of problems are read, answers checked."""

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.answers import answer_of
from cdlm.core.errors import CdlmError
from cdlm.data import arithmetic as grammar
from cdlm.data.arithmetic import Problem, grammar_fingerprint, is_correct, problems
from cdlm.data.gsm8k import read_problems
from cdlm.data.sources import Arithmetic
from cdlm.data.tokenizer import encode_batch, train_tokenizer

SPLITS: tuple[Literal["train", "valid"], ...] = ("train", "valid")
STEPS = (1, 2, 3, 4)
TRAIN = list(problems(4000, 0, "train", STEPS))
VALID = list(problems(400, 1, "valid", STEPS))
WORKED = "3 * 4 = 12. 12 + 12 = 24. 24 - 5 = 19. #### 19"


def equations(problem: Problem) -> list[tuple[int, str, int, int]]:
    """The reasoning, read back."""
    parts = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.(?: |$)", problem.reasoning)
    read = [(int(a), sign, int(b), int(c)) for a, sign, b, c in parts]
    assert " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in read) == problem.reasoning
    return read


def told(prompt: str) -> tuple[int, list[int]]:
    """Follow the story by its words alone: how many there are in the end, and every number on the way."""
    start, *events, question = re.split(r"(?<=[.]) ", prompt)
    words = re.fullmatch(r"([A-Z][a-z]+) has (\d+) ([a-z]+)\.", start)
    assert words
    assert question == f"How many {words[3]} has {words[1]} now?"
    have = Fraction(words[2])
    seen = [have]
    for event in events:
        verb, *rest = event.rstrip(".").split()[1:]
        numbers = [int(word) for word in rest if word.isdigit()]
        amount = Fraction(numbers[0] * numbers[1] if "bags" in rest else numbers[0] if numbers else 0)
        if verb == "keeps":
            have /= {"half": 2, "third": 3, "quarter": 4}[rest[-1]]
        elif verb in ("doubles", "triples"):
            have *= {"doubles": 2, "triples": 3}[verb]
        else:
            have += amount if verb in ("buys", "finds", "gets") else -amount
        seen += [amount, have] if "bags" in rest else [have]
    assert all(number.denominator == 1 for number in seen)
    return int(have), [int(number) for number in seen]


# --- generated problems -----------------------------------------------------------------------------------------------


def test_every_equation_holds_and_the_last_one_is_the_answer():
    for problem in TRAIN + VALID:
        read = equations(problem)
        for a, sign, b, c in read:
            assert {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[sign] == c
        assert str(read[-1][3]) == problem.answer


def test_the_story_has_the_results_of_the_reasoning():
    for problem in TRAIN + VALID:
        answer, seen = told(problem.prompt)
        assert str(answer) == problem.answer
        assert [c for *_, c in equations(problem)] == seen[1:]


def test_numbers_are_in_range():
    for problem in TRAIN + VALID:
        numbers = [int(digits) for digits in re.findall(r"\d+", problem.document)]
        assert min(numbers) >= 1
        assert max(numbers) <= grammar.LARGEST


def test_difficulties_take_turns():
    for drawn in (TRAIN, VALID):
        assert [len(equations(problem)) for problem in drawn] == [*STEPS] * (len(drawn) // len(STEPS))


def test_same_seed_same_problems_other_seed_others():
    for split in SPLITS:
        few, many, other = (list(problems(n, seed, split, (2, 3))) for n, seed in ((20, 7), (40, 7), (20, 8)))
        assert few == many[:20]
        assert few != other


def test_no_calculation_is_in_both_splits():
    """Even of one equation, of which there are so few that training meets most of them."""
    train = {problem.reasoning for problem in problems(3000, 0, "train", (1,))}
    valid = {problem.reasoning for problem in problems(600, 0, "valid", (1,))}
    assert not train & valid
    assert len(train) > 1000
    assert len(valid) > 50
    assert not {problem.reasoning for problem in TRAIN} & {problem.reasoning for problem in VALID}


def test_one_calculation_in_sixteen_is_held_out():
    rng = np.random.default_rng(0)
    calculations = {grammar._problem(rng, 3, grammar.LARGEST).reasoning for _ in range(3000)}
    held_out = sum(map(grammar._is_held_out, calculations))
    assert abs(held_out / len(calculations) - 1 / 16) < 0.018  # four standard deviations


def test_there_are_more_than_a_million_problems_of_three_equations():
    """n draws from N or fewer equally likely things have n**2 / 2N repeated pairs or more, 32 for a million."""
    counts = Counter(problem.prompt for problem in problems(8000, 0, "train", (3,)))
    assert sum(count * (count - 1) // 2 for count in counts.values()) < 15


def test_no_answer_can_be_guessed():
    for steps in STEPS:
        answers = Counter(problem.answer for problem in problems(1000, 0, "train", (steps,)))
        assert max(answers.values()) < 100


def test_every_word_occurs():
    words = set(re.findall(r"[A-Za-z]+", " ".join(problem.prompt for problem in TRAIN)))
    predicates = [event.predicate for group in grammar._EVENTS for event in group]
    expected = " ".join([*predicates, *grammar._PRONOUN, *grammar._PRONOUN.values(), *grammar._THINGS])
    assert set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", expected))) <= words


def test_a_document_is_the_prompt_a_line_break_and_the_completion():
    problem = Problem("How many?", "1 + 1 = 2.", "2")
    assert problem.document == "How many?\n1 + 1 = 2. #### 2"
    for problem in TRAIN:
        assert problem.document.count("\n") == 1
        assert problem.document.count("####") == 1
        assert is_correct(problem.document, problem.answer)


@pytest.mark.parametrize("steps", [(), (0,), (2, -1)])
def test_impossible_difficulties(steps):
    with pytest.raises(CdlmError, match="at least 1"):
        problems(1, 0, "train", steps)
    with pytest.raises(CdlmError, match="at least 1"):
        Arithmetic(steps=steps)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (WORKED, "19"),
        ("####19", "19"),
        ("a\n#### 1,200 \nmore", "1200"),
        ("#### $1,234,567.", "1234567"),
        ("#### 19.0", "19"),
        ("#### 2.50", "2.5"),
        ("#### 007", "7"),
        ("#### -3", "-3"),
        ("#### -$3", "-3"),
        ("#### -0.0", "0"),
        ("#### 100", "100"),
        ("#### 1 #### 2", None),
        ("#### 1\n#### 2", "1"),
        ("####\n19", None),
        ("#### ", None),
        ("#### 1 9", None),
        ("#### 1,9", None),
        ("#### 19 apples", None),
        ("#### 19 = 20", None),
        ("#### --3", None),
        ("#### \u0661", None),
        ("24 - 5 = 19.", None),
        ("### 19", None),
        ("", None),
    ],
)
def test_known_answers(text, answer):
    assert answer_of(text) == answer
    assert answer is None or is_correct(text, answer)
    assert not is_correct(text, "20")


@given(st.integers(), st.sampled_from(["{}", "{:,}", " {}. ", "{}.00", "$ {}", "{:,}."]))
def test_every_spelling_of_a_number_is_that_number(number, spelling):
    text = "so #### " + spelling.format(number)
    assert answer_of(text) == str(number)
    assert is_correct(text, f"{number:,}")
    assert not is_correct(text, str(number + 1))


@given(st.text(st.sampled_from("#0123456789,.-$ \n"), max_size=20))
def test_an_answer_is_its_own_spelling(text):
    answer = answer_of(text)
    assert answer is None or (answer_of(f"#### {answer}") == answer and is_correct(text, answer))


def test_a_wrong_answer_to_compare_with_is_refused():
    with pytest.raises(CdlmError, match="'nineteen'"):
        is_correct(WORKED, "nineteen")


# --- the source -------------------------------------------------------------------------------------------------------


def test_the_source_yields_documents():
    source = Arithmetic(n=400, seed=3, steps=(1, 3))
    train, valid = (list(source.documents(split)) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (400, 20)
    assert train == [problem.document for problem in problems(400, 3, "train", (1, 3))]
    assert train == list(source.documents("train"))
    assert not set(train) & set(valid)
    assert len(list(Arithmetic(n=1).documents("valid"))) == 1


def test_the_source_has_a_fingerprint():
    sources = [Arithmetic(), Arithmetic(n=5), Arithmetic(seed=1), Arithmetic(steps=(1, 2))]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert Arithmetic().fingerprint() == Arithmetic().fingerprint()


def test_the_fingerprint_follows_the_grammar(monkeypatch):
    before = grammar_fingerprint(), Arithmetic().fingerprint()
    monkeypatch.setattr(grammar, "_THINGS", ("apples",))
    assert grammar_fingerprint() != before[0]
    assert Arithmetic().fingerprint() != before[1]


@pytest.mark.parametrize("settings", [{"n": 0}, {"seed": -1}])
def test_impossible_settings(settings):
    with pytest.raises(CdlmError, match="Arithmetic"):
        Arithmetic(**settings)


def test_every_word_and_number_is_a_token_and_rows_are_short():
    """As configs/arithmetic.yaml says."""
    documents = list(Arithmetic(n=8000).documents("train"))
    tokenizer = train_tokenizer(documents, 540)
    rows = encode_batch(tokenizer, documents)
    assert max(map(len, rows)) + 1 <= 52
    for document, row in zip(documents[:500], rows, strict=False):
        pieces = re.findall(r"#+|\w+|\n|[^\w\s]", document)
        assert [str(tokenizer.decode([token])).strip(" ") for token in row] == pieces


# --- files in the format of GSM8K -------------------------------------------------------------------------------------


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


GOOD = {
    "question": "A hen lays 3 eggs a day.\nIt rests on  Sunday. How much at $2 an egg in 100 weeks?",
    "answer": "It lays 3*6=<<3*6=18>>18 eggs a week.\n\nThat is 18*2=$<<18*2=36>>36.\nSo 36*100=$<<36*100=3600>>3,600\n"
    "#### 3,600",
}


def test_a_file_of_problems(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, "", {"question": "1 - 2?", "answer": "1-2=<<1-2=-1>>-1\n#### -1", "id": 7})
    first, second = read_problems(path)
    assert first.prompt == "A hen lays 3 eggs a day. It rests on Sunday. How much at $2 an egg in 100 weeks?"
    assert first.reasoning == "It lays 3*6=18 eggs a week.\nThat is 18*2=$36.\nSo 36*100=$3,600"
    assert first.answer == "3600"
    assert second == Problem("1 - 2?", "1-2=-1", "-1")
    assert read_problems(str(path)) == [first, second]


def test_a_file_of_problems_answers_itself(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, *({"question": p.prompt, "answer": WORKED} for p in VALID[:3]))
    for problem in read_problems(path):
        assert is_correct(problem.document, problem.answer)
        assert problem.document.partition("\n")[0] == problem.prompt
    assert is_correct(GOOD["answer"], read_problems(path)[0].answer)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ("{", "JSON"),
        ("[1]", "got list"),
        ({"question": "Why?"}, "'answer'"),
        ({"answer": "#### 3"}, "'question'"),
        ({"question": "Why?", "answer": 3}, "got int"),
        ({"question": "Why?", "answer": "It is 3."}, "'It is 3.'"),
        ({"question": "Why?", "answer": "It is so.\n#### three"}, "number"),
        ({"question": "Why?", "answer": "One. #### 1\nTwo. #### 2"}, "one '####'"),
        ({"question": "Why ####?", "answer": "One. #### 1"}, "one '####'"),
        ({"question": " \n", "answer": "One. #### 1"}, "question"),
        ({"question": "Why?", "answer": "<<1=1>>\n#### 1"}, "reasoning"),
        ({"question": None, "answer": "One. #### 1"}, "question"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, hint):
    path = write(tmp_path / "a.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(CdlmError) as error:
        read_problems(path)
    message = str(error.value)
    assert f"{path}, line 3" in message
    assert hint in message
    assert "\n" not in message


def test_a_file_without_problems(tmp_path):
    with pytest.raises(CdlmError, match=r"none\.jsonl.*cannot be read"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(CdlmError, match="found none"):
        read_problems(write(tmp_path / "a.jsonl", ""))


def test_smaller_numbers_on_request():
    small = list(problems(300, 0, "train", (1, 2, 3, 4), largest=20))
    numbers = [int(n) for problem in small for n in re.findall(r"[0-9]+", f"{problem.prompt} {problem.reasoning}")]
    assert max(numbers) == 20
    assert not {p.reasoning for p in small} & {p.reasoning for p in problems(300, 1, "valid", (1, 2, 3, 4), largest=20)}
    assert Arithmetic(largest=20).fingerprint() != Arithmetic().fingerprint()
    for largest in (9, 100):
        with pytest.raises(CdlmError, match="largest: expected a number from 10 to 99"):
            Arithmetic(largest=largest)
