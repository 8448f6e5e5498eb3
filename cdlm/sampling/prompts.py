"""Prompts: from what a user writes to tokens, and positions to generate between them.

A hole, `[8]`, is a number of tokens to generate: ASCII digits in brackets, from 1 on and without leading zeros. All
else in brackets is text. A backslash before a hole makes it text, `\\[8]`; of a row of backslashes before a hole each
two are one, and one that is left makes it text. Backslashes elsewhere are text.

One blank before a hole belongs to the hole, because it is a part of the token that fills it. All other text is given as
it is written: what a tokenizer does at the beginning of a text is not done behind a hole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import islice
from typing import TYPE_CHECKING, Any

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
"""What one side says in a conversation: its `role` and its `content`."""
Prompt = str | Sequence[Message]
"""A text, or a conversation."""
MOST_POSITIONS = 2**17
"""Of a row: more than the context of any model here."""
MOST_SAMPLES = 10**6
"""Of one run, whose rows are kept in memory."""

_HOLE = re.compile(r"(?<!\\)(\\*)\[([0-9]+)\]")
# What a text may be encoded behind: letters, and signs that tokenizers set apart.
_BEFORE = ("a", "q", "z", "x", "1", ".", "~", "\n", "#", "-")


def checked_prompts(prompts: object, chat: bool, system: str | None = None) -> list[Prompt] | None:
    """The prompts as a list; a list of messages alone is one conversation.

    Args:
        chat: they are conversations, or a user's messages.
        system: with `chat`, what each conversation begins with, as a message of the system.

    Raises:
        CdlmError: they are one text and no list, one of them is no text and no conversation, or no Unicode, or there
            are messages without `chat`, or `chat` without prompts; or a system's message without `chat`, or before
            another one.
    """
    if system is not None:
        _check_system(system, chat, prompts)
    if prompts is None:
        if chat is True:
            raise CdlmError("chat puts prompts into a template: give prompts, or leave it out")
        return None
    found = _listed(prompts, "prompts")
    if found and all(isinstance(part, Mapping) for part in found):
        found = [found]
    if not found:
        raise CdlmError("there are no prompts: give one or more, or leave them out")
    checked = [_checked(prompt, chat) for prompt in found]
    return checked if system is None else [_begun(prompt, system) for prompt in checked]


def _check_system(system: object, chat: bool, prompts: object) -> None:
    if not isinstance(system, str) or not system.strip():
        raise CdlmError(f"system is what a conversation begins with, a text, got {shown(system)}")
    check_unicode(system, "the system's message")
    if not chat or prompts is None:
        raise CdlmError("system is a message before conversations: give prompts and chat, or leave it out")


def _begun(prompt: Prompt, system: str) -> list[Message]:
    """The conversation behind a message of the system."""
    messages = conversation_of(prompt)
    if messages[0]["role"] == "system":
        raise CdlmError(
            f"a conversation begins with a system's message, {shown(messages[0]['content'])}: leave out system"
        )
    return [{"role": "system", "content": system}, *messages]


def conversation_of(prompt: Prompt) -> list[Message]:
    """A conversation, of which a text is the user's first message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def checked_answers(answers: object) -> list[str]:
    """Answers as a list.

    Raises:
        CdlmError: they are one text and no list, there are none, or one of them is no text, or no Unicode.
    """
    found = _listed(answers, "answers")
    if not found:
        raise CdlmError("there are no answers: give one for each prompt")
    for answer in found:
        if not isinstance(answer, str):
            raise CdlmError(f"an answer is a text, got {shown(answer)}")
        check_unicode(answer, "the answer")
    return found


def _listed(texts: object, what: str) -> list[Any]:
    if isinstance(texts, str):
        raise CdlmError(f"{what} is a list of texts, got the text {texts[:40]!r}: put it into a list")
    unordered = isinstance(texts, Mapping | Set | bytes | bytearray)
    try:
        found = None if unordered or not isinstance(texts, Iterable) else list(islice(texts, MOST_SAMPLES + 1))
    except TypeError:  # of a tensor without axes
        found = None
    if found is None:
        raise CdlmError(f"{what} is a list of texts, got {shown(texts)}")
    return found


