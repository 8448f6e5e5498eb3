"""Laws of prompts: what is written is what the model is given, whatever its brackets, and whatever reads it."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from foreign import TINY, copy_of, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toys import TEXT, tokenizer, with_tokenizer
from transformers import PreTrainedTokenizerFast

import cdlm
from cdlm.cli.groups import PromptOptions, read_prompts
from cdlm.core.errors import CdlmError
from cdlm.masked.checkpoints.model import open_checkpoint
from cdlm.sampling.prompts import MOST_POSITIONS, checked_prompts, encode_prompt, pieces_of, text_of_prompt
from cdlm.sampling.requests import requests
from cdlm.sampling.texts import text_of

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-[]()\\ \n\t<|>"
WORDS = (
    "the",
    "cat",
    " sat",
    " on the roof",
    ".",
    ", and",
    "s",
    " ",
    "  ",
    "\n",
    "1",
    "[x]",
    "(2)",
    " 8]",
    "'s",
    "-",
    "é",
)


# --- brackets ---


def template_of(pieces: list[tuple[str, int]]) -> str:
    """The template that says these texts and holes: backslashes before brackets with digits are doubled."""
    written = ""
    for text, size in pieces:
        literal = re.sub(r"(\\*)(\[[0-9]+\])", lambda m: f"{2 * m[1]}\\{m[2]}", text)
        if size:  # the backslashes that end the text stand before a hole, and so does one blank, which is the hole's
            ends = len(literal) - len(literal.rstrip("\\"))
            literal += "\\" * ends + (" " if literal.endswith(" ") else "") + f"[{size}]"
        written += literal
    return written


@given(st.lists(st.tuples(st.text("ab[]\\ 0189\n", max_size=8), st.integers(1, 99)), max_size=4), st.text("a[]\\8 "))
def test_every_text_can_be_written_in_a_template(pieces: list[tuple[str, int]], last: str) -> None:
    whole = [*pieces, (last, 0)]
    spans_a_hole = re.search(r"\[[0-9]*$", "".join(text for text, _ in whole))  # digits that the next piece would end
    split = any(re.search(r"\[[0-9]*$", text) for text, _ in pieces)
    if not spans_a_hole and not split:
        assert pieces_of(template_of(whole)) == whole


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a [8] b", [("a", 8), (" b", 0)]),
        (r"a \[8] b", [("a [8] b", 0)]),
        (r"a \\[8] b", [("a \\", 8), (" b", 0)]),
        (r"a \\\[8]", [(r"a \[8]", 0)]),
        ("a  [8]", [("a ", 8), ("", 0)]),  # one blank is the hole's
        ("a\t[8]\n[9]", [("a\t", 8), ("\n", 9), ("", 0)]),
        (r"C:\n \x \\ \[x] \[", [(r"C:\n \x \\ \[x] \[", 0)]),  # backslashes elsewhere are text
        *(
            (text, [(text, 0)])
            for text in ("[٣]", "[ 8]", "[8 ]", "[-1]", "[8", "8]", "[]", "[8.5]", "[x]", "[+1]", "[\uff18]")
        ),
        ("[[8]]", [("[", 8), ("]", 0)]),
        ("[1][2]", [("", 1), ("", 2), ("", 0)]),
    ],
)
def test_what_is_a_hole(prompt: str, pieces: list[tuple[str, int]]) -> None:
    assert pieces_of(prompt) == pieces


@pytest.mark.parametrize("hole", ["[0]", "[00]", "[08]", "[" + "0" * 5000 + "]"])
def test_a_hole_of_nothing_is_refused_and_can_be_text(hole: str) -> None:
    with pytest.raises(CdlmError, match="a hole has 1 token or more") as caught:
        requests([f"the cat{hole} sat"], 1, 40, tokenizer())
    assert len(str(caught.value)) < 300
    assert pieces_of(f"\\{hole}") == [(hole, 0)]
    assert encode_prompt(tokenizer(), hole, template=False) == ids(hole)


def test_plain_text_has_no_holes_and_no_escapes() -> None:
    text = r"a[0] = b[12] \[8] \\[8] "
    assert encode_prompt(tokenizer(), text, template=False) == ids(text)
    samples = cdlm.generate(with_tokenizer(), [text], template=False, length=60, steps=1)
    assert samples.texts[0].startswith(text)
    assert samples.prompts == [text]
    escaped = cdlm.generate(with_tokenizer(), [r"x\[8] "], length=20, steps=1)
    assert escaped.texts[0].startswith("x[8] ")


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# --- what cannot be ---


@pytest.mark.parametrize(
    "prompt",
    ["[1]" * 10**5, "[" * 10**5, "\\" * 10**5, "[99999999999]", "[9]" * 9, "a" * 10**5, "x[1]" * 10**5],
    ids=len,
)
def test_long_prompts_are_refused_at_once(prompt: str) -> None:
    with pytest.raises(CdlmError, match="shorten it"):
        requests([prompt], 1, 64, tokenizer())


@pytest.mark.parametrize("prompt", [f"[{MOST_POSITIONS + 1}]", "[1]" * (MOST_POSITIONS + 1), "[99999999999]"], ids=len)
def test_no_row_has_more_holes_than_positions(prompt: str) -> None:
    with pytest.raises(CdlmError, match="shorten it"):
        encode_prompt(tokenizer(), prompt)


@pytest.mark.parametrize(
    "text", ["", " ", "  \n\t ", "a\0b", "\ufdd0", "\U0010ffff", "<|endoftext|>", "<|mask|> <|pad|>", "None"]
)
def test_strange_texts_come_back(text: str) -> None:
    found = encode_prompt(tokenizer(), text)
    assert found == ids(text)
    assert text_of(tokenizer(), [token for token in found if token is not None]) == text


def test_an_end_of_text_beside_its_name_is_a_line_break() -> None:
    end = tokenizer().eos_token_id
    assert isinstance(end, int)
    assert text_of(tokenizer(), [*ids("a <|endoftext|>"), end, *ids("b"), end]) == "a <|endoftext|>\nb\n"


BAD: list[tuple[Any, bool, str]] = [
    ("the cat", False, "got the text 'the cat': put it into a list"),
    (["\ud800"], False, "not valid Unicode"),
    ([b"a"], False, "a prompt is a text, got b'a'"),
    (b"a", False, "prompts is a list of texts, got b'a'"),
    ({"a"}, False, "prompts is a list of texts, got {'a'}"),
    ({"role": "user", "content": "a"}, True, "prompts is a list of texts, got {'role'"),
    ([], False, "there are no prompts"),
    ([[]], True, "a list of one or more messages"),
    (None, True, "give prompts, or leave it out"),
    ([{"role": "user", "content": "a"}], False, "a conversation needs chat"),
    ([[{"role": "user", "content": "a"}]], False, "a conversation needs chat"),
    ([[1, 2]], False, "to continue tokens use cdlm.decode"),
    ([[1, 2]], True, "a message is"),
    ([{"role": "user"}], True, "with these two fields, got {'role': 'user'}"),
    ([{"role": "user", "content": 5}], True, "the content of a message is a text, got 5"),
    ([{"role": None, "content": "a"}], True, "the role of a message is a text, got None"),
    ([{"role": "user", "content": "\ud800"}], True, "not valid Unicode"),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        True,
        "the last message is the assistant's",
    ),
]


@pytest.mark.parametrize(("prompts", "chat", "says"), BAD, ids=[says for _, _, says in BAD])
def test_prompts_that_are_none(prompts: Any, chat: bool, says: str) -> None:
    with pytest.raises(CdlmError, match=re.escape(says)) as caught:
        checked_prompts(prompts, chat)
    assert "\n" not in str(caught.value)


# --- tokenizers ---


def trained(model: Any, trainer: Any, before: Any, decoder: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = before, decoder
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator([*TEXT, *ALPHABET, *(f"a{sign}" for sign in ALPHABET)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def metaspace(scheme: str, unigram: bool = False) -> PreTrainedTokenizerFast:
    special = ["<unk>", "</s>"]
    if unigram:
        model, trainer = (
            models.Unigram(),
            trainers.UnigramTrainer(
                vocab_size=150,
                special_tokens=special,
                unk_token="<unk>",
                initial_alphabet=list(ALPHABET),
                show_progress=False,
            ),
        )
    else:
        model, trainer = (
            models.BPE(unk_token="<unk>"),
            trainers.BpeTrainer(
                vocab_size=150, special_tokens=special, initial_alphabet=list(ALPHABET), show_progress=False
            ),
        )
    before, after = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme)
    return trained(model, trainer, before, after)


def byte_level(prefix: bool) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel())


def llama() -> PreTrainedTokenizerFast:
    """As Llama 2: blanks are written by the normaliser, and words are not set apart."""
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], initial_alphabet=[*ALPHABET, "▁"], show_progress=False
    )
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.Split("\n", "isolated"), decoder, normalizer)


def word_piece(lower: bool = False) -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], initial_alphabet=list(ALPHABET), show_progress=False
    )
    normalizer = normalizers.BertNormalizer(lowercase=True) if lower else None
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        pre_tokenizers.WhitespaceSplit(),
        decoders.WordPiece(cleanup=False),
        normalizer,
    )


def lower_metaspace() -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], initial_alphabet=list(ALPHABET), show_progress=False
    )
    before, after = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(models.BPE(unk_token="<unk>"), trainer, before, after, normalizers.Lowercase())


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level, prefix": lambda: byte_level(True),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, never": lambda: metaspace("never"),
    "unigram, first": lambda: metaspace("first", unigram=True),
    "unigram, always": lambda: metaspace("always", unigram=True),
    "llama": llama,
    "word pieces": word_piece,
}


@cache
def kind_of(name: str) -> PreTrainedTokenizerFast:
    return KINDS[name]()


def templated(texts: list[str], size: int) -> str:
    """The texts with holes between: a blank before a hole is the hole's."""
    return "".join(text + " " * text.endswith(" ") + f"[{size}]" for text in texts[:-1]) + texts[-1]


