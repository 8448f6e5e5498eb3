import math

import numpy as np
import pytest
import torch
from evaluation_toys import byte_tokenizer, numpy_state, random_judge, sentences, tiny_gpt2, trained_judge
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from cdlm.core.errors import CdlmError
from cdlm.evaluation.judge import Judge
from cdlm.evaluation.metrics.ar_nll import ar_nll

TEXTS = ["the cat", "", "a", "Grüße, 世界! 🙂", "x" * 50, " a dog sees a tree. " * 9, "my aunt", "old books."]
JUDGE = random_judge()


def reference_nats(judge: Judge, ids: list[int]) -> list[float]:
    """-log p of tokens 1, 2, ... in one plain pass."""
    with torch.no_grad():
        logp = judge.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-logp[i - 1, ids[i]].item() for i in range(1, len(ids))]


def test_equal_logits_cost_ln_v_per_token():
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied with the output layer: all logits are 0
    result = ar_nll(Judge(model, byte_tokenizer(), "uniform"), TEXTS)
    assert result.nats_per_token == pytest.approx(math.log(256), abs=1e-6)
    assert result.interval95 == pytest.approx((math.log(256), math.log(256)), abs=1e-6)
    ascii_only = ar_nll(Judge(model, byte_tokenizer(), "uniform"), ["abcdef"])
    assert ascii_only.bits_per_char == pytest.approx(8, abs=1e-5)


def test_equals_a_plain_forward_pass():
    text = "a dog sees the sea."
    expected = reference_nats(JUDGE, JUDGE.encode([text])[0].ids)
    result = ar_nll(JUDGE, [text])
    assert result.text_nats[0] == pytest.approx(sum(expected), rel=1e-5)
    assert (result.tokens, result.chars) == (len(text) - 1, len(text) - 1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_batch_size_changes_nothing(batch_size):
    one, other = ar_nll(JUDGE, TEXTS, batch_size=1), ar_nll(JUDGE, TEXTS, batch_size=batch_size)
    np.testing.assert_allclose(other.text_nats, one.text_nats, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(other.text_tokens, one.text_tokens)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(len(TEXTS))))
def test_permuting_texts_permutes_results(order):
    plain, permuted = ar_nll(JUDGE, TEXTS), ar_nll(JUDGE, [TEXTS[i] for i in order])
    np.testing.assert_allclose(permuted.text_nats, plain.text_nats[list(order)], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(permuted.text_tokens, plain.text_tokens[list(order)])
    assert permuted.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-5)


def test_given_spans_are_context_and_not_scored():
    prompt, rest = "the cat sees", " a tree."
    whole = reference_nats(JUDGE, JUDGE.encode([prompt + rest])[0].ids)
    result = ar_nll(JUDGE, [prompt + rest], [[(0, len(prompt))]])
    assert result.text_nats[0] == pytest.approx(sum(whole[len(prompt) - 1 :]), rel=1e-5)
    assert (result.tokens, result.chars) == (len(rest), len(rest))
    middle = ar_nll(JUDGE, [prompt + rest], [[(3, 6), (8, 10)]])
    assert middle.tokens == len(prompt + rest) - 1 - 5
    nothing = ar_nll(JUDGE, [prompt], [[(0, len(prompt))]])
    assert (nothing.tokens, nothing.unscored) == (0, 1)
    assert math.isnan(nothing.nats_per_token)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 19), st.integers(0, 19))
def test_a_span_and_its_complement_add_up(a, b):
    text, (low, high) = "a dog sees the sea.", sorted((a, b))
    inside = ar_nll(JUDGE, [text], [[(0, low), (high, len(text))]])
    outside = ar_nll(JUDGE, [text], [[(low, high)]])
    whole = ar_nll(JUDGE, [text])
    assert inside.text_nats[0] + outside.text_nats[0] == pytest.approx(whole.text_nats[0], rel=1e-5)
    assert inside.chars + outside.chars == whole.chars


def test_empty_texts_are_counted_and_first_tokens_never_scored():
    result = ar_nll(JUDGE, ["", "  ", "a", "ab"])
    assert result.text_tokens.tolist() == [0, 1, 0, 1]
    assert (result.empty, result.unscored) == (2, 2)
    assert ar_nll(JUDGE, []).tokens == 0


def test_long_texts_are_scored_whole_with_half_a_window_of_context():
    text = "".join(sentences(7, seed=3))
    ids, context = JUDGE.encode([text])[0].ids, JUDGE.context
    assert len(ids) > 3 * context
    expected = reference_nats(JUDGE, ids[:context])
    while len(expected) < len(ids) - 1:
        start = (len(expected) + 1) - context // 2
        expected += reference_nats(JUDGE, ids[start : start + context])[context // 2 - 1 :]
    result = ar_nll(JUDGE, [text])
    assert result.tokens == len(ids) - 1 == len(expected)
    assert result.text_nats[0] == pytest.approx(sum(expected), rel=1e-5)


def test_a_token_the_tokenizer_adds_is_context_only():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    judge = Judge(tiny_gpt2(vocab_size=257), tokenizer, "with bos")
    result = ar_nll(judge, ["abc", ""])
    assert result.text_tokens.tolist() == [2, 0]
    expected = reference_nats(judge, judge.encode(["abc"])[0].ids)
    assert result.text_nats[0] == pytest.approx(sum(expected[1:]), rel=1e-5)


def test_characters_of_many_bytes_count_once():
    text = "aé世🙂b"  # 1 + 2 + 3 + 4 + 1 bytes, so as many tokens
    result = ar_nll(JUDGE, [text])
    assert (result.tokens, result.chars) == (10, 4)
    assert result.bits_per_char == pytest.approx(result.text_nats[0] / math.log(2) / 4)


def test_shuffled_text_is_worse_for_a_judge_that_learnt_the_language():
    real = sentences(40, seed=9)
    draw = np.random.default_rng(0)
    shuffled = ["".join(draw.permutation(list(text))) for text in real]
    good, bad = ar_nll(trained_judge(), real), ar_nll(trained_judge(), shuffled)
    assert good.nats_per_token < 1.2 < 3 < bad.nats_per_token
    assert good.interval95[0] < good.nats_per_token < good.interval95[1] < bad.interval95[0]


def test_wrong_arguments_are_explained():
    with pytest.raises(CdlmError, match="given spans for each of 2 texts, got 1"):
        ar_nll(JUDGE, ["a", "b"], [[]])
    with pytest.raises(CdlmError, match="batch size"):
        ar_nll(JUDGE, ["a"], batch_size=0)


def test_the_global_random_states_stay_untouched():
    before = torch.get_rng_state(), numpy_state()
    ar_nll(JUDGE, TEXTS)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == numpy_state()