def _checked(prompt: object, chat: bool) -> Prompt:
    if isinstance(prompt, str):
        check_unicode(prompt, "the prompt")
        return prompt
    conversation = isinstance(prompt, list | tuple) and (chat or any(isinstance(part, Mapping) for part in prompt))
    if not conversation:
        raise CdlmError(f"a prompt is a text, got {shown(prompt)}; to continue tokens use cdlm.decode")
    if not chat:
        raise CdlmError(f"a prompt is a text, got {shown(prompt)}: a conversation needs chat")
    return checked_messages(prompt)


def checked_messages(messages: object) -> list[Message]:
    """A conversation: one message or more, of which the assistant's is not the last.

    Raises:
        CdlmError: it is no such list.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise CdlmError(f"a conversation is a list of one or more messages, got {shown(messages)}")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise CdlmError(
                f'a message is {{"role": "user", "content": "a text"}}, with these two fields, got {shown(message)}'
            )
        for name, value in message.items():
            if not isinstance(value, str):
                raise CdlmError(f"the {name} of a message is a text, got {shown(value)}")
            check_unicode(value, f"the {name} of a message")
    if messages[-1]["role"] == "assistant":
        raise CdlmError("the last message is the assistant's: end with what it is to answer")
    return [dict(message) for message in messages]


def check_unicode(text: str, what: str) -> None:
    """Raise if the text has half characters, which no file and no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise CdlmError(f"{what} {text[:40]!r} is not valid Unicode: write it in UTF-8")


def text_of_prompt(prompt: Prompt | None) -> str | None:
    """The prompt as samples and files name it: a text itself, a conversation as JSON."""
    return prompt if prompt is None or isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False)


def pieces_of(prompt: str) -> list[tuple[str, int]]:
    """The texts of a template, each with the number of tokens to generate behind it; 0 behind the last.

    Raises:
        CdlmError: a hole has no tokens.
    """
    pieces, text, end = [], "", 0
    for found in _HOLE.finditer(prompt):
        slashes, digits = found.groups()
        text += prompt[end : found.start()] + slashes[: len(slashes) // 2]
        end = found.end()
        if len(slashes) % 2:
            text += f"[{digits}]"
        else:
            pieces.append((text.removesuffix(" "), _size(digits)))
            text = ""
    return [*pieces, (text + prompt[end:], 0)]


def _size(digits: str) -> int:
    """The number, or one more than any row has: the digits may be any."""
    if digits.startswith("0"):
        raise CdlmError(
            f"a hole has 1 token or more, written without leading zeros, got [{digits[:40]}]: for that text write"
            rf" \[{digits[:40]}], or give the prompt with template=False"
        )
    return int(digits) if len(digits) < 10 else MOST_POSITIONS + 1


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, *, chat: bool = False, template: bool = True,
    names: bool = False, most: int = MOST_POSITIONS,
) -> list[int | None]:  # fmt: skip
    """Tokens of a prompt; None where one is to be generated.

    Args:
        chat: the prompt is a conversation or a user's message, put into the chat template. What is said is text.
        template: "[8]" is eight positions to generate; if not, the prompt is plain text.
        names: in a template the name of a special token is that token; if not, it is text.
        most: positions that there may be.

    Raises:
        CdlmError: there are more positions, or the tokenizer has no chat template or cannot use it.
    """
    if chat:
        return [*_chat(tokenizer, conversation_of(prompt))]
    if not isinstance(prompt, str):
        raise CdlmError(f"a prompt is a text, got {shown(prompt)}: a conversation needs chat")
    pieces = pieces_of(prompt) if template else [(prompt, 0)]
    holes = sum(size for _, size in pieces)
    if holes > most:  # before there are so many
        raise too_long(prompt, holes if holes <= MOST_POSITIONS else f"more than {MOST_POSITIONS}", most)
    known: dict[str, list[int]] = {}
    tokens: list[int | None] = []
    for place, (text, size) in enumerate(pieces):
        if place == 0:
            tokens += encode_text(tokenizer, text, names and template)
        else:
            if text not in known:
                known[text] = _behind(tokenizer, text, names and template)
            tokens += known[text]
        tokens += [None] * size
    if len(tokens) > most:
        raise too_long(prompt, len(tokens), most)
    return tokens


