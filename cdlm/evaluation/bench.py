"""Quality against calls: full runs recorded once, rules tried on them, and every text judged once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cdlm.core.errors import CdlmError
from cdlm.core.progress import progress
from cdlm.core.stats import APART, Bootstrap, Scores
from cdlm.evaluation.judge import Judge, Readers
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.evaluation.metrics.features import NGrams
from cdlm.evaluation.metrics.reference import DISTANCES, Reference, Spread
from cdlm.evaluation.texts import Corpus, Part, RealText
from cdlm.evaluation.workloads import Work
from cdlm.halting import Criterion
from cdlm.halting import calibration as halting
from cdlm.halting.calibration import Calibration, Goal, Tried
from cdlm.halting.losses import Binary, Bounded, Change, Loss
from cdlm.halting.replay import replay
from cdlm.recording.file import Recording
from cdlm.sampling.recordings import recording_of
from cdlm.sampling.requests import Request
from cdlm.sampling.session import Session, reading
from cdlm.sampling.texts import given_spans, outputs_of, shown_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


JUDGED = ("gap", "nats", "ar-nll")
"""Measures of AR-NLL. They have no largest value and are bounded by a bootstrap."""
BOUNDS = {"agreement": Bounded.bound, "texts": Binary.bound, "answers": Binary.bound}
"""How the other measures are bounded."""
FEWEST_TO_RESAMPLE = 100
"""Samples that a bootstrap needs."""
MOST_ROWS = 1000
"""Of real text that is judged."""
SPLITS = 5
"""Of the real text, for the Fréchet distance."""
FEWEST_ROWS = 20
"""On each side of a split."""
OWN_ROWS = "real text, the same rows"
"""Name of the real text in the places of a workload's samples."""


@dataclass(frozen=True)
class Outcome:
    """Samples of some run: what quality and cost are computed from."""

    tokens: Int[np.ndarray, "m n"]
    nfe: Int[np.ndarray, " m"]

    @staticmethod
    def under(session: Session, requests: Sequence[Request], recording: Recording | None = None) -> Outcome:
        """The requests under the session's rule.

        Args:
            recording: of their full run, to replay the rule on; it is run where there is none, or if it has to run.
        """
        if recording is None or session.criterion.live:
            samples = session.run(requests)
            return Outcome(samples.tokens, samples.nfe)
        run = replay(recording, reading(session.criterion, session.model))
        return Outcome(run.tokens, run.nfe)


@dataclass(frozen=True)
class FullRun:
    """The run that everything is compared with."""

    tokens: Int[np.ndarray, "m n"]
    given: Bool[np.ndarray, "m n"]
    valid: Bool[np.ndarray, "m n"]
    nfe: Int[np.ndarray, " m"]
    steps: int
    """Of the whole run, or of each block."""

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, rows: slice) -> FullRun:
        """Some of its samples."""
        return FullRun(self.tokens[rows], self.given[rows], self.valid[rows], self.nfe[rows], self.steps)

    @staticmethod
    def of(recording: Recording) -> FullRun:
        """The recorded run."""
        nfe = recording.record.nfe.max(0)
        return FullRun(recording.tokens, recording.given, recording.valid, nfe, recording.record.steps)


class Scorer:
    """AR-NLL of samples under a judge; each distinct text is judged once.

    Args:
        judge: or a function that opens it, called when the first text is judged: a judge may have to be trained.
    """

    def __init__(
        self, judge: Judge | Callable[[], Judge], tokenizer: PreTrainedTokenizerFast, end_ids: Collection[int] = ()
    ):
        self._judge, self.tokenizer, self.end_ids = judge, tokenizer, end_ids
        self.known: dict[tuple[bytes, bytes], tuple[float, float]] = {}
        self.real: dict[Part, RealSample] = {}
        """Real text that was judged; the benches of both halves share it."""

    @cached_property
    def judge(self) -> Judge:
        """The judge, opened."""
        return self._judge if isinstance(self._judge, Judge) else self._judge()

    def __call__(
        self, tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
    ) -> Scores:
        """Nats and judged tokens of each sample up to its end; what was given is context and is not scored."""
        valid = shown_of(tokens, given, valid, self.end_ids)
        keys = [
            (row[real].tobytes(), part[real].tobytes()) for row, part, real in zip(tokens, given, valid, strict=True)
        ]
        fresh = {key: i for i, key in enumerate(keys) if key not in self.known}
        rows = list(fresh.values())
        if rows:
            spans = [given_spans(self.tokenizer, tokens[i][valid[i]].tolist(), given[i][valid[i]]) for i in rows]
            scored = ar_nll(self.judge, texts_of(self.tokenizer, tokens[rows], valid[rows]), spans)
            pairs = zip(scored.text_nats.tolist(), scored.text_tokens.tolist(), strict=True)
            self.known.update(zip(fresh, pairs, strict=True))
        total, weight = np.array([self.known[key] for key in keys], np.float64).T
        return Scores(total, weight)


