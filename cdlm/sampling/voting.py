"""Votes of the steps of a run, on its answers and on its tokens: from what was recorded, or while it is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from cdlm.core.answers import PARSERS
from cdlm.core.errors import CdlmError
from cdlm.core.types import LoopStep
from cdlm.halting.voting import Ballots, Vote, semantic_entropy, winner
from cdlm.recording.record import Record
from cdlm.sampling.requests import Request
from cdlm.sampling.texts import shown_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEPT = 8192
"""Rows whose answers are remembered, because most rows do not change at most steps."""


@runtime_checkable
class Run(Protocol):
    """Samples or a recording: something with the record of every step."""

    @property
    def record(self) -> Record | None: ...
    @property
    def tokens(self) -> Int[np.ndarray, "m n"]: ...
    @property
    def given(self) -> Bool[np.ndarray, "m n"]: ...
    @property
    def valid(self) -> Bool[np.ndarray, "m n"]: ...


class AnswerReader:
    """Reads the answers of rows: the text of what is generated, up to its end, and what a parser finds in it.

    Args:
        end_ids: stop tokens; without any, no text ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_ids: Collection[int]):
        self.tokenizer, self.end_ids = tokenizer, end_ids
        self.known: dict[tuple[bytes, bytes, str], str | None] = {}

    def __call__(
        self, tokens: Int[np.ndarray, "b n"], generated: Bool[np.ndarray, "b n"], valid: Bool[np.ndarray, "b n"],
        parser: str = "marked",
    ) -> list[str | None]:  # fmt: skip
        """The answer of each row; None of one whose text has none."""
        made = shown_of(tokens, ~generated, valid, self.end_ids) & generated
        keys = [(row[text].tobytes(), text.tobytes(), parser) for row, text in zip(tokens, made, strict=True)]
        fresh = {key: i for i, key in enumerate(keys) if key not in self.known}
        if len(self.known) + len(fresh) > KEPT:
            self.known.clear()
            fresh = {key: i for i, key in enumerate(keys)}
        rows = list(fresh.values())
        texts = texts_of(self.tokenizer, tokens[rows], made[rows]) if rows else []
        self.known.update(zip(fresh, map(PARSERS[parser], texts), strict=True))
        return [self.known[key] for key in keys]


@dataclass(frozen=True, eq=False)
class Voted:
    """The answers of samples by the votes of their steps."""

    answers: list[str | None]
    """Of each sample the answer with the most weight; where no step has one, that of the final text, which may have
    none either."""
    ballots: Ballots
    """The weight of every answer."""

    @property
    def entropy(self) -> Float[np.ndarray, " m"]:
        """Temporal semantic entropy of each sample, in nats: of the shares of its answers among the weights."""
        return np.array([semantic_entropy(votes) for votes in self.ballots.votes])

    @staticmethod
    def of(ballots: Ballots, final: Sequence[str | None]) -> Voted:
        """What the ballots say, and the final texts where they say nothing."""
        pairs = zip(ballots.votes, final, strict=True)
        return Voted([winner(votes) if votes else answer for votes, answer in pairs], ballots)


@dataclass(frozen=True, eq=False)
class StepAnswers:
    """The answers that a run had at each of its steps."""

    said: Sequence[Sequence[str | None]]
    """Of each step those of all samples."""
    walking: Bool[np.ndarray, "steps m"]
    """Samples that took the step."""
    budgets: Int[np.ndarray, " m"]
    final: list[str | None]
    """Of the final texts."""

    @staticmethod
    def of(run: Run, read: AnswerReader, parser: str = "marked") -> StepAnswers:
        """Of the steps of samples that were recorded, or of a recording.

        Raises:
            CdlmError: there is no record, or it keeps no tokens.
        """
        record, generated = kept(run), ~run.given
        said = [read(tokens, generated, run.valid, parser) for tokens in record.walk(run.tokens)]
        final = read(run.tokens, generated, run.valid, parser)
        return StepAnswers(said, record.nfe > 0, record.budgets.astype(np.int64), final)

    def vote(
        self, vote: Vote, last: Int[np.ndarray, " m"] | None = None, final: Sequence[str | None] | None = None
    ) -> Voted:
        """What the steps say together.

        Args:
            last: the last step of each sample that votes, such as one at which a rule halts it; by default its last.
            final: the answers of the texts that it then has; by default those of the whole run.
        """
        ballots, nobody = Ballots.of(len(self.budgets)), [None] * len(self.budgets)
        for step, (answers, walking) in enumerate(zip(self.said, self.walking, strict=True)):
            votes = walking if last is None else walking & (step <= last)
            cast = [answer if votes_ else None for answer, votes_ in zip(answers or nobody, votes, strict=True)]
            ballots = ballots.cast(cast, vote.weight(np.array(step), self.budgets))
        return Voted.of(ballots, self.final if final is None else final)


def kept(run: Run) -> Record:
    """The record of a run.

    Raises:
        CdlmError: there is none, or it keeps no tokens.
    """
    record = run.record
    if record is None:
        raise CdlmError("the steps of a run can vote if they were kept: draw the samples with record=True")
    first = np.zeros(run.given.shape, bool)
    first[record.switches.sample, record.switches.position] = True
    if not bool((first | run.given).all()):
        raise CdlmError(
            "the steps of this run cannot vote: its record does not keep the tokens of every position; record it again"
        )
    return record


