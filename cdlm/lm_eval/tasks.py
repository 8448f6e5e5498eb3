"""From what a task asks for to rows of a model, and from rows to answers. Nothing here knows the harness."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from cdlm.core.checks import check_number, shown
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import Text
from cdlm.sampling.prompts import check_unicode, encode_text
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.texts import special_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEW_TOKENS = 256
"""Of an answer, where neither the model's arguments nor the task say how many; as of the harness's own models."""
NEAREST = 0.75
"""The shortest row of a run over its longest: what is beyond would mostly be padding."""
_SIZES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_USED = frozenset({"until", "do_sample", "temperature", *_SIZES})


@dataclass(frozen=True)
class Wanted:
    """What a task asks of an answer.

    Args:
        until: the answer ends before the first of these.
        most: tokens; None if the task does not say.
        temperature: None unless the task asks for samples.
        unused: settings that no model here has.
    """

    until: tuple[str, ...] = ()
    most: int | None = None
    temperature: float | None = None
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Wanted:
        """From the harness's generation settings.

        "Greedy" (`do_sample: false`, or temperature 0) asks an autoregressive model for its best answer. How a
        diffusion model gives that is not a matter of the task, so it leaves the model's own temperature as it is.

        Raises:
            CdlmError: a setting is of a wrong kind.
        """
        until = settings.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until) if isinstance(until, list | tuple) else [until]
        if not all(isinstance(stop, str) for stop in stops):
            raise CdlmError(f"the until of a task is a list of texts, got {shown(until)}")
        sizes = [settings[name] for name in _SIZES if settings.get(name) is not None]
        if sizes and (type(sizes[0]) is not int or sizes[0] < 1):
            raise CdlmError(f"the max_gen_toks of a task is a whole number >= 1, got {shown(sizes[0])}")
        drawn = settings.get("temperature") or 0.0
        check_number("a task", least=0.0, temperature=drawn)
        samples = settings.get("do_sample", drawn > 0) and drawn > 0
        return cls(
            tuple(filter(None, stops)), sizes[0] if sizes else None, float(drawn) if samples else None,
            tuple(sorted(settings.keys() - _USED)),
        )  # fmt: skip

    def cut(self, text: str) -> str:
        """The text before the first stop."""
        return text[: min((text.index(stop) for stop in self.until if stop in text), default=len(text))]


class Question(NamedTuple):
    """A prompt, and what is generated behind it."""

    prompt: list[int]
    room: int
    """Positions to generate."""
    most: int | None
    """Tokens of the answer that are kept."""
    wanted: Wanted
    number: int
    """Of the sample: it depends on the prompt alone, and on how often that came before."""

    @property
    def size(self) -> int:
        """Positions of the row."""
        return len(self.prompt) + self.room


class Scored(NamedTuple):
    """Tokens to score behind others that are given."""

    given: list[int]
    target: list[int]
    key: int
    """Of the noise: equal for all that is scored behind one prompt, so that options are compared on equal noise."""

    @property
    def size(self) -> int:
        """Positions of the row."""
        return len(self.given) + len(self.target)


def name_of(text: str) -> int:
    """A whole number below 2**62 that a text always has."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def numbered(texts: Iterable[str]) -> list[int]:
    """A number of each text; of equal texts each has another."""
    seen: Counter[str] = Counter()
    found = []
    for text in texts:
        found.append(name_of(f"{seen[text]} {text}"))
        seen[text] += 1
    return found


def encode(tokenizer: PreTrainedTokenizerFast, text: str, *, names: bool) -> list[int]:
    """Tokens of a text.

    Args:
        names: the name of a special token is that token, as a chat template writes it; if not, it is text.
    """
    check_unicode(text, "the prompt")
    return encode_text(tokenizer, text, names)


def encode_pair(
    tokenizer: PreTrainedTokenizerFast, context: str, answer: str, *, names: bool
) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, as the harness divides them.

    Blanks at the end of the context belong to the answer. Both are encoded as one text and divided where the context
    alone would end; if nothing is left behind it, the answer is encoded alone.
    """
    bare = context.rstrip()
    context, answer = bare, context[len(bare) :] + answer
    given = encode(tokenizer, context, names=names)
    whole = encode(tokenizer, context + answer, names=names)
    if len(whole) > len(given):
        return whole[: len(given)], whole[len(given) :]
    return given, encode(tokenizer, answer, names=names)


def windows(tokens: Sequence[int], length: int, key: int) -> Iterator[Scored]:
    """A long text in parts of at most `length` positions: each token is scored once, and the last part has as much
    before it as fits."""
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        first = max(0, end - length)
        yield Scored(list(tokens[first:start]), list(tokens[start:end]), key + start)


def runs_of(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """The places of rows that are padded to one length, the longest first.

    Args:
        rows: in flight. A run has more of them only as long as the next is not much shorter than its longest.
    """
    runs: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if runs and (len(runs[-1]) < rows or sizes[place] >= NEAREST * sizes[runs[-1][0]]):
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def rows_of(questions: Sequence[Question]) -> list[Request]:
    """A request for each question, padded on the left to one length."""
    made = canvases([[*q.prompt, *[None] * q.room] for q in questions], 0)
    return [
        Request(q.number, row.tokens, row.given, row.valid, row.start) for q, row in zip(questions, made, strict=True)
    ]


def alike(parts: Sequence[Scored], draws: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The places of parts with the same number of draws and of positions: without padding, a part has the same noise
    whatever stands beside it."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, (part, count) in enumerate(zip(parts, draws, strict=True)):
        found.setdefault((count, part.size), []).append(place)
    for (count, _), places in sorted(found.items(), reverse=True):
        yield count, places


def text_to_score(parts: Sequence[Scored]) -> Text:
    """Rows to score, all of one length."""
    tokens = torch.tensor([[*part.given, *part.target] for part in parts])
    target = torch.arange(tokens.shape[1]) >= torch.tensor([len(part.given) for part in parts])[:, None]
    return Text(tokens, target, None, torch.tensor([[part.key] for part in parts]))


@dataclass(frozen=True)
class Reader:
    """Texts of answers.

    Args:
        special: tokens that are no text.
    """

    tokenizer: PreTrainedTokenizerFast
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Reader:
        """Without the special tokens of a tokenizer, but the one that joins documents, a line break."""
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        return cls(tokenizer, frozenset(special - {special_of(tokenizer).eos_id}))

    def answer(self, question: Question, tokens: Int[np.ndarray, " k"]) -> str:
        """The text behind the prompt, up to the first stop."""
        ids = [token for token in tokens.tolist()[: question.most] if token not in self.special]
        before = text_of(self.tokenizer, question.prompt)
        whole = text_of(self.tokenizer, [*question.prompt, *ids])
        return question.wanted.cut(whole[len(before) :] if whole.startswith(before) else text_of(self.tokenizer, ids))