@dataclass(frozen=True)
class Bench:
    """A session and a judge, with the full-length run that everything is compared with."""

    session: Session
    """Without a rule."""
    requests: Sequence[Request]
    full_run: FullRun
    recording: Recording | None
    """Its steps, to try rules on; None of a run in blocks, where to halt one changes the next."""
    scorer: Scorer
    text: RealText
    work: Work | None = field(default=None, kw_only=True)
    """What the requests were made from; None of samples from nothing."""

    @staticmethod
    def of(
        session: Session, requests: Sequence[Request], judge: Judge | Callable[[], Judge], text: RealText,
        recording: Recording | None = None, work: Work | None = None,
    ) -> Bench:  # fmt: skip
        """A bench of the recorded full run of the requests; without a recording the run is drawn.

        Args:
            work: that the requests are of.
        """
        if recording is None and session.replayable(requests):
            recording = recording_of(session.recorded().run(requests), session)
        if recording is None:
            run = session.run(requests)
            full = FullRun(run.tokens, run.given, run.valid, run.nfe, session.steps_of(longest(requests)))
        else:
            full = FullRun.of(recording)
        model = session.model
        scorer = Scorer(judge, model.need_tokenizer(), model.end_ids)
        return Bench(session, requests, full, recording, scorer, text, work=work)

    def halves(self) -> tuple[Bench, Bench]:
        """Two benches of half the samples each: settings are chosen on one and reported on the other.

        Raises:
            CdlmError: there are fewer than two samples.
        """
        half = len(self.full_run) // 2
        if half == 0:
            raise CdlmError(
                "settings are chosen on one half of the samples and reported on the other: take two or more"
            )
        return self.part(slice(half)), self.part(slice(half, 2 * half))

    def part(self, rows: slice) -> Bench:
        """A bench of some of the samples, with the same judge."""
        recording = None if self.recording is None else self.recording.select(rows)
        work = None if self.work is None else self.work.part(rows)
        return replace(
            self, requests=self.requests[rows], full_run=self.full_run.part(rows), recording=recording, work=work
        )

    @property
    def longest(self) -> Request:
        """The request with the most to generate."""
        return longest(self.requests)

    @property
    def name(self) -> str:
        """Of the model."""
        return self.session.model.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's."""
        return self.scorer.tokenizer

    @cached_property
    def full(self) -> Scores:
        """AR-NLL of the full run.

        Raises:
            CdlmError: all samples are empty.
        """
        scores = self.score(self.full_run.tokens)
        if not scores.weight.any():
            raise CdlmError("all samples are empty, and there is nothing to judge: does this model need prompts?")
        return scores

    @cached_property
    def full_calls(self) -> Float[np.ndarray, " m"]:
        """Calls of the full run."""
        return self.full_run.nfe.astype(np.float64)

    def real(self, part: Part) -> RealSample:
        """Real text under the same judge: all there is, or `MOST_ROWS` of it."""
        if part not in self.scorer.real:
            corpus = self.text.corpus(part, min(MOST_ROWS, len(self.text.rows(part))))
            scored = ar_nll(self.scorer.judge, corpus.texts)
            scores = Scores(scored.text_nats, scored.text_tokens.astype(np.float64), corpus.serial)
            self.scorer.real[part] = RealSample(corpus, scores)
        return self.scorer.real[part]

    @cached_property
    def reference(self) -> RealSample:
        """The real text that samples are compared with: like the training text, or held out where there is none. Of a
        workload it is that of the same rows, scored in the same places."""
        if self.work is None:
            return self.real(self.text.reference_part)
        real = Outcome(self.work.real, self.full_run.nfe)
        return RealSample(Corpus(OWN_ROWS, self.generated(real), self.texts(real)), self.score(real.tokens))

    @cached_property
    def splits(self) -> Reference | None:
        """Random splits of the real text, for the Fréchet distance; None where it has too few rows for any, and of a
        workload: its samples hold real text, or are shorter."""
        count = 0 if self.work is not None else min(len(self.full_run), self.text.most)
        if count < FEWEST_ROWS:
            return None
        return Reference.of(self.text.splits(count, SPLITS), NGrams(), Readers(self.scorer.judge))

    def frechet(self, outcome: Outcome) -> Spread | None:
        """Fréchet distance of samples to each split of the real text; None of too few samples or too little text."""
        if self.splits is None or len(outcome.tokens) < self.splits.count:
            return None
        corpus = Corpus("samples", self.lines(outcome), self.texts(outcome))
        return self.splits.compare(corpus, {"frechet": DISTANCES["frechet"]})["frechet"]

    @cached_property
    def gap(self) -> Bootstrap:
        """AR-NLL of the full run less that of real text, in nats per token: what a model has left to learn."""
        real = self.reference.scores
        return self.full.bootstrap() - (real.bootstrap(APART) if self.work is None else real.bootstrap())

    def gap_in_noise(self, confidence: float = 0.95) -> bool:
        """Whether the gap may have either sign, with that confidence: no share of it can then be measured."""
        upper, lower = self.gap.upper(confidence), self.gap.upper(1 - confidence)
        return not (lower > 0 or upper < 0)

    def check_gap(self, confidence: float) -> None:
        """Raise if the gap is within its noise."""
        if self.gap_in_noise(confidence):
            low, high = self.gap.interval95
            raise CdlmError(
                f"the AR-NLL of {self.name} and of real text differ by {self.gap.value:+.3f}"
                f" [{low:+.3f}, {high:+.3f}] nats: no share of a gap that is within noise can be measured; use the"
                " measure nats or agreement, or more samples"
            )

    @property
    def described_gap(self) -> dict[str, Any]:
        """The gap, its interval, and what real text it is to."""
        low, high = self.gap.interval95
        return {"nats": self.gap.value, "low": low, "high": high, "to": self.reference.corpus.name}

    @property
    def steps(self) -> int:
        """Of the full run."""
        return self.full_run.steps

    @property
    def settings(self) -> dict[str, Any]:
        """What a choice for this bench holds for."""
        return settings_of(self.session, self.requests, self.work)

    def texts(self, outcome: Outcome) -> list[str]:
        """Samples as text."""
        return texts_of(self.tokenizer, outcome.tokens, self.shown(outcome))

    def shown(self, outcome: Outcome) -> Bool[np.ndarray, "m n"]:
        """Positions that are text."""
        m, full = len(outcome.tokens), self.full_run
        return shown_of(outcome.tokens, full.given[:m], full.valid[:m], self.scorer.end_ids)

    def lines(self, outcome: Outcome) -> list[list[int]]:
        """Tokens of the samples, of each up to its end."""
        return [row[text].tolist() for row, text in zip(outcome.tokens, self.shown(outcome), strict=True)]

    def generated(self, outcome: Outcome) -> list[list[int]]:
        """The same without what was given."""
        made = self.shown(outcome) & ~self.full_run.given[: len(outcome.tokens)]
        return [row[text].tolist() for row, text in zip(outcome.tokens, made, strict=True)]

    def tpf(self, outcome: Outcome) -> float:
        """Tokens per forward: tokens that all samples made, up to their ends and with them, over all their calls."""
        m, full = len(outcome.tokens), self.full_run
        return float(outputs_of(self.shown(outcome), full.given[:m], full.valid[:m]).sum() / outcome.nfe.sum())

    def right(self, outcome: Outcome) -> float | None:
        """Share of right answers; None where the workload asks for none."""
        asked = self.work is not None and self.work.answers
        return float(self.answered(outcome).mean()) if asked else None

    def answered(self, outcome: Outcome) -> Float[np.ndarray, " m"]:
        """1.0 where a sample has the right answer.

        Raises:
            CdlmError: the workload asks for no answers.
        """
        check_answers("answers", self.work)
        assert self.work is not None
        return self.work.right(self.texts(outcome))

    def score(self, tokens: Int[np.ndarray, "m n"]) -> Scores:
        """AR-NLL of the first samples of the bench, with these tokens."""
        m = len(tokens)
        return self.scorer(tokens, self.full_run.given[:m], self.full_run.valid[:m])

    def must_run(self, criterion: Criterion) -> bool:
        """Whether the rule cannot be replayed: it has to run, or the run is in blocks."""
        return self.recording is None or criterion.live

    def under(self, criterion: Criterion, live: int) -> Outcome:
        """The bench's samples under a rule: replayed, or the first `live` of them run if the rule `must_run`."""
        requests = self.requests[:live] if self.must_run(criterion) else self.requests
        return Outcome.under(self.session.with_criterion(criterion), requests, self.recording)

    def run(self, session: Session, live: int) -> Outcome:
        """The first `live` requests, drawn from the model."""
        return Outcome.under(session, self.requests[:live])

    def step_at(self, calls: float) -> int:
        """The step, from 1, at which to stop all samples of the full run for about so many calls a sample."""
        if self.recording is None:
            return max(1, round(calls * self.steps / float(self.full_calls.mean())))
        spent = np.maximum.accumulate(self.recording.record.nfe, 0).mean(1)
        return 1 + int(np.abs(spent - calls).argmin())

    @property
    def mean_steps(self) -> float:
        """Steps that a sample of the full run takes: fewer than its `steps` where rows end by themselves."""
        if self.recording is None:
            return float(self.steps)
        return 1 + float(self.recording.record.last_step(committed=True).mean())

    @property
    def steps_taken(self) -> Recording:
        """The recording, of a study that looks at single steps.

        Raises:
            CdlmError: the run was in blocks and has none.
        """
        if self.recording is None:
            raise CdlmError(f"{self.name} is sampled in blocks, whose steps are not recorded: take another model")
        return self.recording

    def change(self, outcome: Outcome) -> Bootstrap:
        """AR-NLL less that of the full run, in nats per token, on the same samples."""
        return self.score(outcome.tokens).bootstrap() - self.full.first(len(outcome.tokens)).bootstrap()

    def relative(self, outcome: Outcome) -> Bootstrap:
        """AR-NLL over that of the full run, less 1, on the same samples."""
        return self.score(outcome.tokens).relative_to(self.full.first(len(outcome.tokens)))

    def share_of_gap(self, outcome: Outcome) -> Bootstrap:
        """The change as a share of the gap to real text: above 0 it is further away, whichever of them is easier."""
        return self.change(outcome) / self.gap

    def differ(self, outcome: Outcome) -> Float[np.ndarray, " m"]:
        """Share of each sample's generated tokens that are not those of the full run, where either of them is text."""
        m, full = len(outcome.tokens), self.full_run
        text = self.shown(outcome) | self.shown(Outcome(full.tokens[:m], full.nfe[:m]))
        counted = text & ~full.given[:m]
        return ((outcome.tokens != full.tokens[:m]) & counted).sum(1) / counted.sum(1).clip(min=1)

    def agreement(self, outcome: Outcome) -> float:
        """Share of generated tokens that are those of the full run."""
        return 1 - float(self.differ(outcome).mean())

    def loss(self, outcome: Outcome, measure: str, two_sided: bool) -> Loss:
        """What was lost against the full run, as a measure has it; see `MEASURES`."""
        return MEASURES[measure](self, outcome, two_sided)


