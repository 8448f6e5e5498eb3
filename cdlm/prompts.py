"""Prompts: text whose holes are to be filled."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cdlm.errors import CdlmError
from cdlm.sampling import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HOLE = re.compile(r"\[(\d+)\]")


def requests(
    prompts: list[str] | None, n: int, length: int, tokenizer: PreTrainedTokenizerFast, first: int = 0
) -> list[Request]:
    """`n` samples of each prompt (or of none), numbered from `first`; the samples of a prompt are neighbours.

    A prompt without holes is a prefix: what follows it is generated up to `length`. One with holes, such as
    "The [8] sat on the [2].", is generated only there, 8 and 2 tokens, and ends where it ends.
    Blanks before a hole belong to the hole.
    """
    if n < 1:
        raise CdlmError(f"n is the number of samples and must be >= 1, got {n}")
    if length < 1:
        raise CdlmError(f"length is the number of tokens of a sample and must be >= 1, got {length}")
    if prompts is not None and not prompts:
        raise CdlmError("there are no prompts: give one or more, or leave them out")
    if prompts is None:
        rows = [(torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool))]
    else:
        rows = [_parse(prompt, length, tokenizer) for prompt in prompts]
    ragged = any(len(tokens) < length for tokens, _ in rows)
    padded = [_pad(tokens, given, length, ragged) for tokens, given in rows]
    return [Request(first + i, *padded[i // n]) for i in range(n * len(padded))]


def _parse(prompt: str, length: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    parts = _HOLE.split(prompt)  # text, number, text, number, ..., text
    tokens: list[int] = []
    given: list[bool] = []
    for place, part in enumerate(parts):
        if place < len(parts) - 1:
            part = part.rstrip(" ")  # the blank before a hole belongs to the token that fills it
        ids = _hole(part, length) if place % 2 else tokenizer.encode(part, add_special_tokens=False)
        tokens += ids
        given += [place % 2 == 0] * len(ids)
    if len(parts) == 1 and len(tokens) < length:
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
