"""Features of texts: a hash with known values, counts by hand, and states of networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_toys import byte_tokenizer, random_judge, trained_judge
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from cdlm.core.errors import CdlmError
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.metrics.features import FEATURES, Encoder, LastState, MeanState, NGrams, _word_ids, mixed, states
from cdlm.evaluation.texts import Corpus

TEXTS = ["a cat", "", "the dog sees the sea.", "x"]
JUDGE = random_judge()


def corpus(lines: list[list[int]], **more) -> Corpus:
    return Corpus("c", lines, [" ".join(map(str, line)) for line in lines], **more)


def read(features: NGrams, reference: list[list[int]], lines: list[list[int]]) -> np.ndarray:
    return features.reader([corpus(reference)], Readers(JUDGE))(corpus(lines))


def test_the_hash_is_splitmix64() -> None:
    """First numbers of the published generator with the seeds 0 and 1234567."""
    found = mixed(np.array([0, 1234567], dtype=np.uint64)).tolist()
    assert found == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_n_grams_are_weighted_shares() -> None:
    """Bigrams 1 2 and 2 3 are in both texts of the reference, 3 4 is in one of them."""
    found = read(NGrams((2,), 3), [[1, 2, 3], [1, 2, 3, 4]], [[1, 2, 1, 2], [3, 4], [5, 6], [7], []])
    np.testing.assert_allclose(np.sort(found[0]), [0, 0, np.sqrt(2 / 3)])
    np.testing.assert_allclose(np.sort(found[1]), [0, 0, 0.5])
    assert not found[2:].any()
    assert (found[0] > 0).argmax() != (found[1] > 0).argmax()


def test_the_most_widespread_n_grams_are_kept() -> None:
    reference = [[1, 2], [1, 2], [1, 2], [3, 4], [3, 4], [5, 6], [1, 2, 7, 7, 7, 7, 7, 7]]
    found = read(NGrams((2,), 2), reference, [[1, 2], [3, 4], [5, 6], [7, 7]])
    assert found.shape == (4, 2)
    assert found.max(1).tolist() == [4 / 7, 2 / 7, 0, 0]


LINES = st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=8)


@given(LINES, LINES, st.sampled_from([(1,), (2, 3), (1, 2, 4)]))
def test_a_text_has_the_same_features_in_any_company(reference, lines, orders) -> None:
    features = NGrams(orders, 16)
    whole = read(features, reference, lines)
    assert len(whole) == len(lines)
    for line, expected in zip(lines, whole, strict=True):
        np.testing.assert_array_equal(read(features, reference, [line])[0], expected)
    np.testing.assert_array_equal(read(features, reference[::-1], lines), whole)
    assert (np.square(whole).sum(1) <= 1 + 1e-9).all()


def test_words_stand_in_where_tokens_are_not_the_generators() -> None:
    own, other = corpus([[1, 2]]), corpus([[3, 4]], foreign=True)
    assert NGrams().suited([own, own]) == NGrams()
    assert NGrams().suited([own, other]) == NGrams(over="words")
    words = NGrams((2,), 8, over="words")
    one = Corpus("one", [[1], [2]], ["The cat, sat.", "The  cat ,sat ."])
    found = words.reader([one], Readers(JUDGE))(one)
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] > 0).sum() == 4


def test_a_word_has_the_same_number_in_every_process() -> None:
    assert _word_ids(["cat, cat", "\u00e9"])[0][::2] == [3429664268601861939] * 2


def test_text_is_told_by_its_name() -> None:
    assert FEATURES.parse("NGrams()") == NGrams()
    assert FEATURES.parse("NGrams((1, 2), most=64, over='words')") == NGrams((1, 2), 64, "words")
    assert FEATURES.parse("MeanState()") == MeanState()
    assert FEATURES.parse("Encoder('x')") == Encoder("x")
    assert FEATURES.parse(str(NGrams())) == NGrams()
    for wrong, message in (
        ("NGrams(())", "orders such as"), ("NGrams((0,))", "orders >= 1"), ("NGrams(most=0)", "most >= 1"),
        ("NGrams(over='letters')", "one of tokens, words"), ("Grams()", "did you mean NGrams"), ("NGrams(3)", "orders"),
    ):  # fmt: skip
        with pytest.raises(CdlmError, match=message):
            FEATURES.parse(wrong)


# --- states ---


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("batch_size", [2, 5, 32])
def test_states_do_not_depend_on_the_batch(batch_size, pool) -> None:
    judge = trained_judge()
    one = states(judge, TEXTS, pool, batch_size=1)
    np.testing.assert_allclose(states(judge, TEXTS, pool, batch_size), one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(states(judge, TEXTS[::-1], pool, batch_size)[::-1], one, rtol=1e-4, atol=1e-5)
    assert not one[1].any()
    assert states(judge, [], pool).shape == (0, 32)


def test_states_are_those_of_the_network() -> None:
    ids = torch.tensor([JUDGE.encode(["a dog"])[0].ids])
    with torch.no_grad():
        expected = JUDGE.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    for features, value in ((LastState(), expected[-1]), (MeanState(), expected.mean(0))):
        found = features.reader([], Readers(JUDGE))(Corpus("c", [[1], [2]], ["a dog", "a dog that is longer"]))
        np.testing.assert_allclose(found[0], value, rtol=1e-4, atol=1e-5)


def encoder(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=256, max_position_embeddings=40, hidden_size=16, num_hidden_layers=1,
                            num_attention_heads=2, intermediate_size=16)  # fmt: skip
        BertModel(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_is_read_from_a_folder(tmp_path) -> None:
    texts = ["a dog", "", "a much longer text that goes beyond the forty positions of the network"]
    found = Encoder(str(encoder(tmp_path))).reader([], Readers(JUDGE))(Corpus("c", [[1]] * 3, texts))
    model = BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(torch.tensor([byte_tokenizer()("a dog")["input_ids"]])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    assert not found[1].any()
    assert found[2].any()


def test_what_is_no_encoder_is_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "encoder"):
        place = tmp_path / name
        if name == "encoder":
            (encoder(place) / "model.safetensors").write_bytes(b"broken")
        with pytest.raises(CdlmError, match=r"expected an encoder with|truncated or damaged") as caught:
            Encoder(str(place)).reader([], Readers(JUDGE))
        assert "\n" not in str(caught.value)