def longest(requests: Sequence[Request]) -> Request:
    """The request with the most to generate, the first of equals."""
    return max(requests, key=lambda request: int((~request.given).sum()))


def settings_of(session: Session, requests: Sequence[Request], work: Work | None) -> dict[str, Any]:
    """What a choice for these requests holds for: a choice on a workload holds for that workload."""
    if work is None:
        return {**session.settings, "length": session.sampling.length_of(requests)}
    return {**session.settings, "length": len(requests[0].tokens), "workload": work.name}


@dataclass(frozen=True)
class RealSample:
    """Real text and its AR-NLL."""

    corpus: Corpus
    scores: Scores


def _gap(bench: Bench, outcome: Outcome, two_sided: bool) -> Loss:
    return Change(bench.share_of_gap(outcome), two_sided, len(outcome.tokens))


def _nats(bench: Bench, outcome: Outcome, two_sided: bool) -> Loss:
    return Change(bench.change(outcome), two_sided, len(outcome.tokens))


def _relative(bench: Bench, outcome: Outcome, two_sided: bool) -> Loss:
    return Change(bench.relative(outcome), two_sided, len(outcome.tokens))


def _tokens(bench: Bench, outcome: Outcome, two_sided: bool) -> Loss:
    return Bounded(bench.differ(outcome))


