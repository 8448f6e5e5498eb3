"""Quality against calls: full runs recorded once, rules tried on them, and every text judged once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cdlm.core.errors import CdlmError
from cdlm.core.progress import progress
from cdlm.core.stats import Bootstrap, Scores, bootstrap
from cdlm.data.store import TextRows
from cdlm.evaluation.judge import Judge, features
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.halting import Criterion
from cdlm.halting import calibration as halting
from cdlm.halting.calibration import Calibration, Goal
from cdlm.halting.replay import replay
from cdlm.recording.file import Recording
from cdlm.sampling.recordings import recording_of
from cdlm.sampling.requests import Request
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import Session
from cdlm.sampling.texts import given_spans, shown_of, text_ids, text_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Outcome:
    """Samples of some run: what quality and cost are computed from."""

    tokens: Int[np.ndarray, "m n"]
    nfe: Int[np.ndarray, " m"]

    @staticmethod
    def under(session: Session, requests: Sequence[Request], recording: Recording | None = None) -> Outcome:
        """The requests under the session's rule.

        Args:
            recording: of their full run, to replay the rule on; it is run where there is none, or if it freezes tokens.
        """
        if recording is None or session.criterion.freezes:
            samples = session.run(requests)
            return Outcome(samples.tokens, samples.nfe)
        run = replay(recording, session.criterion)
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
        self, judge: Judge | Callable[[], Judge], tokenizer: PreTrainedTokenizerFast, eos_id: int | None = None
    ):
        self._judge, self.tokenizer, self.eos_id = judge, tokenizer, eos_id
        self.known: dict[tuple[bytes, bytes], tuple[float, float]] = {}

    @cached_property
    def judge(self) -> Judge:
        """The judge, opened."""
        return self._judge if isinstance(self._judge, Judge) else self._judge()

    def __call__(
        self, tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
    ) -> Scores:
        """Nats and judged tokens of each sample up to its end; what was given is context and is not scored."""
        valid = shown_of(tokens, given, valid, self.eos_id)
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
        if not weight.any():
            raise CdlmError("all samples are empty, and there is nothing to judge: does this model need prompts?")
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
    held_out: TextRows
    """Rows of held-out text."""

    @staticmethod
    def of(
        session: Session, requests: Sequence[Request], judge: Judge | Callable[[], Judge], held_out: TextRows,
        recording: Recording | None = None,
    ) -> Bench:  # fmt: skip
        """A bench of the recorded full run of the requests; without a recording the run is drawn."""
        if recording is None and session.replayable(requests):
            recording = recording_of(session.recorded().run(requests), session)
        if recording is None:
            run = session.run(requests)
            full = FullRun(run.tokens, run.given, run.valid, run.nfe, session.steps_of(requests[0]))
        else:
            full = FullRun.of(recording)
        model = session.model
        return Bench(session, requests, full, recording, Scorer(judge, model.need_tokenizer(), model.end_id), held_out)

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
        """AR-NLL of the full run."""
        return self.score(self.full_run.tokens)

    @cached_property
    def full_calls(self) -> Float[np.ndarray, " m"]:
        """Calls of the full run."""
        return self.full_run.nfe.astype(np.float64)

    @cached_property
    def real_tokens(self) -> list[list[int]]:
        """Held-out text: as many rows as the full run has samples, or as there are."""
        rows = [self.held_out[i] for i in range(min(len(self.full_run), len(self.held_out)))]
        return [text_ids(row.tokens[row.valid].tolist(), self.scorer.eos_id) for row in rows]

    @property
    def real_texts(self) -> list[str]:
        """The same as texts."""
        return [text_of(self.tokenizer, ids) for ids in self.real_tokens]

    @cached_property
    def real(self) -> Scores:
        """AR-NLL of held-out text."""
        scored = ar_nll(self.scorer.judge, self.real_texts)
        return Scores(scored.text_nats, scored.text_tokens.astype(np.float64))

    @cached_property
    def real_features(self) -> Float[np.ndarray, "m w"]:
        """What MAUVE compares samples with."""
        return features(self.scorer.judge, self.real_texts)

    @property
    def steps(self) -> int:
        """Of the full run."""
        return self.full_run.steps

    @property
    def settings(self) -> dict[str, Any]:
        """What a choice for this bench holds for."""
        return {**self.session.settings, "length": self.session.sampling.length_of(self.requests)}

    def texts(self, outcome: Outcome) -> list[str]:
        """Samples as text."""
        return texts_of(self.tokenizer, outcome.tokens, self.shown(outcome))

    def shown(self, outcome: Outcome) -> Bool[np.ndarray, "m n"]:
        """Positions that are text."""
        m, full = len(outcome.tokens), self.full_run
        return shown_of(outcome.tokens, full.given[:m], full.valid[:m], self.scorer.eos_id)

    def score(self, tokens: Int[np.ndarray, "m n"]) -> Scores:
        """AR-NLL of the first samples of the bench, with these tokens."""
        m = len(tokens)
        return self.scorer(tokens, self.full_run.given[:m], self.full_run.valid[:m])

    def must_run(self, criterion: Criterion) -> bool:
        """Whether the rule cannot be replayed: it freezes tokens, or the run is in blocks."""
        return self.recording is None or criterion.freezes

    def under(self, criterion: Criterion, live: int) -> Outcome:
        """The bench's samples under a rule: replayed, or the first `live` of them run if the rule `must_run`."""
        requests = self.requests[:live] if self.must_run(criterion) else self.requests
        return Outcome.under(self.session.with_criterion(criterion), requests, self.recording)

    def run(self, session: Session, live: int) -> Outcome:
        """The first `live` requests, drawn from the model."""
        return Outcome.under(session, self.requests[:live])

    def draw(self, session: Session, live: int) -> Samples:
        """The first `live` requests as samples."""
        return session.run(self.requests[:live])

    @property
    def steps_taken(self) -> Recording:
        """The recording, of a study that looks at single steps.

        Raises:
            CdlmError: the run was in blocks and has none.
        """
        if self.recording is None:
            raise CdlmError(f"{self.name} is sampled in blocks, whose steps are not recorded: take another model")
        return self.recording

    def loss(self, outcome: Outcome, measure: str = "ar-nll") -> Bootstrap:
        """What was lost against the full run: relative AR-NLL, or the share of tokens that differ."""
        return MEASURES[measure](self, outcome)

    def agreement(self, outcome: Outcome) -> float:
        """Share of generated tokens that are those of the full run."""
        return 1 - _disagreement(self, outcome).value