def filled(reader: PreTrainedTokenizerFast, tokens: list[int | None]) -> str:
    """The text with an x in each place to generate."""
    names = [name for name in ("##x", "x") if name in reader.get_vocab()]
    place = reader.convert_tokens_to_ids(names[0])
    assert isinstance(place, int)
    return str(reader.decode([place if token is None else token for token in tokens], skip_special_tokens=False))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40)
@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join), min_size=2, max_size=4))
def test_behind_a_hole_stands_what_was_written(name: str, texts: list[str]) -> None:
    if name == "word pieces":  # which has one kind of blank, and none that ends a text
        texts = [re.sub(r"\s+", " ", text).rstrip() for text in texts]
    if "byte" not in name:
        texts = [text.replace("é", "e") for text in texts]
    texts[0] = texts[0].lstrip() or "a"  # at the beginning of a whole text a tokenizer does as it does
    shown = filled(kind_of(name), encode_prompt(kind_of(name), templated(texts, 2)))
    assert shown.removeprefix(" ") == "xx".join(texts)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from([*WORDS, "猫", "\U0001f600"]), max_size=4).map("".join), min_size=2, max_size=4)
)
def test_a_byte_level_tokenizer_reads_each_text_alone(texts: list[str]) -> None:
    expected: list[int | None] = [*ids(texts[0])]
    for text in texts[1:]:
        expected += [None, *ids(text)]
    assert encode_prompt(tokenizer(), templated(texts, 1)) == expected


