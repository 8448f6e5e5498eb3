"""Tokenizers: lossless, deterministic, told apart by content."""

import io
import json
import re
import socket
import time
from logging import StreamHandler
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdlm.core.errors import CdlmError
from cdlm.data.stories import stories
from cdlm.data.tokenizer import (
    LONGEST_WORD,
    USUAL_SIZE,
    _without_long_words,
    encode_batch,
    load_tokenizer,
    train_tokenizer,
)
from cdlm.models.foreign import tokenizer_hash

TEXTS = list(stories(300, 0))
TOKENIZER = train_tokenizer(TEXTS, 300)


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(encode_batch(TOKENIZER, [text])[0]) == text


@pytest.mark.parametrize(
    "text", [" a , b . n't  ", "\r\n\t\n", "naïve 北京 😀\u200d", "<|endoftext|><|pad|> x <|mask|>"]
)
def test_awkward_text_comes_back_without_special_tokens(text):
    ids = encode_batch(TOKENIZER, [text])[0]
    assert TOKENIZER.decode(ids) == text
    assert min(ids) > 2


def test_special_tokens_and_size():
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, TOKENIZER.mask_token_id) == (0, 1, 2)
    assert len(TOKENIZER) == 300
    assert TOKENIZER("Anna went")["input_ids"] == encode_batch(TOKENIZER, ["Anna went"])[0]  # nothing is added


def test_training_is_deterministic_and_depends_on_the_text():
    assert tokenizer_hash(train_tokenizer(iter(TEXTS), 300)) == tokenizer_hash(TOKENIZER)
    assert tokenizer_hash(train_tokenizer(["another text entirely " * 9, *TEXTS[:20]], 300)) != tokenizer_hash(
        TOKENIZER
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=60), max_size=20))
def test_long_words_are_cut_for_training_alone_and_others_never(texts):
    for text in [*texts, "".join(texts), " ".join(texts)]:
        assert list(_without_long_words(text)) == [text]
        long = text + LONGEST_WORD * "x" + text + 3 * LONGEST_WORD * " " + text
        pieces = list(_without_long_words(long))
        assert "".join(pieces) == long
        assert all(len(word) <= 2 * LONGEST_WORD for piece in pieces for word in re.findall(r"\S+|\s+", piece))


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "中", "😀", "ab", "\u200d"])
def test_a_line_of_one_character_is_learned_from_and_comes_back(unit):
    line = (300_000 // len(unit.encode())) * unit
    made = train_tokenizer([*TEXTS, line], 300)
    assert made.decode(encode_batch(made, [line])[0]) == line


def test_the_hash_survives_calls_and_saving(tmp_path):
    before = tokenizer_hash(TOKENIZER)
    TOKENIZER(["a", "longer one"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(TOKENIZER) == before
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_hash(loaded) == before
    assert loaded.mask_token_id == 2
    assert encode_batch(loaded, TEXTS) == encode_batch(TOKENIZER, TEXTS)


def test_the_hash_sees_the_special_ids(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    loaded.eos_token = "<|pad|>"
    assert tokenizer_hash(loaded) != tokenizer_hash(TOKENIZER)


def test_too_little_text_says_how_much_it_supports():
    with pytest.raises(CdlmError, match="supports a vocabulary of 262 tokens, 5000") as error:
        train_tokenizer(["aaa aaa"], 5000)
    assert "262 or less" in str(error.value)
    assert len(train_tokenizer(["aaa aaa"], 262)) == 262


def test_by_default_there_are_as_many_tokens_as_the_text_supports_or_the_usual_number() -> None:
    small = train_tokenizer(TEXTS)
    assert 300 < len(small) < USUAL_SIZE
    with pytest.raises(CdlmError, match=f"a vocabulary of {len(small)} tokens"):
        train_tokenizer(TEXTS, len(small) + 1)
    syllables = [f"{first}{second}" for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = (f"{one}{two} {one}{two}" for one in syllables for two in syllables)
    assert len(train_tokenizer(words)) == USUAL_SIZE


def test_too_small_a_vocabulary():
    with pytest.raises(CdlmError, match="at least 259"):
        train_tokenizer(TEXTS, 258)


@pytest.mark.parametrize("size", [2**20 + 1, 10**9, 10**30])
def test_a_size_that_would_ask_for_all_memory_is_refused(size):
    with pytest.raises(CdlmError, match="at most 1048576"):
        train_tokenizer(TEXTS, size)


def test_a_tokenizer_without_eos(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    settings_file = Path(tmp_path, "tokenizer_config.json")
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"eos_token": None}))
    with pytest.raises(CdlmError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_a_foreign_config_beside_the_tokenizer_is_no_concern(tmp_path):
    from transformers.utils import logging

    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "LangFlow"}')
    before, said = logging.get_verbosity(), io.StringIO()
    handler = StreamHandler(said)
    logging.add_handler(handler)
    try:
        loaded = load_tokenizer(str(tmp_path))
    finally:
        logging.remove_handler(handler)
    assert said.getvalue() == ""
    assert logging.get_verbosity() == before
    assert tokenizer_hash(loaded) == tokenizer_hash(TOKENIZER)


def test_a_hub_that_cannot_be_reached_is_not_waited_for(tmp_path, monkeypatch):
    import huggingface_hub.constants

    asked, waited = [], []

    def unknown(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", waited.append)
    for name in ("nothere", "nobody/no-such-tokenizer"):
        with pytest.raises(CdlmError, match="no tokenizer could be loaded"):
            load_tokenizer(name)
    assert asked
    assert waited == []


def test_nothing_to_load(tmp_path, offline):
    for name in (str(tmp_path), str(tmp_path / "none"), "nobody/no-such-tokenizer"):
        with pytest.raises(CdlmError, match="offline") as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)
