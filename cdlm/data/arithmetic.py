"""A seeded generator of arithmetic word problems with reasoning and answer, and the checker of answers.

Somebody has some things, events change how many, and the question is how many there are now. The reasoning writes one
equation a step, in the order of the story:

    Ann has 12 apples. She buys 3 bags of 4. She loses 5. How many apples has Ann now?
    3 * 4 = 12. 12 + 12 = 24. 24 - 5 = 19. #### 19

Every number is a whole number from 1 to 99, or to less. A problem belongs to the training or the validation split by a
hash of its reasoning, so no calculation of one split occurs in the other, under whatever names.
"""

import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float64

from cdlm.core.answers import MARK, answer_of, number_of
from cdlm.core.errors import CdlmError

SEPARATOR = "\n"
"""Between the prompt and the completion of a document; the first one counts."""
LARGEST = 99
"""Numbers of generated problems lie in 1..LARGEST, unless the caller wants smaller ones."""


@dataclass(frozen=True)
class Problem:
    """A question, the way to its answer, and the answer, a number in digits."""

    prompt: str
    reasoning: str
    answer: str

    @property
    def document(self) -> str:
        """What a model is trained on: the prompt, a line break, the reasoning and the marked answer."""
        return f"{self.prompt}{SEPARATOR}{self.reasoning} {MARK} {self.answer}"


class _Event(NamedTuple):
    """What happens, and how to compute it: `have` is the number before, `it` the result of the last operation."""

    predicate: str
    operations: tuple[str, ...]


_PRONOUN = {
    "Ann": "She", "Eve": "She", "Lucy": "She", "Mary": "She",
    "Ben": "He", "Max": "He", "Sam": "He", "Tom": "He",
}  # fmt: skip
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")

# the operands, with their smallest and largest value
_OPERANDS = {"start": (2, 50), "n": (1, 20), "bags": (2, 5), "each": (2, 9)}

# groups of the same calculation: the group is drawn first, then the words
_EVENTS: tuple[tuple[_Event, ...], ...] = (
    tuple(_Event(f"{verb} {{n}} more", ("have + n",)) for verb in ("buys", "finds", "gets")),
    tuple(_Event(predicate, ("have - n",)) for predicate in ("loses {n}", "sells {n}", "gives {n} away")),
    (_Event("doubles them", ("have * 2",)), _Event("triples them", ("have * 3",))),
    tuple(_Event(f"keeps {part}", (f"have / {k}",)) for part, k in (("half", 2), ("a third", 3), ("a quarter", 4))),
    tuple(_Event(f"{verb} {{bags}} bags of {{each}}", ("bags * each", "have + it")) for verb in ("buys", "finds")),
    tuple(_Event(f"{verb} {{bags}} bags of {{each}}", ("bags * each", "have - it")) for verb in ("loses", "sells")),
)

_SIGNS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
}  # fmt: skip

_HELD_OUT = 16  # of 256 values of the hash's first byte

_T = TypeVar("_T")


def problems(
    n: int, seed: int, split: Literal["train", "valid"], steps: tuple[int, ...], largest: int = LARGEST
) -> Iterator[Problem]:
    """`n` problems of a split, the same for the same arguments; fewer are a prefix of more.

    Args:
        n: How many.
        seed: Of the draws; the split of a problem does not depend on it.
        split: About one calculation in 16 is held out for "valid", whatever its difficulty.
        steps: The difficulties, numbers of equations: problem i has steps[i % len(steps)] of them.
        largest: No number is above it; at least 10, at most 99. Smaller numbers have fewer sums to learn.

    Raises:
        CdlmError: There is no difficulty, or one below 1, or `largest` is out of range.
    """
    check_steps(steps)
    check_largest(largest)
    rng = np.random.default_rng(seed)
    return (_draw_until(rng, steps[i % len(steps)], split == "valid", largest) for i in range(n))


def check_steps(steps: tuple[int, ...]) -> None:
    """Refuse difficulties that no problem has."""
    if not steps or min(steps) < 1:
        raise CdlmError(f"steps: expected one or more numbers of equations, each at least 1, got {steps}")