def _relative_nll(bench: Bench, outcome: Outcome) -> Bootstrap:
    m = len(outcome.tokens)
    full = Scores(bench.full.total[:m], bench.full.weight[:m])
    return bench.score(outcome.tokens).relative_to(full)


def _disagreement(bench: Bench, outcome: Outcome) -> Bootstrap:
    m, full = len(outcome.tokens), bench.full_run
    open_ = ~full.given[:m]
    wrong = ((outcome.tokens != full.tokens[:m]) & open_).sum(1).astype(np.float64)
    return bootstrap(Scores(wrong, open_.sum(1).astype(np.float64)), m)


MEASURES: dict[str, Callable[[Bench, Outcome], Bootstrap]] = {"ar-nll": _relative_nll, "agreement": _disagreement}
"""What a rule loses, by name."""


def calibrate(bench: Bench, candidates: Sequence[Criterion], goal: Goal, measure: str) -> Calibration:
    """The loosest of `candidates`, which run from strict to loose, that stays within the goal.

    Raises:
        CdlmError: too few samples for the goal, or no candidate that halts reaches it.
    """
    n = len(bench.full_run)

    def trial(criterion: Criterion) -> tuple[float, float, Bootstrap]:
        outcome = bench.under(criterion, live=n)
        saved = float(1 - outcome.nfe.sum() / bench.full_calls.sum())
        return float(outcome.nfe.mean()), saved, bench.loss(outcome, measure)

    tried = progress(candidates, total=len(candidates), label="settings tried", shown=bench.session.progress)
    trials = halting.search(tried, trial, goal, n)
    return Calibration(
        settings=bench.settings,
        rule=halting.loosest(trials).rule,
        measure=measure,
        goal=goal,
        samples=n,
        seed=bench.session.seed,
        judge=bench.scorer.judge.describe() if measure == "ar-nll" else None,
        trials=trials,
    )
