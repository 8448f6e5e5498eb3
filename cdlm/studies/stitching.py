"""Many cheap answers to a problem, and one made of them: by a vote, by choosing the best, or stitched of their steps.

Reward-guided stitching (arXiv 2602.22871): a diffusion model draws many cheap traces of reasoning, a scorer rates every
step, the best steps become one reasoning, and a solver reads the answer from it. Built from a description: the paper's
abstract. Ours are the scorer, an autoregressive judge in place of a process reward model; the order, from left to
right, each step judged behind those that were chosen before it; and the solver, the diffusion model itself, which is
given the stitched reasoning. The page of the study says how the released code differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int

from cdlm.api import small_judge
from cdlm.core.answers import MARK, answer_of
from cdlm.core.checks import check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.stats import Scores
from cdlm.data.arithmetic import Problem
from cdlm.evaluation.judge import Encoded, Judge
from cdlm.evaluation.metrics.ar_nll import token_nats
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.halting.voting import Ballots, winner
from cdlm.policies import parse_policy
from cdlm.runs import config as names
from cdlm.runs.train import RunText
from cdlm.sampling.prompts import encode_prompt
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import Session
from cdlm.sampling.texts import shown_of, special_of, texts_of
from cdlm.studies.answering import Answering, marks
from cdlm.studies.study import Finding, column, ends, interval, label

ONE, VOTE, MEAN, WORST, STITCHED, ANY = (
    "one sample", "vote", "best by the mean", "best by the worst step", "stitched", "any right",
)  # fmt: skip
FULL, GREEDY, ALONE = "one token a call, temperature 0", "the policy at temperature 0", "the judge alone"
NOTE = (
    "Of n samples of each problem, each from its own generator. One sample: the mean of the n, at the calls of one."
    " Vote: the answer of most samples. Best by the mean, by the worst step: the sample whose text, or whose least"
    " likely step, has the fewest nats per token under the judge. Stitched: from left to right the likeliest of the"
    " samples' steps at that place, behind those chosen before it; the model then fills in the answer at temperature 0."
    " Any right: one of the n is, which no choice of a sample can beat. Beside the vote: right answers more than the"
    " vote of as many samples. Intervals are 95 %, bootstrap over problems, paired. Calls are of the diffusion model,"
    " all samples of a problem together, and for stitched with those of the answer. Read: texts, and their tokens, that"
    " the judge reads for a problem; a text is read whole, whatever it begins with. The judge alone writes an answer of"
    " its own, each time the likeliest token, and reads what it has written."
)

T = TypeVar("T")

_AFTER_STEP = re.compile(r"(?<=\.)(?=\s)|(?=\n)")


class Trace(NamedTuple):
    """A sampled answer in parts: joined, they are its text again."""

    parts: tuple[str, ...]
    """Its steps, each with the blank before it, and the mark of the answer if it has one."""
    rest: str
    """What follows."""

    @staticmethod
    def of(text: str) -> Trace:
        """The parts of a text. A step ends at a full stop before a blank, or at the end of a line."""
        reasoning, mark, rest = text.partition(MARK)
        body = reasoning.rstrip()
        steps, blank = [step for step in _AFTER_STEP.split(body) if step], reasoning[len(body) :]
        return Trace((*steps, blank + mark), rest) if mark else Trace(tuple(steps), blank)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join((*self.parts, self.rest))

    @property
    def whole(self) -> tuple[str, ...]:
        """The parts with what follows in the last one: the answer stands behind its mark."""
        return (*self.parts[:-1], "".join((*self.parts[-1:], self.rest)))


@dataclass(frozen=True, eq=False)
class Reading:
    """Parts of a text, read by a judge behind all that stands before them."""

    nats: Float[np.ndarray, " k"]
    tokens: Int[np.ndarray, " k"]
    """Of each part the tokens that begin in it."""
    length: int
    """Tokens of the whole text."""

    @property
    def mean(self) -> float:
        """Nats per token of all parts; infinite without tokens."""
        return float(self.nats.sum() / self.tokens.sum()) if self.tokens.any() else math.inf

    @property
    def worst(self) -> float:
        """Nats per token of the part that has most; infinite without tokens."""
        there = self.tokens > 0
        return float((self.nats[there] / self.tokens[there]).max()) if there.any() else math.inf


Reads = Callable[[Sequence[tuple[str, tuple[str, ...]]]], list[Reading]]
"""Reads the parts of texts, each with what stands before them, which is context."""


class Reader:
    """A judge that reads parts of texts, and remembers what it has read."""

    def __init__(self, judge: Judge, batch_size: int = 64):
        self.judge, self.batch_size = judge, batch_size
        self.known: dict[tuple[str, tuple[str, ...]], Reading] = {}

    def __call__(self, texts: Sequence[tuple[str, tuple[str, ...]]]) -> list[Reading]:
        """Of each text what stands before the parts, which is not scored, and the parts."""
        fresh = list(dict.fromkeys(text for text in texts if text not in self.known))
        encoded = self.judge.encode([before + "".join(parts) for before, parts in fresh])
        lines = token_nats(self.judge, encoded, self.batch_size)
        for text, code, nats in zip(fresh, encoded, lines, strict=True):
            self.known[text] = _reading(text, code, nats)
        return [self.known[text] for text in texts]


def _reading(text: tuple[str, tuple[str, ...]], code: Encoded, nats: Float[np.ndarray, " n"]) -> Reading:
    before, parts = text
    starts = len(before) + np.cumsum([0, *map(len, parts)])
    part = np.searchsorted(starts, np.array(code.starts), side="right") - 1
    scored = np.array(code.is_text, bool) & ~np.isnan(nats) & (part >= 0) & (part < len(parts))
    counts = np.bincount(part[scored], minlength=len(parts))
    sums = np.bincount(part[scored], nats[scored], len(parts)).astype(np.float64)  # without tokens it has whole numbers
    return Reading(sums, counts, len(code.ids))


class Stitched(NamedTuple):
    """A reasoning made of steps of several samples, and what the judge read for it."""

    text: str
    texts: int
    tokens: int


def stitch(read: Reads, prompts: Sequence[str], pools: Sequence[Sequence[Trace]]) -> list[Stitched]:
    """Of each pool of traces one reasoning: at each place the part with the fewest nats per token behind its prompt and
    what was chosen before, of equals the one that was drawn first; up to the mark of an answer, or until no trace goes
    on. Where all that are left agree, nothing is read."""
    made, place = [Stitched("", 0, 0)] * len(pools), 0
    walking = list(range(len(pools)))
    while walking:
        offered = {i: _at(pools[i], place) for i in walking}
        asked = [(i, part) for i, parts in offered.items() if len(parts) > 1 for part in parts]
        found = read([(prompts[i] + made[i].text, (part,)) for i, part in asked])
        readings: dict[int, list[Reading]] = {i: [] for i in walking}
        for (i, _), reading in zip(asked, found, strict=True):
            readings[i].append(reading)
        for i in walking:
            made[i] = _chosen(made[i], offered[i], readings[i])
        walking = [i for i in walking if offered[i] and not made[i].text.endswith(MARK)]
        place += 1
    return made


def _at(pool: Sequence[Trace], place: int) -> list[str]:
    """What the traces have at a place, without doubles."""
    return list(dict.fromkeys(trace.parts[place] for trace in pool if place < len(trace.parts)))


def _chosen(made: Stitched, parts: Sequence[str], readings: Sequence[Reading]) -> Stitched:
    """With the best part added."""
    best = min(range(len(readings)), key=lambda i: readings[i].mean, default=0)
    tokens = made.tokens + sum(reading.length for reading in readings)
    return Stitched(made.text + "".join(parts[best : best + 1]), made.texts + len(readings), tokens)


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, of equals the one that was drawn first; None if no sample has one."""
    ballots = Ballots.of(1)
    for answer in answers:
        ballots = ballots.cast([answer], np.ones(1))
    return winner(ballots.votes[0])