def encode_pair(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, answer: str, *, chat: bool = False, template: bool = True,
    names: bool = False,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Tokens of a prompt without holes, and of an answer behind it, which is plain text.

    A blank that ends the prompt is a part of the answer's first token, as a blank before a hole is. Otherwise the
    prompt's tokens are those of `encode_prompt`.

    Raises:
        CdlmError: as `encode_prompt`, or the prompt has a hole.
    """
    if isinstance(prompt, str) and not chat and prompt.endswith(" "):
        prompt, answer = prompt.removesuffix(" "), f" {answer}"
    tokens = encode_prompt(tokenizer, prompt, chat=chat, template=template, names=names)
    given = [token for token in tokens if token is not None]
    if len(given) < len(tokens):
        raise CdlmError(
            f"the prompt {shown(prompt, 40)} has a hole, and an answer stands behind its prompt: write brackets that"
            r" are text as \[8], or give the prompt with template=False"
        )
    return given, _behind(tokenizer, answer, False) if given else encode_text(tokenizer, answer, False)


def too_long(prompt: str, tokens: int | str, most: int) -> CdlmError:
    """The error for a prompt that leaves nothing to generate."""
    return CdlmError(
        f"the prompt {prompt[:40]!r} has {tokens} tokens and the model's length is {most}: shorten it, so that"
        " something is left to generate"
    )


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, names: bool) -> list[int]:
    """Tokens of a text; names of special tokens are these tokens, or text as training text is encoded."""
    made = tokenizer(
        text, add_special_tokens=False, split_special_tokens=not names, return_attention_mask=False,
        return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    return list(made["input_ids"])


def _behind(tokenizer: PreTrainedTokenizerFast, text: str, names: bool) -> list[int]:
    """Tokens of a text that stands behind a hole.

    Encoded alone, "sat" is "▁sat" for some tokenizers, with a blank that nobody wrote. So the text is also encoded
    behind a sign, as "asat", and the tokens of the sign are cut off. The first tokens that decode to the text are
    taken. A tokenizer that drops capitals gives no text back: of it, the first that keep the blank at the beginning.
    """
    if not text:
        return []
    alone, near = encode_text(tokenizer, text, names), None
    for sign in _BEFORE:
        before = encode_text(tokenizer, sign, names)
        start = len(_decoded(tokenizer, before))
        whole = encode_text(tokenizer, sign + text, names)
        apart = [whole[len(before) :]] if whole[: len(before)] == before else []
        for tokens in (alone, *apart):
            found = _decoded(tokenizer, before + tokens)[start:]
            if found == text:
                return tokens
            if near is None and found[:1].isspace() == text[:1].isspace():
                near = tokens
    return alone if near is None else near


def _decoded(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to the beginning of the answer.

    Names of special tokens are these tokens where the template has them, and text in what is said: there a mark, which
    no template knows, breaks them until the template's own are found.
    """
    if not tokenizer.chat_template:
        raise CdlmError("the tokenizer has no chat template: leave out chat, and write the whole prompt")
    names = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    any_name = re.compile("|".join(map(re.escape, names)) or "(?!)")
    said = set("".join(value for message in messages for value in message.values()))
    mark = next(sign for sign in map(chr, range(0xFDD0, 0x110000)) if sign not in said)  # from where no text has any
    text = _rendered(tokenizer, [_each(message, lambda v: any_name.sub(_broken(mark), v)) for message in messages])
    for message in messages:
        if message["role"] == "system" and message["content"].strip() not in text.replace(mark, ""):
            raise CdlmError("the chat template leaves out the system's message: say it in the user's, without system")
    if mark not in text:
        return encode_text(tokenizer, text, True)
    tokens, end = [], 0
    for found in [*any_name.finditer(text), None]:
        between = text[end : len(text) if found is None else found.start()].replace(mark, "")
        tokens += encode_text(tokenizer, between, False)
        if found is not None:
            tokens.append(int(tokenizer.added_tokens_encoder[found[0]]))
            end = found.end()
    return tokens


def _each(message: Message, change: Callable[[str], str]) -> dict[str, str]:
    return {name: change(value) for name, value in message.items()}


def _broken(mark: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[0][0]}{mark}{found[0][1:]}"


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # the template's language has its own kinds
        raise CdlmError(f"the chat template cannot be used ({first_line(error)}): write the whole prompt") from error
