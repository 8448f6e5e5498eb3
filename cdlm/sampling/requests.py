"""Requests: what is to be generated, and the prompts around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cdlm.core.checks import check_flag, shown
from cdlm.core.errors import CdlmError
from cdlm.sampling.prompts import (
    MOST_POSITIONS,
    MOST_SAMPLES,
    Prompt,
    checked_prompts,
    encode_prompt,
    text_of_prompt,
    too_long,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Asked:
    """What is asked of a model, before its tokens are known.

    Args:
        prompts: as `checked_prompts` gives them; None draws from nothing.
        n: samples of each prompt, or in all where there are none.
        length: positions of a sample; None leaves them to the model.
        new_tokens: of a masked model, positions after each prompt.
        chat: of a masked model, the prompts, texts and conversations, are put into its chat template.
        template: "[8]" in a prompt is a hole; if not, prompts are plain text.

    Raises:
        CdlmError: one of them is of another kind, or too large.
    """

    prompts: Sequence[Prompt] | None = None
    n: int = 1
    length: int | None = None
    new_tokens: int | None = None
    chat: bool = False
    template: bool = True

    def __post_init__(self) -> None:
        check_flag("what is asked", chat=self.chat, template=self.template)
        check_count(self.n, 1 if self.prompts is None else len(self.prompts))
        if self.length is not None:
            check_length(self.length)
        if self.new_tokens is not None and not (type(self.new_tokens) is int and self.new_tokens == 0):
            _check_size("new_tokens is the number of tokens to generate after a prompt", self.new_tokens)


def check_count(n: object, prompts: int) -> None:
    """Raise unless `n` is a number of samples of each of so many prompts."""
    _check_size("n is the number of samples", n, MOST_SAMPLES)
    if isinstance(n, int) and n * prompts > MOST_SAMPLES:
        raise CdlmError(f"{n} samples of {prompts} prompts are more than the {MOST_SAMPLES:,} of one run: take several")


def check_length(length: object) -> None:
    """Raise unless it is a number of positions."""
    _check_size("length is the number of tokens of a sample", length)


def _check_size(what: str, value: object, most: int = MOST_POSITIONS) -> None:
    if type(value) is not int or value < 1:
        raise CdlmError(f"{what} and must be >= 1, got {shown(value)}")
    if value > most:
        raise CdlmError(f"{what} and must be at most {most:,}, got {shown(value)}")


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

    def __post_init__(self) -> None:
        for name, kind in (("tokens", torch.int64), ("given", torch.bool), ("valid", torch.bool)):
            value = getattr(self, name)
            if value is None and name == "valid":
                continue
            if not isinstance(value, Tensor) or value.dtype != kind or value.shape != (self.tokens.numel(),):
                raise CdlmError(
                    f"the {name} of a request are a tensor of {str(kind).removeprefix('torch.')} with one axis as long"
                    f" as its tokens, got {shown(value)}"
                )
        if type(self.index) is not int or not 0 <= self.index < 2**63:
            raise CdlmError(f"the index of a request is a whole number from 0 on, got {shown(self.index)}")
        if self.start is not None and (type(self.start) is not int or not 0 <= self.start <= len(self.tokens)):
            raise CdlmError(f"the start of a request is a place in it or None, got {shown(self.start)}")
        for name in ("prompt", "answer"):
            if not isinstance(getattr(self, name), str | None):
                raise CdlmError(f"the {name} of a request is a text or None, got {shown(getattr(self, name))}")


def requests(
    prompts: Sequence[Prompt] | None, n: int, length: int, tokenizer: PreTrainedTokenizerFast | None, first: int = 0,
    template: bool = True,
) -> list[Request]:  # fmt: skip
    """`n` samples of each prompt (or of none), numbered from `first`; the samples of a prompt are neighbours.

    A prompt without holes is a prefix: what follows it is generated up to `length`. One with holes, such as
    "The [8] sat on the [2].", is generated only there, 8 and 2 tokens, and ends where it ends: see
    `cdlm.sampling.prompts`. Without `template` every prompt is a prefix.
    """
    asked = Asked(checked_prompts(prompts, False), n, length, template=template)
    check_length(length)
    if asked.prompts is None or tokenizer is None:
        rows = [(torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool))]
    else:
        rows = [_row(encode_prompt(tokenizer, p, template=template, most=length), p, length) for p in asked.prompts]
    ragged = any(len(tokens) < length for tokens, _ in rows)
    padded = [_pad(tokens, given, length, ragged) for tokens, given in rows]
    texts = [text_of_prompt(prompt) for prompt in asked.prompts or [None]]
    return [Request(first + i, *padded[i // n], prompt=texts[i // n]) for i in range(n * len(padded))]


def check_requests(requests: object) -> None:
    """Raise unless they are a list of one or more requests."""
    if not isinstance(requests, Sequence) or not all(isinstance(request, Request) for request in requests):
        raise CdlmError(f"a run needs a list of requests, got {shown(requests)}: make them with session.requests")
    if not requests:
        raise CdlmError("a run needs requests, got none: make some with session.requests")


def check_run(requests: Sequence[Request]) -> None:
    """Raise unless they can be served together: requests of the same length, each with an index of its own."""
    check_requests(requests)
    if len(lengths := {len(request.tokens) for request in requests}) > 1:
        raise CdlmError(
            f"the requests of a run have one length, got {min(lengths)} and {max(lengths)}: pad the shorter"
        )
    if len({request.index for request in requests}) < len(requests):
        raise CdlmError("two requests of a run have the same index, which fixes the sample: give each another")
    if any(int(tokens.min()) < 0 for tokens in {id(r.tokens): r.tokens for r in requests}.values() if len(tokens)):
        raise CdlmError("a token of a request is a whole number >= 0, got a negative one")


def firsts(requests: Sequence[Request]) -> list[int]:
    """Of each request the place of the first one that asks for the same, whatever their numbers and texts."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_content(request), i) for i, request in enumerate(requests)]