class Result(NamedTuple):
    """One way to answer, on all problems."""

    way: str
    samples: int
    right: Float[np.ndarray, " m"]
    """1.0 where the answer is right; a mean over samples lies between."""
    calls: Float[np.ndarray, " m"]
    """Of the diffusion model."""
    texts: Float[np.ndarray, " m"]
    """That the judge read."""
    tokens: Float[np.ndarray, " m"]
    """Of these texts."""


@dataclass(frozen=True, kw_only=True)
class Stitching(Answering):
    """Is it better to stitch the steps of many samples than to vote, or to choose one of them?

    Args:
        samples: numbers of samples of each problem.
        temperature: of the samples; at 0 they are all the same.
        policy: that draws them; a cheap one.
        solver: policy that fills in the answer behind a stitched reasoning; a careful one.
        judge: any Hugging Face causal language model; by default a small one is trained on the text of the run and
            cached.
        judge_steps: training steps of the small one; by default those of `SmallJudge`.
        seed: of the generated problems, and of the samples.
    """

    samples: list[int]
    temperature: float
    policy: str
    solver: str
    judge: str | None = None
    judge_steps: int | None = None

    def check(self) -> None:
        super().check()
        if not self.samples:
            raise CdlmError("stitching needs numbers of samples, got none: give one or more")
        for count in self.samples:
            check_whole("stitching", samples=count)
        check_whole("stitching", n=self.n)
        check_whole("stitching", optional=True, judge_steps=self.judge_steps, new_tokens=self.new_tokens)
        check_number("stitching", least=0.0, temperature=self.temperature)
        parse_policy(self.policy)
        parse_policy(self.solver)
        if self.judge is None:
            for model in self.models:  # whose settings say what text its judge is trained on
                names.read_run(model)

    def find(self) -> Finding:
        exams = [self.exam(model) for model in self.models]  # all, before any work
        counts = sorted(set(self.samples))
        rows = [row for exam in exams for row in exam.rows(counts)]
        panels = [panel(exam.model, [row for row in rows if row["model"] == exam.model]) for exam in exams]
        told = [row for row in rows if row["way"] != ONE or row["samples"] == counts[-1]]
        return Finding(rows, [_line(row) for row in told], NOTE, panels)

    def exam(self, model: str) -> Exam:
        """The problems put to a model and its judge."""
        session = self.session(model, policy=self.policy, temperature=self.temperature).with_seed(self.seed)
        return Exam(
            label(model), session, Reader(self.judge_of(model)), self.tasks, self.prompts, self.new_tokens,
            max(self.samples), self.solver,
        )  # fmt: skip

    def judge_of(self, model: str) -> Judge:
        """The judge that is named, or the small one of the run's text."""
        device = str(self.session(model).device)
        if self.judge is not None:
            return Judge.load(self.judge, device)
        text = RunText.of_run(model)
        small = small_judge(text, self.judge_steps)
        return small.open(device, not self.quiet)


