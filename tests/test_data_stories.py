"""The story grammar: generator and checker agree, and the checker sees single wrong words."""

import re

import numpy as np
import pytest
from story_grammar import is_story

from cdlm.data import stories as grammar
from cdlm.data.stories import is_sentence, sentences, stories, story, whole_sentences

TOLD = list(stories(1500, 0))
GIRL = "Anna went to the park. She saw a small dog near the pond. The dog had a red ball. Anna gave the dog some bread."


def test_everything_generated_is_accepted():
    assert all(map(is_story, TOLD))
    assert all(is_sentence(part) for told in TOLD for part in sentences(told))


def test_the_example_is_a_story():
    assert is_story(GIRL)


def test_every_template_and_every_word_occurs():
    words = set(re.findall(r"\w+", " ".join(TOLD)))
    assert {word for values in grammar._SLOTS.values() for word in values} <= words
    parts = {part for told in TOLD for part in sentences(told)}
    templates = {template for plot in grammar._PLOTS for choices in plot for template in choices}
    assert all(any(grammar._pattern(template).fullmatch(part) for part in parts) for template in templates)


def test_same_seed_same_stories_other_seed_others():
    assert list(stories(50, 7)) == list(stories(80, 7))[:50]
    assert list(stories(50, 7)) != list(stories(50, 8))
    assert story(np.random.default_rng(7)) == next(stories(1, 7))


def test_stories_rarely_repeat():
    assert len(set(TOLD)) > 0.99 * len(TOLD)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("She saw", "He saw"),  # pronoun against the name
        ("The dog had", "The cat had"),  # another animal than the one introduced
        ("Anna gave", "Mary gave"),  # another person
        ("park. She", "park. The park. She"),  # a sentence too many
        ("The dog had a red ball. ", ""),  # one too few
        ("a red ball", "red ball"),
        ("bread.", "bread"),
    ],
)
def test_one_wrong_word_is_seen(right, wrong):
    assert right in GIRL
    assert not is_story(GIRL.replace(right, wrong))


@pytest.mark.parametrize(
    "text",
    [
        "Tom lost the ball at the park. She lost the ball.",
        "Tom wanted to see her mother.",
        "She took the ball home to his mother.",
        "Tom saw the",
        "tom had a red ball.",
        "Tom had a red ball",
        "Tom had a ball red.",
        "",
    ],
)
def test_not_sentences(text):
    assert not is_sentence(text)


def test_agreement_inside_a_sentence():
    assert is_sentence("She took the ball home to her mother.")
    assert is_sentence("Tom wanted to see his mother.")


def test_swapping_two_sentences_is_seen():
    one, two, three, four = sentences(GIRL)
    assert not is_story(" ".join([one, three, two, four]))
    assert not is_story(" ".join([two, one, three, four]))


def test_corrupted_stories_are_rejected():
    """Another name's gender, animal, thing or place in one sentence only: rejected wherever the word occurs twice."""
    rng = np.random.default_rng(0)
    for told in TOLD[:300]:
        parts = sentences(told)
        for slot in ("name", "animal", "thing", "kin"):
            words = grammar._SLOTS[slot]
            where = [i for i, part in enumerate(parts) if set(re.findall(r"\w+", part)) & set(words)]
            if len(where) < 2:
                continue
            place = where[int(rng.integers(len(where)))]
            old = next(word for word in re.findall(r"\w+", parts[place]) if word in words)
            new = next(word for word in words if word != old)
            assert not is_story(
                " ".join([*parts[:place], re.sub(rf"\b{old}\b", new, parts[place]), *parts[place + 1 :]])
            )


def test_any_foreign_word_is_rejected():
    for told in TOLD[:100]:
        words = told.split(" ")
        for place in range(len(words)):
            assert not is_story(" ".join([*words[:place], "zebra", *words[place + 1 :]]))


def test_sentences_keep_an_unfinished_rest():
    assert sentences("Tom ran. He saw a") == ["Tom ran.", "He saw a"]
    assert sentences("  ") == []


def test_whole_sentences_of_a_row_leave_out_what_its_edges_cut():
    row = f"the pond. The dog had a red ball.\n{GIRL}\nTom went to the farm. He saw a"
    whole = whole_sentences(row)
    assert whole == ["The dog had a red ball.", *sentences(GIRL), "Tom went to the farm."]
    assert all(map(is_sentence, whole))


def test_spacing_belongs_to_a_story():
    assert not is_story(GIRL.replace(". ", ".  ", 1))
    assert not is_story(GIRL + " ")
