"""Laws of prompts, of collecting samples and of dividing them among processes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import system, tokenizer, with_tokenizer

from cdlm import api
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.core.errors import CdlmError
from cdlm.core.types import HaltReason
from cdlm.halting import Patience
from cdlm.halting.signals import RECORDED
from cdlm.sampling.requests import requests
from cdlm.sampling.samples import Samples
from cdlm.sampling.texts import given_spans, text_of

LENGTH = 12


@pytest.fixture(scope="module")
def model() -> EmbeddingDiffusion:
    return with_tokenizer()


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


# --- parsing ---


def test_without_prompts_everything_is_open() -> None:
    asked = requests(None, 3, LENGTH, tokenizer(), first=7)
    assert [request.index for request in asked] == [7, 8, 9]
    assert not any(bool(request.given.any()) for request in asked)
    assert all(request.valid is None and len(request.tokens) == LENGTH for request in asked)


@pytest.mark.parametrize("text", ["the cat", "the", "", "añ — 猫"])
def test_a_prefix_is_given_and_the_rest_is_open(text: str) -> None:
    (request,) = requests([text], 1, 40, tokenizer())
    count = len(ids(text))
    assert request.tokens[:count].tolist() == ids(text)
    assert request.given.tolist() == [True] * count + [False] * (40 - count)
    assert request.valid is None


def test_a_template_is_open_in_its_holes_alone() -> None:
    (request,) = requests(["the [3] sat on[2]."], 1, 40, tokenizer())
    start, middle, end = ids("the"), ids(" sat on"), ids(".")
    count = len(start) + 3 + len(middle) + 2 + len(end)
    given_ = [True] * len(start) + [False] * 3 + [True] * len(middle) + [False] * 2 + [True] * len(end)
    assert request.given.tolist() == given_ + [True] * (40 - count)
    assert request.tokens[: len(start)].tolist() == start
    assert request.tokens[count - 1] == end[0]
    assert request.valid is not None
    assert request.valid.tolist() == [True] * count + [False] * (40 - count)


def test_a_template_of_the_whole_length_has_no_padding() -> None:
    (request,) = requests([f"the[{LENGTH - len(ids('the'))}]"], 1, LENGTH, tokenizer())
    assert request.valid is None
    assert not bool(request.given[len(ids("the")) :].any())


def test_one_short_template_gives_every_row_a_mask() -> None:
    first, second = requests(["the cat", "[2]"], 1, LENGTH, tokenizer())
    assert first.valid is not None
    assert bool(first.valid.all())
    assert second.valid is not None
    assert int(second.valid.sum()) == 2


def test_the_samples_of_a_prompt_are_neighbours() -> None:
    asked = requests(["the", "a"], 3, LENGTH, tokenizer(), first=2)
    assert [request.index for request in asked] == [2, 3, 4, 5, 6, 7]
    assert [int(request.tokens[0]) for request in asked] == [ids("the")[0]] * 3 + [ids("a")[0]] * 3


@pytest.mark.parametrize(
    "prompt",
    [
        "the cat " * 9,
        "[13]",
        "the cat[0]",
        "[0]",
        "the [3] cat [10]",
        f"[{10**15}]",
        f"[{'9' * 5000}]",
    ],
    ids=lambda prompt: f"{prompt[:10]}..{len(prompt)}",
)
def test_prompts_that_do_not_fit_are_refused(prompt: str) -> None:
    with pytest.raises(CdlmError) as caught:
        requests([prompt], 1, LENGTH, tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("prompts", "n", "length"), [(None, 0, 5), (["a"], -1, 5), ([], 1, 5), (None, 1, -1)])
def test_asking_for_nothing_is_refused(prompts: list[str] | None, n: int, length: int) -> None:
    with pytest.raises(CdlmError):
        requests(prompts, n, length, tokenizer())


# --- samples ---


def test_prompts_stay_in_the_output(model: EmbeddingDiffusion) -> None:
    samples = api.generate(model, n=2, prompts=["the cat", "a dog ran"], length=30, steps=3)
    for text, prompt in zip(samples.texts, ["the cat", "the cat", "a dog ran", "a dog ran"], strict=True):
        assert text.startswith(prompt)


def test_padding_is_in_neither_text_nor_tokens(model: EmbeddingDiffusion) -> None:
    prompts = ["the [2] sat", "the cat"]
    samples = api.generate(model, n=1, prompts=prompts, length=20, steps=3)
    short, long = samples.rows()
    assert len(short["tokens"]) == len(ids("the")) + 2 + len(ids(" sat"))
    assert len(long["tokens"]) == 20
    assert short["text"].startswith("the")
    assert short["text"].endswith(" sat")
    assert samples.tokens.shape == (2, 20)
    assert samples.valid.sum(1).tolist() == [len(short["tokens"]), 20]


def test_padding_does_not_change_a_sample(model: EmbeddingDiffusion) -> None:
    """A short template draws the same noise whatever stands beside it; its padding is unseen."""
    exact = len(ids("the")) + 4
    alone = api.generate(model, prompts=["the [4]"], length=exact, steps=6)
    beside = api.generate(model, prompts=["the [4]", "the"], length=exact, steps=6)
    assert beside.texts[0] == alone.texts[0]


@settings(max_examples=15)
@given(words=st.lists(st.sampled_from(["the cat ", "añ", "猫猫", "on the roof", "\n", " "]), min_size=1, max_size=3))
def test_spans_point_at_the_characters_of_the_prompt(words: list[str]) -> None:
    model = with_tokenizer()
    samples = api.generate(model, prompts=["[1]".join(words), words[0]], length=60, steps=1)
    lines = samples.rows()
    for line, parts in zip(lines, (words, words[:1]), strict=True):
        holes = sum(bytes_left(line["tokens"], line["text"]))
        if holes == 0:
            given_texts = [*(part.rstrip(" ") for part in parts[:-1]), parts[-1]]  # blanks before a hole are its own
            assert [line["text"][start:end] for start, end in line["given"]] == [text for text in given_texts if text]


def bytes_left(tokens: list[int], text: str) -> list[bool]:
    """Whether characters were lost because generated bytes are no UTF-8, after which spans can only be near."""
    return [char == "\N{REPLACEMENT CHARACTER}" for char in text]


def test_spans_of_known_tokens() -> None:
    parts = ["the cat", " sat", " on the", " mat"]
    tokens = [i for part in parts for i in ids(part)]
    given_ = np.array([k % 2 == 0 for k, part in enumerate(parts) for _ in ids(part)])
    assert given_spans(tokenizer(), tokens, given_) == [(0, 7), (11, 18)]
    assert given_spans(tokenizer(), tokens, ~given_) == [(7, 11), (18, 22)]
    assert given_spans(tokenizer(), tokens, given_ | True) == [(0, 22)]
    assert given_spans(tokenizer(), tokens, given_ & False) == []


def test_the_end_of_text_is_a_line_break() -> None:
    end = tokenizer().eos_token_id
    assert isinstance(end, int)
    assert text_of(tokenizer(), [*ids("the cat"), end, *ids("a dog")]) == "the cat\na dog"


def same(a: Samples, b: Samples) -> None:
    for name in ("tokens", "nfe", "steps", "index", "given", "valid", "settled"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert (a.texts, a.reason, a.seed, a.budget) == (b.texts, b.reason, b.seed, b.budget)
    assert (a.record is None) == (b.record is None)
    if a.record is not None and b.record is not None:
        assert np.array_equal(a.record.t, b.record.t, equal_nan=True)
        assert np.array_equal(a.record.nfe, b.record.nfe)
        for key, values in a.record.signals.items():
            assert np.allclose(values, b.record.signals[key], rtol=1e-4, atol=1e-5, equal_nan=True), key
        by_place = [sorted(zip(*(part.tolist() for part in r.switches), strict=True)) for r in (a.record, b.record)]
        assert by_place[0] == by_place[1]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_dealt_shares_merge_to_the_single_run(model: EmbeddingDiffusion, world: int) -> None:
    session = api.open_session(model, steps=6, seed=4).with_criterion(Patience(2)).recorded()
    asked = requests(["the [3] sat", "a"], 3, LENGTH, tokenizer())
    whole = replace(session, batch_size=6).run(asked)
    parts = [replace(session, batch_size=2).run(asked[rank::world]) for rank in range(world)]
    same(Samples.merge(parts), whole)
    same(Samples.merge(parts[::-1]), whole)


def test_records_are_numbers_exactly_while_a_row_is_there(model: EmbeddingDiffusion) -> None:
    samples = api.generate(model, n=8, length=6, steps=12, halt="Patience(3)", record=True)
    assert samples.record is not None
    assert set(samples.record.signals) == set(RECORDED)
    there = np.arange(12)[:, None] < samples.steps
    assert not there.all()
    for name, values in samples.record.signals.items():
        assert values.shape == (12, 8)
        first = (name == "score_cosine") & (np.arange(12)[:, None] == 0)  # which has no step before it
        assert np.array_equal(~np.isnan(values), there & ~first), name
    assert (samples.record.switch_counts()[0] == 6).all()
    assert (samples.record.signals["mean_entropy"][there] <= math.log(270) + 1e-4).all()


def test_without_record_there_is_none(model: EmbeddingDiffusion) -> None:
    assert api.generate(model, steps=2).record is None


def test_reasons_and_steps_agree(model: EmbeddingDiffusion) -> None:
    samples = api.generate(model, n=4, steps=10, halt="FixedSteps(4)")
    assert samples.steps.tolist() == samples.nfe.tolist() == [4] * 4
    assert samples.reason == [HaltReason.CRITERION] * 4
    assert samples.budget == 10
    assert samples.calls_after_end.tolist() == [0] * 4  # a continuous model decides every position to the last step
    full = api.generate(model, n=4, steps=10)
    assert full.reason == [HaltReason.BUDGET] * 4
    assert full.steps.tolist() == [10] * 4


def test_samples_are_in_the_order_of_the_requests(model: EmbeddingDiffusion) -> None:
    asked = requests(None, 5, LENGTH, tokenizer())
    session = api.open_session(model, steps=6, batch_size=2).with_criterion(Patience(2))
    forward, backward = (session.run(order) for order in (asked, asked[::-1]))
    assert backward.index.tolist() == [4, 3, 2, 1, 0]
    same(Samples.merge([backward]), forward)


def test_a_sample_is_fixed_by_seed_and_index(model: EmbeddingDiffusion) -> None:
    before = torch.random.get_rng_state()
    one = api.generate(model, n=3, steps=4, seed=1)
    assert api.generate(model, n=3, steps=4, seed=1).texts == one.texts
    assert api.generate(model, n=2, steps=4, seed=1).texts == one.texts[:2]
    assert api.generate(model, n=3, steps=4, seed=2).texts != one.texts
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_system_without_a_tokenizer_says_so() -> None:
    with pytest.raises(CdlmError, match="tokenizer"):
        api.generate(system(270), length=4, steps=2)