def _content(request: Request) -> tuple[Any, ...]:
    tokens = request.tokens.masked_fill(~request.given, 0)
    parts = (tokens, request.given, request.valid)
    return request.start, *(None if part is None else part.numpy().tobytes() for part in parts)


def _row(prompt: list[int | None], written: Prompt, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and what is given of a prompt, whose holes are open, or of a prefix, behind which all is."""
    whole = prompt if None in prompt else [*prompt, *[None] * (length - len(prompt))]
    if None not in whole:
        raise too_long(str(written), len(prompt), length)
    return torch.tensor([token or 0 for token in whole]), torch.tensor([token is not None for token in whole])


def _pad(
    tokens: Int[Tensor, " k"], given: Bool[Tensor, " k"], length: int, ragged: bool
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, " n"] | None]:
    missing = length - len(tokens)
    valid = torch.arange(length) < len(tokens) if ragged else None
    tokens = torch.cat([tokens, torch.zeros(missing, dtype=torch.int64)])
    return tokens, torch.cat([given, torch.ones(missing, dtype=torch.bool)]), valid


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
    part = _constrained(length, {} if constraints is None else constraints)
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
    found = prompts.tolist() if isinstance(prompts, Tensor | np.ndarray) else prompts
    if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping | Set):
        raise CdlmError(f"prompts is a list of prompts, each a list of tokens, got {shown(prompts)}")
    rows = [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in islice(found, MOST_SAMPLES + 1)]
    for row in rows:
        if isinstance(row, str | bytes) or not isinstance(row, Sequence):
            raise CdlmError(
                f"a prompt is a list of tokens, got {shown(row)}: give a list of prompts, each a list of numbers"
            )
        for token in row:
            _check_token(token)
    return [list(row) for row in rows]


def _check_token(token: object) -> None:
    if token is not None and (isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**63):
        raise CdlmError(f"a token is a whole number >= 0, got {shown(token)}; None stands for a position to generate")


def _check_canvases(prompts: Sequence[Sequence[int | None]], length: int, n: int) -> None:
    if not prompts:
        raise CdlmError("there are no prompts: give one or more; [[]] is one that says nothing")
    check_count(n, len(prompts))
    if isinstance(length, bool) or not isinstance(length, int):
        raise CdlmError(f"length is a whole number of tokens, got {shown(length)}")
    if length < 0 or (length == 0 and not all(None in prompt for prompt in prompts)):
        raise CdlmError(f"length is the number of tokens to generate and must be >= 1, got {shown(length)}")
    longest = max(len(prompt) for prompt in prompts)
    if length + longest > MOST_POSITIONS:
        raise CdlmError(
            f"a prompt of {longest} tokens and {shown(length)} to generate are more than the {MOST_POSITIONS:,}"
            " positions of a row: take fewer"
        )


def _constrained(length: int, constraints: Mapping[int, int]) -> list[int | None]:
    if not isinstance(constraints, Mapping):
        raise CdlmError(f"constraints are tokens by their place, such as {{8: 312}}, got {shown(constraints)}")
    outside = [place for place in constraints if type(place) is not int or not 0 <= place < length]
    if outside:
        raise CdlmError(f"a constraint at {shown(outside[0])} lies outside the generated positions 0 to {length - 1}")
    for token in constraints.values():
        _check_token(token)
    return [constraints.get(place) for place in range(length)]


def stack_masks(masks: list[Tensor | None], device: torch.device) -> Tensor | None:
    """Masks of requests, stacked; None if none has one."""
    present = [mask for mask in masks if mask is not None]
    return torch.stack(present).to(device) if present else None