@dataclass(frozen=True)
class Exam:
    """One model, its judge, and the problems put to it.

    Args:
        model: what it is called.
        session: what draws the samples.
        read: the judge.
        most: samples of each problem that are drawn.
        solver: policy that fills in answers.
    """

    model: str
    session: Session
    read: Reader
    tasks: Sequence[Problem]
    prompts: Sequence[str]
    new_tokens: int | None
    most: int
    solver: str

    @cached_property
    def drawn(self) -> Samples:
        """All samples, those of a problem as neighbours."""
        return self.session.run(self.requests(self.most))

    @cached_property
    def pools(self) -> list[list[Trace]]:
        """The samples of each problem."""
        return self.by_problem([Trace.of(text) for text in self.texts(self.drawn)])

    @cached_property
    def answers(self) -> list[list[str | None]]:
        """Of each problem what its samples answer."""
        return [[answer_of(trace.text) for trace in pool] for pool in self.pools]

    @cached_property
    def right(self) -> Float[np.ndarray, "m k"]:
        """1.0 where a sample's answer is right."""
        return np.stack([marks(list(answers), self.tasks) for answers in zip(*self.answers, strict=True)], 1)

    @cached_property
    def calls(self) -> Float[np.ndarray, "m k"]:
        """Of each sample."""
        return self.drawn.nfe.reshape(len(self.tasks), self.most).astype(np.float64)

    @cached_property
    def readings(self) -> list[list[Reading]]:
        """All samples of each problem, read by the judge."""
        pairs = zip(self.prompts, self.pools, strict=True)
        return self.by_problem(self.read([(prompt, trace.whole) for prompt, pool in pairs for trace in pool]))

    def rows(self, counts: Sequence[int]) -> list[dict[str, Any]]:
        """What the ways are compared with, and every way at every number of samples."""
        references = [self.row(result, None) for result in (self.decoded(FULL), self.decoded(GREEDY), self.alone())]
        results = [self.results(count) for count in counts]
        voted = [next(result for result in ways if result.way == VOTE) for ways in results]
        return references + [
            self.row(result, other)
            for ways in zip(*results, strict=True)
            for result, other in zip(ways, voted, strict=True)
        ]

    def results(self, count: int) -> list[Result]:
        """Every way, with the first samples of each problem."""
        right, calls = self.right[:, :count], self.calls[:, :count]
        none, total, read = np.zeros(len(right)), calls.sum(1), [row[:count] for row in self.readings]
        voted = marks([vote(row[:count]) for row in self.answers], self.tasks)
        by_mean, by_worst = (
            np.take_along_axis(right, np.array([[np.argmin(values)] for values in scores]), 1)[:, 0]
            for scores in ([[r.mean for r in row] for row in read], [[r.worst for r in row] for row in read])
        )
        cost = none + count, np.array([float(sum(r.length for r in row)) for row in read])
        return [
            Result(ONE, count, right.mean(1), calls.mean(1), none, none),
            Result(VOTE, count, voted, total, none, none),
            Result(MEAN, count, by_mean, total, *cost),
            Result(WORST, count, by_worst, total, *cost),
            self.stitched(count, total),
            Result(ANY, count, right.max(1), total, none, none),
        ]

    def stitched(self, count: int, calls: Float[np.ndarray, " m"]) -> Result:
        """The reasoning stitched of the first samples, and the answer that the model then gives."""
        made = stitch(self.read, self.prompts, [pool[:count] for pool in self.pools])
        answers, more = self.solve([one.text for one in made])
        texts, tokens = (np.array([getattr(one, name) for one in made], np.float64) for name in ("texts", "tokens"))
        return Result(STITCHED, count, marks(answers, self.tasks), calls + more, texts, tokens)

    def solve(self, reasoning: Sequence[str]) -> tuple[list[str | None], Float[np.ndarray, " m"]]:
        """What the model answers at temperature 0 behind a reasoning of each problem, in the positions that the
        reasoning leaves, and the calls of it; nothing and none where it leaves none."""
        rows: list[list[int | None]] = []
        for prompt, text in zip(self.prompts, reasoning, strict=True):
            given = self.encode(prompt + text)
            rows.append([*given, *[None] * (self.width(prompt) - len(given))])
        places = [i for i, row in enumerate(rows) if None in row]
        answers: list[str | None] = [answer_of(text) for text in reasoning]
        calls = np.zeros(len(rows))
        if places:
            samples = self.cold(self.solver).run(canvases([rows[i] for i in places], 0))
            calls[places] = samples.nfe
            for i, text in zip(places, self.texts(samples), strict=True):
                answers[i] = answer_of(reasoning[i] + text)
        return answers, calls

    def cold(self, policy: str | None = None) -> Session:
        """Temperature 0, with the policy of the samples or another."""
        return self.session.with_sampling(self.session.sampling.with_flat(temperature=0.0, policy=policy))

    def decoded(self, way: str) -> Result:
        """One answer at temperature 0, by the policy or with one token a call."""
        samples = self.cold(f"LLaDA({self.new_tokens})" if way == FULL else None).run(self.requests(1))
        right = marks([answer_of(text) for text in self.texts(samples)], self.tasks)
        none = np.zeros(len(right))
        return Result(way, 1, right, samples.nfe.astype(np.float64), none, none)

    def alone(self) -> Result:
        """What the judge answers when it writes itself."""
        written = write(self.read.judge, self.prompts, self.new_tokens or self.session.model.length)
        right = marks([answer_of(text) for text, _ in written], self.tasks)
        tokens = np.array([float(tokens) for _, tokens in written])
        return Result(ALONE, 1, right, np.zeros(len(right)), np.ones(len(right)), tokens)

    def requests(self, count: int) -> list[Request]:
        """So many samples of each problem."""
        return self.session.requests(self.prompts, count, new_tokens=self.new_tokens, template=False)

    def width(self, prompt: str) -> int:
        """Positions of the row of a prompt."""
        more = self.new_tokens
        return self.session.model.length if more is None else len(self.encode(prompt)) + more

    def encode(self, text: str) -> list[int | None]:
        """Tokens of a text, as those of a prompt."""
        return encode_prompt(self.session.model.need_tokenizer(), text, template=False)

    def texts(self, samples: Samples) -> list[str]:
        """What was generated, up to its end."""
        tokenizer = self.session.model.need_tokenizer()
        until = shown_of(samples.tokens, samples.given, samples.valid, special_of(tokenizer).end_ids)
        return texts_of(tokenizer, samples.tokens, until & ~samples.given)

    def by_problem(self, values: Sequence[T]) -> list[list[T]]:
        """Of all samples, those of each problem."""
        return [list(values[i : i + self.most]) for i in range(0, len(values), self.most)]

    def row(self, result: Result, voted: Result | None) -> dict[str, Any]:
        """Everything about one way, beside the vote of as many samples."""
        ones = np.ones(len(result.right))
        gain: dict[str, float | None] = dict.fromkeys(("gain", "gain_low", "gain_high"))
        return {
            "model": self.model,
            "way": result.way,
            "samples": result.samples,
            "problems": len(ones),
            **ends("accuracy", Scores(result.right, ones).bootstrap()),
            **(gain if voted is None else ends("gain", Scores(result.right - voted.right, ones).bootstrap())),
            **ends("calls", Scores(result.calls, ones).bootstrap()),
            "judge_texts": float(result.texts.mean()),
            "judge_tokens": float(result.tokens.mean()),
        }


