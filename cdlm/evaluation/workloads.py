"""Workloads: samples that differ in how much there is to generate, made from text that a run holds out.

Without prompts all samples of a continuous model settle at about the same noise level, and a rule that looks at each
sample has little to gain over stopping all at one step. Here samples differ: in what is given, in length, or in how
hard they are.

A workload is drawn by number: item i is the same for the same run and seed, however many are drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from cdlm.core.checks import Settings, check_choice, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import Registry
from cdlm.core.rng import generator
from cdlm.data import arithmetic, sources
from cdlm.data.masking import Completion
from cdlm.data.order import Order
from cdlm.data.store import Row
from cdlm.data.tokenizer import encode_batch
from cdlm.evaluation.texts import RealText
from cdlm.sampling.requests import Request
from cdlm.sampling.texts import text_ids

ITEM = 0x776F
"""Purpose of random numbers: a word of their key, beside the seed and the number of the item."""


class Item(NamedTuple):
    """One sample to draw, and the real text in its place."""

    real: Int64[np.ndarray, " n"]
    """Tokens of the held-out text."""
    open: Bool[np.ndarray, " n"]
    """What is to be generated: at least one position."""
    valid: Bool[np.ndarray, " n"]
    """False on padding, where nothing is open."""
    prompt: str | None = None
    """The text that is given, where it is a text of its own."""
    answer: str = ""
    """The number that the sample should find."""


@dataclass(frozen=True)
class Work:
    """What a workload asks of a model, and the real text in the same places.

    Args:
        name: text of the workload.
        requests: numbered from 0.
        real: the held-out text of the same rows: where a request is given, its own tokens.
        answers: of problems, the right one of each; empty if nothing is asked.
    """

    name: str
    requests: Sequence[Request]
    real: Int64[np.ndarray, "m n"]
    answers: Sequence[str] = ()

    def part(self, rows: slice) -> Work:
        """Some of the samples."""
        return replace(self, requests=self.requests[rows], real=self.real[rows], answers=self.answers[rows])

    def right(self, texts: Sequence[str]) -> Float64[np.ndarray, " m"]:
        """1.0 where one of the first texts has the right answer."""
        return arithmetic.right(texts, self.answers[: len(texts)])


class Workload(Settings, ABC):
    """A law of requests, made from the held-out text of a run."""

    def draw(self, text: RealText, n: int, seed: int) -> Work:
        """The first `n` samples; fewer are the beginning of more.

        Args:
            text: of the run.
            seed: of the rows and of all that is drawn for them.

        Raises:
            CdlmError: the workload is longer than the model, or the run's text does not serve it.
        """
        check_whole("a workload", n=n)
        check_whole("a workload", least=0, seed=seed)
        items = self.items(text, n, seed)
        padded = self.pads(text)
        requests = [
            Request(
                i, torch.from_numpy(np.where(item.open, 0, item.real)), torch.from_numpy(~item.open),
                torch.from_numpy(item.valid) if padded else None, prompt=item.prompt, answer=item.answer or None,
            )
            for i, item in enumerate(items)
        ]  # fmt: skip
        answers = [item.answer for item in items if item.answer]
        return Work(repr(self), requests, np.stack([item.real for item in items]), answers)

    @abstractmethod
    def items(self, text: RealText, n: int, seed: int) -> list[Item]:
        """The first `n` items."""

    @abstractmethod
    def pads(self, text: RealText) -> bool:
        """Whether its rows may have padding on text of this kind."""


@dataclass(frozen=True)
class MixedPrompts(Workload):
    """A random share of each held-out row is given, and the rest is to be generated.

    The share is uniform in [least, most], and the positions are rounded down: of rows of 64 positions the defaults give
    0 to 60. Of a row that ends with its document, the document and its end are the row, and what follows is padding.

    Args:
        least: share that is given, at least; 0 gives nothing to some rows.
        most: and at most, below 1.
        given: which positions: a random "subset", or a "prefix".
    """

    least: float = 0.0
    most: float = 0.95
    given: str = "subset"

    def __post_init__(self) -> None:
        for share in (self.least, self.most):
            check_number("MixedPrompts", least=0, below=1, share=share)
        if self.least > self.most:
            raise CdlmError(f"MixedPrompts needs least <= most, got {self.least} and {self.most}: exchange them")
        check_choice("MixedPrompts", ("subset", "prefix"), given=self.given)

    def items(self, text: RealText, n: int, seed: int) -> list[Item]:
        return [self._item(row, text.eos_id, seed, i) for i, row in enumerate(_rows(text, n, seed))]

    def _item(self, row: Row, eos_id: int | None, seed: int, number: int) -> Item:
        size = len(text_ids(row.tokens.tolist(), eos_id, with_end=True))
        draw = generator(seed, ITEM, number)
        share = self.least + (self.most - self.least) * float(torch.rand((), generator=draw, dtype=torch.float64))
        order = torch.randperm(size, generator=draw).numpy() if self.given == "subset" else np.arange(size)
        valid = np.arange(len(row.tokens)) < size
        open_ = valid.copy()
        open_[order[: min(int(share * size), size - 1)]] = False
        return Item(row.tokens, open_, valid)

    def pads(self, text: RealText) -> bool:
        return text.eos_id is not None


@dataclass(frozen=True)
class MixedLengths(Workload):
    """Texts of random lengths from nothing: each row has so many positions, and the rest of it is padding.

    The length is uniform in {least, ..., most}. The real text is the beginning of a held-out row; a document that ends
    sooner is filled with its end.

    Args:
        least: tokens, at least.
        most: and at most; by default as many as the model has positions.
    """

    least: int = 4
    most: int | None = None

    def __post_init__(self) -> None:
        check_whole("MixedLengths", length=self.least)
        check_whole("MixedLengths", least=self.least, optional=True, most=self.most)

    def items(self, text: RealText, n: int, seed: int) -> list[Item]:
        length = text.held_out.length
        if max(self.least, self.most or 0) > length:
            fits = f"most={length} or less, or leave it out" if self.least <= length else f"least={length} or less"
            raise CdlmError(
                f"{self!r} has texts of {max(self.least, self.most or 0)} tokens, and the model has {length} positions:"
                f" set {fits}"
            )
        return [self._item(row, seed, i) for i, row in enumerate(_rows(text, n, seed))]

    def _item(self, row: Row, seed: int, number: int) -> Item:
        length = len(row.tokens)
        draw = generator(seed, ITEM, number)
        valid = np.arange(length) < int(torch.randint(self.least, (self.most or length) + 1, (), generator=draw))
        return Item(row.tokens, valid, valid)

    def pads(self, text: RealText) -> bool:
        return True


@dataclass(frozen=True)
class Arithmetic(Workload):
    """Word problems of several difficulties, whose solutions are to be generated: of runs on the arithmetic source.

    The problems are of the validation split, so that none of their calculations was trained on. A solution has the rest
    of the row to itself.

    Args:
        steps: difficulties, numbers of equations, that take turns.
    """

    steps: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, tuple):
            raise CdlmError(f"Arithmetic needs steps to be numbers of equations, such as (1, 2, 3), got {self.steps!r}")
        for step in self.steps:
            check_whole("Arithmetic", step=step)
        arithmetic.check_steps(self.steps)

    def items(self, text: RealText, n: int, seed: int) -> list[Item]:
        if not isinstance(text.source, sources.Arithmetic):
            raise CdlmError(
                f"{self!r} is for runs on arithmetic problems, and this one is on {type(text.source).__name__}: take"
                " another workload, or a run whose source is Arithmetic"
            )
        if text.eos_id is None:
            raise CdlmError(f"{self!r} needs rows of one problem each, and those of this run are packed: train another")
        found = list(arithmetic.problems(n, seed, "valid", self.steps, text.source.largest))
        lines = encode_batch(text.tokenizer, [problem.document for problem in found])
        self._check_lengths([len(line) + 1 for line in lines], text.held_out.length)
        tokens = np.full((n, text.held_out.length), text.eos_id, dtype=np.int64)
        for row, line in zip(tokens, lines, strict=True):
            row[: len(line)] = line
        valid = np.ones_like(tokens, dtype=np.bool_)
        law = Completion(arithmetic.SEPARATOR).bind(text.tokenizer)
        open_ = law(torch.from_numpy(tokens), torch.from_numpy(valid), generator(seed, ITEM)).numpy()
        return [
            Item(*row, problem.prompt + arithmetic.SEPARATOR, problem.answer)
            for row, problem in zip(zip(tokens, open_, valid, strict=True), found, strict=True)
        ]

    def _check_lengths(self, lengths: Sequence[int], positions: int) -> None:
        """Raise unless all problems fit a row."""
        longest = {step: max(lengths[i :: len(self.steps)], default=0) for i, step in enumerate(self.steps)}
        fitting = tuple(step for step in self.steps if longest[step] <= positions)
        if fitting != self.steps:
            advice = f"set steps={fitting}" if fitting else "train one with a larger length"
            raise CdlmError(
                f"{self!r} has a problem of {max(lengths)} tokens, and the model has {positions} positions: {advice}"
            )

    def pads(self, text: RealText) -> bool:
        return False


def _rows(text: RealText, n: int, seed: int) -> list[Row]:
    """The first `n` rows of the held-out text in a random order, each once."""
    rows = text.held_out
    if n > len(rows):
        raise CdlmError(
            f"a workload takes a held-out row for each sample, and this run has {len(rows)} of them, got n={n}: take"
            " fewer samples, or hold out more text"
        )
    return [rows[number] for number in Order(len(rows), seed).rows(np.arange(n)).tolist()]


WORKLOADS: Registry[Workload] = Registry("workload", Workload, MixedPrompts, MixedLengths, Arithmetic)
