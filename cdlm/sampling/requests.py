"""Requests: what is to be generated, and the prompts around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cdlm.core.errors import CdlmError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HOLE = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True, eq=False)
class Request:
    """One sample to draw."""

    index: int
    """Its number: with the run's seed it fixes the sample's noise."""
    tokens: Int[Tensor, " n"]
    """Prompt tokens; ignored where not given."""
    given: Bool[Tensor, " n"]
    """True at prompt positions and padding; at least one position must be open."""
    valid: Bool[Tensor, " n"] | None = None
    """False on padding; None when no request of the run has any."""
    start: int | None = None
    """Where generation begins, from which blocks are counted; by default at the first open position."""
    prompt: str | None = None
    """The text that the tokens came from; None if there was none."""
    answer: str | None = None
    """The number that a right solution ends with, where the sample is to solve a problem."""


def requests(
    prompts: list[str] | None, n: int, length: int, tokenizer: PreTrainedTokenizerFast | None, first: int = 0
) -> list[Request]:
    """`n` samples of each prompt (or of none), numbered from `first`; the samples of a prompt are neighbours.

    A prompt without holes is a prefix: what follows it is generated up to `length`. One with holes, such as
    "The [8] sat on the [2].", is generated only there, 8 and 2 tokens, and ends where it ends.
    Blanks before a hole belong to the hole.
    """
    if type(n) is not int or n < 1:
        raise CdlmError(f"n is the number of samples and must be >= 1, got {n!r}")
    if type(length) is not int or length < 1:
        raise CdlmError(f"length is the number of tokens of a sample and must be >= 1, got {length!r}")
    if prompts is not None and not prompts:
        raise CdlmError("there are no prompts: give one or more, or leave them out")
    if prompts is None or tokenizer is None:
        rows = [(torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool))]
    else:
        rows = [_parse(prompt, length, tokenizer) for prompt in prompts]
    ragged = any(len(tokens) < length for tokens, _ in rows)
    padded = [_pad(tokens, given, length, ragged) for tokens, given in rows]
    texts = [None] if prompts is None else prompts
    return [Request(first + i, *padded[i // n], prompt=texts[i // n]) for i in range(n * len(padded))]


def prompt_texts(prompts: Iterable[str] | None) -> list[str] | None:
    """The prompts as a list of texts.

    Raises:
        CdlmError: they are one text and no list, or one of them is no text, or no Unicode.
    """
    if prompts is None:
        return None
    if isinstance(prompts, str):
        raise CdlmError(f"prompts is a list of texts, got the text {prompts[:40]!r}: put it into a list")
    if not isinstance(prompts, Iterable):
        raise CdlmError(f"prompts is a list of texts, got {prompts!r}")
    texts = list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise CdlmError(f"a prompt is a text, got {text!r}; to continue tokens use cdlm.decode")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise CdlmError(f"the prompt {text[:40]!r} is not valid Unicode: write it in UTF-8")
    return texts


def _fill(prompt: str, length: int, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Tokens of the prompt's text, 0 in its holes, and which of them are text."""
    parts = _HOLE.split(prompt)  # text, number, text, number, ..., text
    tokens: list[int] = []
    given: list[bool] = []
    for place, part in enumerate(parts):
        if place < len(parts) - 1:
            part = part.rstrip(" ")  # the blank before a hole belongs to the token that fills it
        ids = _hole(part, length) if place % 2 else tokenizer.encode(part, add_special_tokens=False)
        tokens += ids
        given += [place % 2 == 0] * len(ids)
    return tokens, given