class Voters(NamedTuple):
    """The samples of a run, in order."""

    number: Int[np.ndarray, " m"]
    """Index of each sample in the run."""
    generated: Bool[np.ndarray, "m n"]
    valid: Bool[np.ndarray, "m n"]
    """False on padding."""

    @staticmethod
    def of(requests: Sequence[Request]) -> Voters:
        """Those of a run to come."""
        rows = [torch.ones_like(r.given) if r.valid is None else r.valid for r in requests]
        given = torch.stack([request.given for request in requests])
        number = np.array([request.index for request in requests])
        return Voters(number, (~given).numpy(), torch.stack(rows).numpy())


class Poll(ABC):
    """A vote while a run is drawn: it is told every step, and costs no call.

    The run must compute the signal `tokens`, and may not be in blocks that are runs of their own.
    """

    def __init__(self, vote: Vote, voters: Voters):
        self.vote, self.voters = vote, voters
        self.place = {index: i for i, index in enumerate(voters.number.tolist())}
        self.seen = np.zeros(len(voters.number), np.int64)

    def watch(self, steps: Iterable[LoopStep]) -> Iterator[LoopStep]:
        """The same steps, whose votes are cast as they pass.

        Raises:
            CdlmError: they do not have the tokens, or a row begins anew.
        """
        for step in steps:
            self.write(step)
            yield step

    def write(self, step: LoopStep) -> None:
        """Cast the votes of one step."""
        state = step.state
        if "tokens" not in state.signals:
            raise CdlmError("the steps of this run have no tokens to vote on: ask for the signal 'tokens'")
        columns = np.array([self.place[row] for row in step.counts.row])
        steps = state.step.cpu().numpy()
        if bool((steps != self.seen[columns]).any()):
            raise CdlmError("a run in blocks, each from fresh noise, cannot vote: its steps are those of several runs")
        self.seen[columns] += 1
        self.add(columns, state.tokens.cpu().numpy(), self.vote.weight(steps, state.budget.cpu().numpy()))

    @abstractmethod
    def add(
        self, columns: Int[np.ndarray, " b"], tokens: Int[np.ndarray, "b n"], weights: Float[np.ndarray, " b"]
    ) -> None:
        """Cast the votes of rows: what they would be now, and what that weighs."""


class AnswerPoll(Poll):
    """A vote on answers."""

    def __init__(self, vote: Vote, voters: Voters, read: AnswerReader):
        super().__init__(vote, voters)
        self.read, self.ballots = read, Ballots.of(len(voters.number))

    def add(
        self, columns: Int[np.ndarray, " b"], tokens: Int[np.ndarray, "b n"], weights: Float[np.ndarray, " b"]
    ) -> None:
        _, generated, valid = self.voters
        answers = self.read(tokens, generated[columns], valid[columns], self.vote.parser)
        cast = Ballots([self.ballots.votes[i] for i in columns]).cast(answers, weights)
        for place, votes in zip(columns, cast.votes, strict=True):
            self.ballots.votes[place] = votes

    def voted(self, tokens: Int[np.ndarray, "m n"]) -> Voted:
        """The outcome.

        Args:
            tokens: the samples in the order of the requests, for those of which no step had an answer.
        """
        return Voted.of(self.ballots, self.read(tokens, *self.voters[1:], self.vote.parser))


class TokenPoll(Poll):
    """A vote on the token of each position by itself."""

    def __init__(self, vote: Vote, voters: Voters):
        super().__init__(vote, voters)
        shape = voters.generated.shape
        self.now, self.since, self.total = np.full(shape, -1, np.int64), np.zeros(shape), np.zeros(shape[0])
        self.stretches: list[tuple[np.ndarray, ...]] = []
        """Sample, position and token of stretches of steps in which a token stayed, and what these weigh."""

    def add(
        self, columns: Int[np.ndarray, " b"], tokens: Int[np.ndarray, "b n"], weights: Float[np.ndarray, " b"]
    ) -> None:
        row, position = np.nonzero((tokens != self.now[columns]) & self.voters.generated[columns])
        self._end(columns[row], position)
        self.now[columns[row], position] = tokens[row, position]
        self.total[columns] += weights

    def _end(self, sample: Int[np.ndarray, " k"], position: Int[np.ndarray, " k"]) -> None:
        """The tokens of these positions have stayed until now."""
        spent = self.total[sample] - self.since[sample, position]
        self.stretches.append((sample, position, self.now[sample, position], spent))
        self.since[sample, position] = self.total[sample]

    def voted(self, tokens: Int[np.ndarray, "m n"]) -> Int[np.ndarray, "m n"]:
        """The samples with the token of most weight at each generated position, of equals the one seen first.

        Args:
            tokens: the samples in the order of the requests.
        """
        self._end(*np.nonzero(self.voters.generated))
        sample, position, token, weight = (np.concatenate(part) for part in zip(*self.stretches, strict=True))
        there = token >= 0  # before the first step there is none
        cells = np.stack([sample, position, token], 1)[there]
        kinds, first, which = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        total = np.bincount(which.ravel(), weight[there])
        order = np.lexsort((-first, total))  # the last one that is written stays: the heaviest, of equals the first
        voted = tokens.copy()
        voted[kinds[order, 0], kinds[order, 1]] = kinds[order, 2]
        return voted


def voted_tokens(run: Run, vote: Vote) -> Int[np.ndarray, "m n"]:
    """The samples of a record with the token of most weight at each generated position, of equals the one seen first.

    Raises:
        CdlmError: there is no record, or it keeps no tokens.
    """
    record = kept(run)
    poll = TokenPoll(vote, Voters(np.arange(len(run.tokens)), ~run.given, run.valid))
    for step, tokens in enumerate(record.walk(run.tokens)):
        columns = np.flatnonzero(record.nfe[step] > 0)
        poll.add(columns, tokens[columns], vote.weight(np.array(step), record.budgets[columns]))
    return poll.voted(run.tokens)