def test_a_tokenizer_without_capitals_keeps_the_blanks() -> None:
    reader = lower_metaspace()
    assert filled(reader, encode_prompt(reader, "The[1]Cat [1] SAT.")) == "thexcatx sat."


# --- conversations ---

ENDS = {"llada": ("<|eot_id|>", 124), "Dream": ("<|im_end|>", 125)}
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the mat?"},
]


@cache
def reader_of(family: str) -> PreTrainedTokenizerFast:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(copy_of(family, Path(folder)), family)
        found = open_checkpoint(Path(folder)).tokenizer
    assert found is not None
    return found


@pytest.mark.parametrize("family", TINY)
def test_a_conversation_is_what_the_template_makes_of_it(family: str) -> None:
    reader = reader_of(family)
    text = str(reader.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True))
    assert encode_prompt(reader, TALK, chat=True) == reader.encode(text, add_special_tokens=False)
    assert encode_prompt(reader, "the cat", chat=True) == encode_prompt(reader, TALK[:1], chat=True)


@pytest.mark.parametrize("family", TINY)
@given(
    st.lists(
        st.sampled_from(["<|eot_id|>", "<|im_end|>", "<|mdm_mask|>", "<|mask|>", "the cat", " [8] ", "<", "\ufdd0"]),
        max_size=5,
    )
)
def test_what_is_said_is_text(family: str, parts: list[str]) -> None:
    """A message cannot end its turn, nor hold the mask, by writing the name of a token."""
    reader, said = reader_of(family), "".join(parts)
    tokens = [t for t in encode_prompt(reader, said, chat=True) if t is not None]
    plain = [t for t in encode_prompt(reader, "", chat=True) if t is not None]
    special = [token for token in tokens if token >= 120]
    assert special == [token for token in plain if token >= 120]
    first, last, before = (123, 124, "") if family == "llada" else (124, 125, "user ")
    message = tokens[tokens.index(first) + 1 : tokens.index(last)]
    alone = encode_prompt(reader, before + said, template=False)
    assert reader.decode(message) == reader.decode([token for token in alone if token is not None])