def _parse(prompt: str, length: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    tokens, given = _fill(prompt, length, tokenizer)
    if not _HOLE.search(prompt) and len(tokens) < length:
        given += [False] * (length - len(tokens))
        tokens += [0] * (length - len(tokens))
    if len(tokens) > length or all(given):
        raise CdlmError(
            f"the prompt {prompt[:40]!r} has {len(tokens)} tokens and the model's length is {length}:"
            " shorten it, so that something is left to generate"
        )
    return torch.tensor(tokens), torch.tensor(given)


def _hole(number: str, length: int) -> list[int]:
    """That many tokens, or one more than fit: the digits may be any."""
    return [0] * (min(int(number), length + 1) if len(number) < 10 else length + 1)


def _pad(
    tokens: Int[Tensor, " k"], given: Bool[Tensor, " k"], length: int, ragged: bool
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, " n"] | None]:
    missing = length - len(tokens)
    valid = torch.arange(length) < len(tokens) if ragged else None
    tokens = torch.cat([tokens, torch.zeros(missing, dtype=torch.int64)])
    return tokens, torch.cat([given, torch.ones(missing, dtype=torch.bool)]), valid


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str, chat: bool = False) -> list[int | None]:
    """Tokens of a prompt, in which "[8]" is eight positions to generate; of a message in the chat template if `chat`.

    Raises:
        CdlmError: the tokenizer has no chat template.
    """
    if not chat:
        tokens, given = _fill(prompt, 2**31, tokenizer)
        return [token if fixed else None for token, fixed in zip(tokens, given, strict=True)]
    if not tokenizer.chat_template:
        raise CdlmError("the tokenizer has no chat template: leave out chat, and write the whole prompt")
    message = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template's language has its own kinds
        raise CdlmError(f"the chat template cannot be used ({first_line(error)}): write the whole prompt") from error
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def canvases(
    prompts: Iterable[Any],
    length: int,
    n: int = 1,
    constraints: Mapping[int, int] | None = None,
    first: int = 0,
) -> list[Request]:
    """`n` samples of each prompt of tokens, followed by `length` positions to generate; numbered from `first`.

    Prompts of different lengths are padded on the left, so that what is generated stands in the same columns.

    Args:
        prompts: lists of tokens, or a tensor or array of them; None stands for a position to generate.
        length: >= 0, and >= 1 unless every prompt has something to generate.
        constraints: tokens given in the generated part, by their place in it, such as a suffix "The answer is".
    """
    rows_of_tokens = _rows_of_tokens(prompts)
    _check_canvases(rows_of_tokens, length, n)
    part = _constrained(length, constraints or {})
    rows = [[*prompt, *part] for prompt in rows_of_tokens]
    width = max(len(row) for row in rows)
    ragged = any(len(row) < width for row in rows)
    made = []
    for row in rows:
        padding = width - len(row)
        whole = [0] * padding + row
        given = torch.tensor([token is not None for token in whole])
        tokens = torch.tensor([token or 0 for token in whole])
        valid = torch.arange(width) >= padding if ragged else None
        made.append((tokens, given, valid, width - length if length else None))
    return [Request(first + i, *made[i // n]) for i in range(n * len(made))]


def _rows_of_tokens(prompts: Any) -> list[list[int | None]]:
    """Prompts as lists, also from tensors and arrays."""
    rows = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    for row in rows:
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise CdlmError(
                f"a prompt is a list of tokens, got {row!r}: give a list of prompts, each a list of numbers"
            )
        for token in row:
            _check_token(token)
    return [list(row) for row in rows]


def _check_token(token: object) -> None:
    if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
        raise CdlmError(f"a token is a whole number >= 0, got {token!r}; None stands for a position to generate")


def _check_canvases(prompts: Sequence[Sequence[int | None]], length: int, n: int) -> None:
    if type(n) is not int or n < 1:
        raise CdlmError(f"n is the number of samples and must be >= 1, got {n!r}")
    if isinstance(length, bool) or not isinstance(length, int):
        raise CdlmError(f"length is a whole number of tokens, got {length!r}")
    if not prompts:
        raise CdlmError("there are no prompts: give one or more; [[]] is one that says nothing")
    if length < 0 or (length == 0 and not all(None in prompt for prompt in prompts)):
        raise CdlmError(f"length is the number of tokens to generate and must be >= 1, got {length}")


def _constrained(length: int, constraints: Mapping[int, int]) -> list[int | None]:
    outside = [place for place in constraints if not isinstance(place, int) or not 0 <= place < length]
    if outside:
        raise CdlmError(f"a constraint at {outside[0]} lies outside the generated positions 0 to {length - 1}")
    for token in constraints.values():
        _check_token(token)
    return [constraints.get(place) for place in range(length)]


def stack_masks(masks: list[Tensor | None], device: torch.device) -> Tensor | None:
    """Masks of requests, stacked; None if none has one."""
    present = [mask for mask in masks if mask is not None]
    return torch.stack(present).to(device) if present else None
