import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cdlm.data.store import TokenStore
from cdlm.evaluation.metrics.copying import RUN, Runs

EOS = 99


def store(documents: list[list[int]]) -> TokenStore:
    offsets = np.cumsum([0, *map(len, documents)])
    return TokenStore(Path(), np.concatenate(documents).astype(np.uint16), offsets, EOS, EOS, "")


def by_hand(documents: list[list[int]], texts: list[list[int]]) -> float:
    """The definition: a token is copied if it is in a run that stands in the joined training text."""
    joined = [token for document in documents for token in (*document, EOS)]
    known = {tuple(joined[i : i + RUN]) for i in range(len(joined) - RUN + 1)}
    covered = 0
    for text in texts:
        starts = [i for i in range(len(text) - RUN + 1) if tuple(text[i : i + RUN]) in known]
        covered += len({place for i in starts for place in range(i, i + RUN)})
    return covered / sum(map(len, texts))


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=60)


@given(documents=st.lists(TOKENS, min_size=1, max_size=5), own=TOKENS, cut=st.integers(0, 30))
def test_the_share_of_copied_tokens_is_that_of_its_definition(documents: list[list[int]], own: list[int], cut: int):
    texts = [own, [*documents[0][cut:], EOS, *own]]
    assert Runs.of(store(documents)).copied(texts) == by_hand(documents, texts)


def test_a_training_text_is_copied_whole_and_another_not_at_all():
    rng = np.random.default_rng(0)
    documents, others = rng.integers(0, 90, (2, 30, 40)).tolist()
    runs = Runs.of(store(documents))
    assert runs.copied(documents) == 1.0
    assert runs.copied([documents[0] + [EOS] + documents[1]]) == 1.0  # rows are cut from joined documents
    assert runs.copied(others) == 0.0
    assert runs.copied([documents[0][: RUN - 1]]) == 0.0  # too short to tell
    assert runs.copied([documents[0] + others[0]]) == 0.5
    assert math.isnan(runs.copied([[], []]))


def test_texts_shorter_than_a_run_know_no_copies():
    assert Runs.of(store([[1, 2, 3]])).copied([[1, 2, 3, EOS] * 10]) == 0.0