def _texts(bench: Bench, outcome: Outcome, two_sided: bool) -> Loss:
    return Binary((bench.differ(outcome) > 0).astype(np.float64))


def _answers(bench: Bench, outcome: Outcome, two_sided: bool) -> Loss:
    full = bench.full_run
    before = bench.answered(Outcome(full.tokens[: len(outcome.tokens)], full.nfe[: len(outcome.tokens)]))
    return Binary(((before == 1) & (bench.answered(outcome) == 0)).astype(np.float64))


MEASURES: dict[str, Callable[[Bench, Outcome, bool], Loss]] = {
    "gap": _gap,
    "nats": _nats,
    "ar-nll": _relative,
    "agreement": _tokens,
    "texts": _texts,
    "answers": _answers,
}
"""What a rule loses, by name: AR-NLL as a share of the gap to real text, in nats, relative to the full run's; the share
of tokens that differ; the share of samples that differ at all; the share of problems whose right answer is lost,
whatever else is won."""


def tried(bench: Bench, outcome: Outcome, goal: Goal, measure: str) -> Tried:
    """What a setting spent and lost on the samples of the bench."""
    before = bench.full_calls[: len(outcome.nfe)]
    differ = Bounded(bench.differ(outcome)) if goal.agreement else None
    loss = bench.loss(outcome, measure, goal.two_sided)
    return Tried(float(outcome.nfe.mean()), float(1 - outcome.nfe.sum() / before.sum()), loss, differ)


