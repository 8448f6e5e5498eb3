import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import tokenizer

from cdlm.data.sources import Stories
from cdlm.data.store import DocumentRows, TokenStore
from cdlm.data.tokenizer import encode_batch
from cdlm.evaluation.metrics.copying import RUN, Runs
from cdlm.evaluation.texts import Corpus, Entry, RealText
from cdlm.sampling.texts import special_of

EOS = 99


def store(documents: list[list[int]]) -> TokenStore:
    offsets = np.cumsum([0, *map(len, documents)])
    return TokenStore(Path(), np.concatenate(documents).astype(np.uint16), offsets, EOS, EOS, "")


def by_hand(documents: list[list[int]], texts: list[list[int]]) -> float:
    """The definition: a token is copied if it is in a run of the joined training text. Shorter texts do not count."""
    texts = [text for text in texts if len(text) >= RUN]
    joined = [token for document in documents for token in (*document, EOS)]
    known = {tuple(joined[i : i + RUN]) for i in range(len(joined) - RUN + 1)}
    covered = 0
    for text in texts:
        starts = [i for i in range(len(text) - RUN + 1) if tuple(text[i : i + RUN]) in known]
        covered += len({place for i in starts for place in range(i, i + RUN)})
    return covered / sum(map(len, texts)) if texts else math.nan


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=60)


@given(documents=st.lists(TOKENS, min_size=1, max_size=5), own=TOKENS, cut=st.integers(0, 30))
def test_the_share_of_copied_tokens_is_that_of_its_definition(documents: list[list[int]], own: list[int], cut: int):
    texts = [own, [*documents[0][cut:], EOS, *own]]
    assert Runs.of(store(documents), EOS).copied(texts) == pytest.approx(by_hand(documents, texts), nan_ok=True)


def test_a_training_text_is_copied_whole_and_another_not_at_all():
    rng = np.random.default_rng(0)
    documents, others = rng.integers(0, 90, (2, 30, 40)).tolist()
    runs = Runs.of(store(documents), EOS)
    assert runs.copied(documents) == 1.0
    assert runs.copied([documents[0] + [EOS] + documents[1]]) == 1.0  # rows are cut from joined documents
    assert runs.copied(others) == 0.0
    assert runs.copied([documents[0], others[0][: RUN - 1]]) == 1.0  # the second is too short to tell
    assert math.isnan(runs.copied([documents[0][: RUN - 1]]))
    assert runs.copied([documents[0] + others[0]]) == 0.5
    assert math.isnan(runs.copied([[], []]))


def test_texts_shorter_than_a_run_know_no_copies():
    assert Runs.of(store([[1, 2, 3]]), EOS).copied([[1, 2, 3, EOS] * 10]) == 0.0


def test_no_more_is_searched_than_is_said():
    documents = np.random.default_rng(1).integers(0, 90, (3, 40)).tolist()
    runs = Runs.of(store(documents), EOS, most=60)
    assert len(runs.hashes) == 61 - RUN + 1  # 60 tokens and the end of the first document
    assert runs.copied([documents[0]]) == 1.0
    assert runs.copied([documents[1]]) == 0.5
    assert runs.copied([documents[2]]) == 0.0


def test_a_text_has_as_many_copies_as_its_tokens_though_the_end_of_a_document_is_a_line_break_there():
    own = tokenizer()
    documents = encode_batch(own, list(Stories(n=12, seed=3).documents("train")))
    end = special_of(own).eos_id
    assert end is not None
    trained = replace(store(documents), eos_id=end)
    real = RealText(DocumentRows(trained, 40), None, own, Stories(n=1), trained)
    row = [token for document in documents for token in (*document, end)][20:120]
    text = real.decode(row)
    assert "\n" in text
    drawn, plain = (real.samples("s", [entry]) for entry in (Entry(text, row), Entry(text)))
    assert real.copied(drawn) == 1.0
    assert real.copied(plain) == 1.0


def test_real_text_looks_for_copies_of_whole_texts_alone():
    documents = np.random.default_rng(2).integers(0, 90, (2, 40)).tolist()
    real = RealText(DocumentRows(store(documents), 40), None, tokenizer(), Stories(n=1), store(documents))
    assert real.copied(Corpus("s", documents, ["", ""])) == 1.0
    assert real.copied(Corpus("s", documents, ["ab", "cd"], [[(0, 1)], []])) is None
    assert replace(real, trained=None).copied(Corpus("s", documents, ["", ""])) is None