def write(judge: Judge, prompts: Sequence[str], new_tokens: int) -> list[tuple[str, int]]:
    """What a judge writes behind each prompt, each time its likeliest token, and the tokens that it reads for it: of
    the prompt and of its own. It ends where its context does."""
    codes = [code.ids for code in judge.encode(list(prompts))]
    written = [("", 0)] * len(codes)
    for length in sorted(set(map(len, codes))):
        places = [i for i, ids in enumerate(codes) if len(ids) == length]
        if (new := min(new_tokens, judge.context - length)) < 1:
            continue
        ids = torch.tensor([codes[i] for i in places], device=judge.device)
        model: Any = judge.model  # transformers says of `generate` that it is a tensor
        rows = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        for i, row in zip(places, rows.tolist(), strict=True):
            written[i] = str(judge.tokenizer.decode(row[length:])), len(row)
    return written


def _line(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        "answer": row["way"],
        "n": str(row["samples"]),
        "problems": str(row["problems"]),
        "right": interval(row, "accuracy", ".1%"),
        "beside the vote": "-" if row["gain"] is None else interval(row, "gain", "+.1%"),
        "calls": interval(row, "calls", ".1f"),
        "read": f"{row['judge_texts']:.1f} ({row['judge_tokens']:.0f} tokens)" if row["judge_texts"] else "-",
    }


def panel(model: str, rows: Sequence[Mapping[str, Any]]) -> Panel:
    """Right answers over calls: a line for each way, over the numbers of samples, and a level for the judge alone."""
    lines, levels = [], []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        if way == ALONE:
            levels = [(way, own[0]["accuracy"])]
        elif way == ONE:  # at the calls of one, whatever their number
            lines.append(_curve(own[-1:]))
        else:
            lines.append(_curve(own))
    return Panel(model, "mean calls a problem", "right answers", lines, x_scale="log", levels=levels)


def _curve(rows: Sequence[Mapping[str, Any]]) -> Line:
    way, band = rows[0]["way"], (column(rows, "accuracy_low"), column(rows, "accuracy_high"))
    return Line(
        way, column(rows, "calls"), column(rows, "accuracy"), band, dashed=way in (FULL, GREEDY, ANY), dots=True
    )


STUDY = Stitching