def calibrate(bench: Bench, candidates: Sequence[Criterion], goal: Goal, measure: str) -> Calibration:
    """The loosest of `candidates`, which run from strict to loose, that stays within the goal.

    Raises:
        CdlmError: too few samples for the goal, a gap to real text that is within noise, or no candidate that halts
            reaches the goal.
    """
    n = len(bench.full_run)
    goal.check(n, fewest(goal, measure))
    if measure == "gap":
        bench.check_gap(goal.confidence)
    shown = progress(candidates, total=len(candidates), label="settings tried", shown=bench.session.progress)
    trials = halting.search(shown, lambda rule: tried(bench, bench.under(rule, live=n), goal, measure), goal, n)
    return Calibration(
        settings=bench.settings,
        rule=halting.loosest(trials).rule,
        measure=measure,
        bound=BOUNDS.get(measure, Change.bound),
        goal=goal,
        samples=n,
        seed=bench.session.seed,
        judge=bench.scorer.judge.describe() if measure in JUDGED else None,
        gap=bench.described_gap if measure == "gap" else None,
        trials=trials,
    )


NO_ANSWERS = (
    "answers is a measure of problems, and these samples answer nothing: give --workload 'Arithmetic()', or take"
    " another measure"
)


def check_answers(measure: str, work: Work | None) -> None:
    """Raise if the measure is of answers, and the samples give none.

    Raises:
        CdlmError: they give none.
    """
    if measure == "answers" and (work is None or not work.answers):
        raise CdlmError(NO_ANSWERS)


def fewest(goal: Goal, measure: str) -> int:
    """Least number of samples that the goal can be shown on: a bootstrap needs some whatever the limit."""
    return max(goal.fewest, FEWEST_TO_RESAMPLE) if measure in JUDGED else goal.fewest