def check_largest(largest: int) -> None:
    """Refuse a largest number that leaves too few problems, or has too many digits."""
    if not 10 <= largest <= LARGEST:
        raise CdlmError(f"largest: expected a number from 10 to {LARGEST}, got {largest}")


def is_correct(text: str, answer: str) -> bool:
    """Whether the text's answer is this number.

    Raises:
        CdlmError: `answer` is not a number.
    """
    if (expected := number_of(answer)) is None:
        raise CdlmError(f"expected a number as the answer to compare with, got {answer!r}; give digits, such as '19'")
    return answer_of(text) == expected


def right(texts: Sequence[str], answers: Sequence[str]) -> Float64[np.ndarray, " m"]:
    """1.0 where a text has its answer, else 0.0."""
    return np.array([is_correct(text, answer) for text, answer in zip(texts, answers, strict=True)], np.float64)


def is_number(text: object) -> bool:
    """Whether this is the text of a number, as answers are."""
    return isinstance(text, str) and number_of(text) is not None


def grammar_fingerprint() -> str:
    """64 hex digits that change when the problems change."""
    tables = [_PRONOUN, _THINGS, _OPERANDS, _EVENTS, LARGEST, _HELD_OUT, SEPARATOR, MARK]
    return hashlib.sha256(json.dumps(tables).encode()).hexdigest()


def _draw_until(rng: np.random.Generator, steps: int, held_out: bool, largest: int) -> Problem:
    """The next problem that belongs to the split."""
    while True:
        drawn = _problem(rng, steps, largest)
        if _is_held_out(drawn.reasoning) == held_out:
            return drawn


def _is_held_out(reasoning: str) -> bool:
    return hashlib.sha256(reasoning.encode()).digest()[0] < _HELD_OUT


def _problem(rng: np.random.Generator, steps: int, largest: int) -> Problem:
    """Draw one problem, of either split."""
    name, thing, have = _pick(rng, tuple(_PRONOUN)), _pick(rng, _THINGS), _draw(rng, "start", largest)
    sentences, equations = [f"{name} has {have} {thing}."], []
    while len(equations) < steps:
        predicate, more, have = _happen(rng, have, steps - len(equations), largest)
        sentences.append(f"{_PRONOUN[name]} {predicate}.")
        equations += more
    sentences.append(f"How many {thing} has {name} now?")
    return Problem(" ".join(sentences), " ".join(equations), str(have))


def _happen(rng: np.random.Generator, have: int, most: int, largest: int) -> tuple[str, list[str], int]:
    """An event of at most `most` equations whose numbers stay in range: its words, equations and result."""
    while True:
        event = _pick(rng, _pick(rng, _EVENTS))
        if len(event.operations) <= most:
            operands = {slot: _draw(rng, slot, largest) for slot in re.findall(r"\{(\w+)\}", event.predicate)}
            if (computed := _compute(event.operations, {"have": have, **operands}, largest)) is not None:
                return event.predicate.format_map(operands), *computed


def _compute(operations: tuple[str, ...], facts: dict[str, int], largest: int) -> tuple[list[str], int] | None:
    """The operations as equations, and the last result; None if a number is not whole or out of range."""
    equations, it = [], 0
    for operation in operations:
        left, sign, right = operation.split()
        a, b = (it if word == "it" else facts[word] if word in facts else int(word) for word in (left, right))
        it = _SIGNS[sign](a, b)
        if not 1 <= it <= largest or (sign == "/" and a % b):
            return None
        equations.append(f"{a} {sign} {b} = {it}.")
    return equations, it


def _draw(rng: np.random.Generator, slot: str, most: int) -> int:
    smallest, largest = _OPERANDS[slot]
    return int(rng.integers(smallest, min(largest, most) + 1))


def _pick(rng: np.random.Generator, options: tuple[_T, ...]) -> _T:
    return options[int(rng.integers(len(options)))]
