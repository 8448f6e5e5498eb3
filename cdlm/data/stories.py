"""A seeded grammar of short English stories, and a checker that reads the same tables.

A plot is a sequence of sentences, each a choice of templates. A slot such as {animal} stands for one value in the
whole story, and pronouns follow the gender of the one named person, so a story has facts to remember: who it is about,
which animal came along, what was lost and has to be found. Nothing else is random, so whether a sentence
belongs to the language can be decided exactly.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TypeVar

import numpy as np

_GENDER = {
    "Anna": "f", "Lucy": "f", "Mary": "f", "Rose": "f",
    "Ben": "m", "Max": "m", "Sam": "m", "Tom": "m",
}  # fmt: skip

# words that may follow "a", so none begins with a vowel
_SLOTS: dict[str, tuple[str, ...]] = {
    "name": tuple(_GENDER),
    "animal": ("dog", "cat", "fox", "duck", "rabbit", "pony"),
    "thing": ("ball", "kite", "hat", "book", "bell", "drum", "cake", "lamp"),
    "place": ("park", "garden", "farm", "beach", "market", "forest", "castle", "school"),
    "look": ("small", "big", "brown", "happy"),
    "colour": ("red", "blue", "green", "yellow"),
    "spot": ("pond", "gate", "tree", "wall"),
    "food": ("bread", "milk", "fruit"),
    "kin": ("mother", "father", "sister", "brother"),
}

_PRONOUNS: dict[str, dict[str, str]] = {
    "He": {"f": "She", "m": "He"},
    "he": {"f": "she", "m": "he"},
    "him": {"f": "her", "m": "him"},
    "His": {"f": "Her", "m": "His"},
    "his": {"f": "her", "m": "his"},
}

_PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # meeting an animal that has something
        ("{name} went to the {place}.", "{name} was at the {place}."),
        ("{He} saw a {look} {animal} near the {spot}.", "A {look} {animal} sat near the {spot}."),
        ("The {animal} had a {colour} {thing}.", "The {animal} gave {him} a {colour} {thing}."),
        (
            "{name} gave the {animal} some {food}.",
            "{name} and the {animal} played with the {thing}.",
            "{He} took the {thing} home to {his} {kin}.",
        ),
    ),
    (  # losing something that an animal finds
        ("{name} had a {colour} {thing}.", "{name} got a {colour} {thing} from {his} {kin}."),
        ("{He} lost the {thing} at the {place}.", "{He} went to the {place} and lost the {thing}."),
        ("A {look} {animal} found the {thing}.", "A {look} {animal} saw it near the {spot}."),
        (
            "The {animal} gave the {thing} back to {him}.",
            "{name} thanked the {animal} and took the {thing} home.",
            "{He} was happy and gave the {animal} some {food}.",
        ),
    ),
    (  # a present
        ("{name} wanted to see {his} {kin}.", "{name} went to see {his} {kin}."),
        ("{He} found a {colour} {thing} at the {place}.", "At the {place} {he} got a {colour} {thing}."),
        ("{He} met a {look} {animal}.", "A {look} {animal} came with {him}."),
        (
            "{His} {kin} liked the {thing} and the {animal}.",
            "{name} gave the {thing} to {his} {kin}.",
            "{His} {kin} gave the {animal} some {food}.",
        ),
    ),
)

Facts = Mapping[str, str]
_T = TypeVar("_T")


def story(rng: np.random.Generator) -> str:
    """Draw one story of four sentences, joined by spaces."""
    facts = {slot: _pick(rng, values) for slot, values in _SLOTS.items()}
    facts |= {slot: forms[_GENDER[facts["name"]]] for slot, forms in _PRONOUNS.items()}
    return " ".join(_pick(rng, templates).format_map(facts) for templates in _pick(rng, _PLOTS))


def stories(n: int, seed: int) -> Iterator[str]:
    """`n` stories, the same for the same seed; fewer are a prefix of more."""
    rng = np.random.default_rng(seed)
    return (story(rng) for _ in range(n))


def sentences(text: str) -> list[str]:
    """Cut text after every full stop that ends a word; a rest without one is the last sentence."""
    return [part for part in re.split(r"(?<=\.)\s+", text.strip()) if part]


def whole_sentences(text: str) -> list[str]:
    """The sentences of a packed row of stories, one story a line, without those that the row's edges cut."""
    first, *rest = ([part for part in sentences(line) if part.endswith(".")] for line in text.split("\n"))
    return [*first[1:], *(sentence for line in rest for sentence in line)]


def is_sentence(text: str) -> bool:
    """Whether a text is one sentence of the grammar, with its pronouns in agreement."""
    return any(True for plot in _PLOTS for templates in plot for _ in _readings(text, templates))


def grammar_fingerprint() -> str:
    """64 hex digits that change when the grammar changes."""
    return hashlib.sha256(json.dumps([_GENDER, _SLOTS, _PRONOUNS, _PLOTS]).encode()).hexdigest()


def _pick(rng: np.random.Generator, options: tuple[_T, ...]) -> _T:
    return options[int(rng.integers(len(options)))]


def _readings(sentence: str, templates: tuple[str, ...]) -> Iterator[Facts]:
    """What the sentence says, under each template that it matches without contradicting itself."""
    for template in templates:
        if match := _pattern(template).fullmatch(sentence):
            facts: Facts | None = {}
            for group, word in match.groupdict().items():
                facts = None if facts is None else _join(facts, _meaning(group.split("_")[0], word))
            if facts is not None:
                yield facts


def _meaning(slot: str, word: str) -> Facts:
    """The facts behind one filled slot: a pronoun tells a gender, a name tells both."""
    if slot in _PRONOUNS:
        return {"gender": next(gender for gender, form in _PRONOUNS[slot].items() if form == word)}
    return {"name": word, "gender": _GENDER[word]} if slot == "name" else {slot: word}


def _join(facts: Facts, more: Facts) -> Facts | None:
    """Both sets of facts, or None if they contradict each other."""
    if any(facts.get(slot, word) != word for slot, word in more.items()):
        return None
    return {**facts, **more}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression with one group a slot, numbered because a slot may come twice."""
    pieces = re.split(r"\{(\w+)\}", template)
    for place in range(1, len(pieces), 2):
        slot = pieces[place]
        words = _SLOTS.get(slot) or tuple(_PRONOUNS[slot].values())
        pieces[place] = f"(?P<{slot}_{place}>{'|'.join(words)})"
        pieces[place - 1] = re.escape(pieces[place - 1])
    return re.compile("".join(pieces[:-1]) + re.escape(pieces[-1]))