@pytest.mark.parametrize("family", TINY)
def test_names_of_tokens_are_tokens_in_a_template_of_a_foreign_model(family: str, tmp_path: Path) -> None:
    write_tokenizer(copy_of(family, tmp_path), family)
    model, (name, token) = cdlm.load(tmp_path, device="cpu"), ENDS[family]
    session = cdlm.open_session(model)
    (template,) = session.requests([f"the cat{name}"], new_tokens=2)
    (plain,) = session.requests([f"the cat{name}"], new_tokens=2, template=False)
    assert token in template.tokens.tolist()
    assert token not in plain.tokens.tolist()
    (talk,) = session.requests(TALK, new_tokens=2, chat=True)
    assert talk.prompt == json.dumps(TALK)
    assert len(session.requests([TALK, TALK, "the cat"], 2, new_tokens=2, chat=True)) == 6


@pytest.mark.parametrize("family", TINY)
def test_a_conversation_begins_with_the_systems_message(family: str, tmp_path: Path) -> None:
    write_tokenizer(copy_of(family, tmp_path), family)
    session = cdlm.open_session(cdlm.load(tmp_path, device="cpu"))
    first = {"role": "system", "content": "the door"}
    spelt = session.requests([[first, *TALK], [first, {"role": "user", "content": "a cat"}]], new_tokens=2, chat=True)
    found = session.requests([TALK, "a cat"], new_tokens=2, chat=True, system="the door")
    for one, other in zip(found, spelt, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.prompt == other.prompt
    assert found[0].tokens.tolist() != session.requests([TALK, "a cat"], new_tokens=2, chat=True)[0].tokens.tolist()
    with pytest.raises(CdlmError, match="begins with a system's message, 'the door': leave out system"):
        session.requests([[first, *TALK]], new_tokens=2, chat=True, system="another")


SYSTEMS: list[tuple[Any, bool, Any, str]] = [
    (["a"], False, "b", "give prompts and chat"),
    (None, True, "b", "give prompts and chat"),
    (["a"], True, " ", "a text, got ' '"),
    (["a"], True, 5, "a text, got 5"),
    (["a"], True, "\ud800", "not valid Unicode"),
]


@pytest.mark.parametrize(("prompts", "chat", "system", "says"), SYSTEMS)
def test_systems_messages_that_are_none(prompts: Any, chat: bool, system: Any, says: str) -> None:
    unchecked: Callable[..., Any] = getattr(checked_prompts, "__wrapped__", checked_prompts)  # types speak first here
    with pytest.raises(CdlmError, match=re.escape(says)) as caught:
        unchecked(prompts, chat, system)
    assert "\n" not in str(caught.value)


def test_a_template_without_a_systems_message_is_not_silent() -> None:
    reader = PreTrainedTokenizerFast(tokenizer_object=reader_of("llada").backend_tokenizer)
    reader.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    talk = [{"role": "system", "content": " the door "}, *TALK[:1]]
    with pytest.raises(CdlmError, match="leaves out the system's message"):
        encode_prompt(reader, talk, chat=True)
    reader.chat_template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    assert encode_prompt(reader, talk, chat=True)


@pytest.mark.parametrize("family", TINY)
def test_as_many_tokens_as_published_unless_told_otherwise(family: str, tmp_path: Path) -> None:
    write_tokenizer(copy_of(family, tmp_path), family)
    model = cdlm.load(tmp_path, device="cpu")
    with pytest.raises(CdlmError, match=r"are \d+ positions, and .* was made for 64"):
        cdlm.open_session(model).requests(["the cat"], new_tokens=63)
    model.length = 4096  # as long as the published ones
    session = cdlm.open_session(model)

    def open_(prompts: list[str], **how: Any) -> list[int]:
        return [int((~request.given).sum()) for request in session.requests(prompts, **how)]

    published = {"llada": 128, "Dream": 512}[family]
    assert open_(["the cat"]) == open_(["the cat"], chat=True) == [published]
    assert open_(["the [3] sat", "[2]"]) == [3, 2]
    assert open_(["the [3] sat", "the cat"], new_tokens=4) == [7, 4]
    with pytest.raises(CdlmError, match="some prompts have holes, others none: give new_tokens"):
        open_(["the [3] sat", "the cat"])
    with pytest.raises(CdlmError, match="no length beside it"):
        open_(["the cat"], length=9)


@pytest.mark.parametrize("family", TINY)
def test_a_checkpoint_knows_the_end_of_a_turn(family: str, tmp_path: Path) -> None:
    write_tokenizer(copy_of(family, tmp_path), family)
    assert open_checkpoint(tmp_path).end_ids == (120, ENDS[family][1])


def test_prompts_as_samples_name_them() -> None:
    assert text_of_prompt(None) is None
    assert text_of_prompt("a [8]") == "a [8]"
    assert json.loads(str(text_of_prompt(TALK))) == TALK


# --- files ---


def test_prompts_of_a_file_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in ({"prompt": "a\nb [2]"}, {"messages": TALK})) + "\n\n")
    assert read_prompts(file) == ["a\nb [2]", TALK]
    assert PromptOptions(prompts=file).texts() == ["a\nb [2]", TALK]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("the cat", "line 2: expected one JSON object"), ("[1]", "line 2: expected {"), ("5", "line 2: expected {"),
        ('{"prompt": 5}', "line 2: expected {"), ('{"text": "a"}', "line 2: expected {"),
        ('{"prompt": "a", "messages": []}', "line 2: expected {"), ('{"prompt": "\\ud800"}', "line 2: the prompt"),
        ('{"messages": []}', "line 2: a conversation is a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: a message is"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(CdlmError, match=re.escape(f"{file}, {says}")):
        read_prompts(file)
