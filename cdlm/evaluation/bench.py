"""Quality against calls: full runs recorded once, rules tried on them, and every text judged once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cdlm import api, generation
from cdlm.config import read_run
from cdlm.continuous.sampler import Sampler
from cdlm.core.errors import CdlmError
from cdlm.core.stats import Bootstrap, Scores, bootstrap
from cdlm.data.store import TextRows
from cdlm.evaluation.judge import Judge, features
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.halting import Criterion
from cdlm.halting.replay import replay
from cdlm.halting.signals import check_signals
from cdlm.masked.sampler import Decoder
from cdlm.models import hub
from cdlm.models.hub import Folder
from cdlm.models.system import Precision, special_of
from cdlm.recording.file import Recording, check_same_model, read_folder
from cdlm.runs import RunText
from cdlm.sampling.requests import Request, requests
from cdlm.sampling.samples import NEEDED, NEEDED_MASKED, Samples, given_spans, shown_of, text_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Machine:
    """Where and how things run; the fields are those of `generation.draw_spread`."""

    batch_size: int = generation.BATCH
    precision: Precision = "fp32"
    device: str = "cpu"
    devices: int = 1
    progress: bool = True


@dataclass(frozen=True)
class Drawn:
    """Samples of some run: what quality and cost are computed from."""

    tokens: Int[np.ndarray, "m n"]
    nfe: Int[np.ndarray, " m"]


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
    def of(kept: Recording) -> FullRun:
        """What a recording says of it."""
        return FullRun(kept.tokens, kept.given, kept.valid, kept.record.nfe.max(0), kept.record.steps)


class Scorer:
    """AR-NLL of samples under a judge; each distinct text is judged once."""

    def __init__(self, judge: Judge, tokenizer: PreTrainedTokenizerFast, eos_id: int | None = None):
        self.judge, self.tokenizer, self.eos_id = judge, tokenizer, eos_id
        self.known: dict[tuple[bytes, bytes], tuple[float, float]] = {}

    def __call__(
        self, tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
    ) -> Scores:
        """Nats and judged tokens of each sample up to its end; what was given is context and is not scored."""
        valid = shown_of(tokens, given, valid, self.eos_id)
        keys = [
            (row[real].tobytes(), told[real].tobytes()) for row, told, real in zip(tokens, given, valid, strict=True)
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
    """A model, a sampler and a judge, with the full-length run that everything is compared with."""

    run: str
    sampler: Sampler | Decoder
    """Without a rule."""
    asked: Sequence[Request]
    full_run: FullRun
    recording: Recording | None
    """Its steps, to try rules on; None of a run in blocks, where to halt one changes the next."""
    weights: str
    """Fingerprint of the model."""
    tokenizer: PreTrainedTokenizerFast
    scorer: Scorer
    machine: Machine
    held_out: TextRows
    """Rows of the run's held-out text."""
    folder: Path
    """Where the model's files are."""

    @cached_property
    def full(self) -> Scores:
        """AR-NLL of the full run."""
        return self.score(self.full_run.tokens)

    @cached_property
    def full_calls(self) -> Float[np.ndarray, " m"]:
        """Calls of the full run."""
        return self.full_run.nfe.astype(np.float64)

    @cached_property
    def _real(self) -> list[list[int]]:
        rows = [self.held_out[i] for i in range(min(len(self.full_run), len(self.held_out)))]
        return [api.text_ids(row.tokens[row.valid].tolist(), self.scorer.eos_id) for row in rows]

    @cached_property
    def real_features(self) -> Float[np.ndarray, "m w"]:
        """What MAUVE compares samples with."""
        return features(self.scorer.judge, self.real_texts)

    @property
    def steps(self) -> int:
        """Of the full run."""
        return self.full_run.steps

    def refuses(self, rule: Criterion) -> str:
        """Why the model has no use for a rule; empty if it has."""
        try:
            check_signals(rule.needs, spatial=isinstance(self.sampler, Sampler))
        except CdlmError as error:
            return str(error)
        return ""

    @property
    def settings(self) -> dict[str, Any]:
        """What a choice for this bench holds for."""
        return {**self.sampler.settings, "length": self.full_run.tokens.shape[1]}

    @property
    def real_texts(self) -> list[str]:
        """Held-out text: as many rows as the full run has samples, or as there are."""
        return [text_of(self.tokenizer, ids) for ids in self._real]

    @property
    def real(self) -> tuple[list[list[int]], Scores]:
        """Its tokens, and AR-NLL."""
        scored = ar_nll(self.scorer.judge, self.real_texts)
        return self._real, Scores(scored.text_nats, scored.text_tokens.astype(np.float64))

    def texts(self, drawn: Drawn) -> list[str]:
        """Samples as text."""
        return texts_of(self.tokenizer, drawn.tokens, self.shown(drawn))

    def shown(self, drawn: Drawn) -> Bool[np.ndarray, "m n"]:
        """Positions that are text."""
        m, kept = len(drawn.tokens), self.full_run
        return shown_of(drawn.tokens, kept.given[:m], kept.valid[:m], self.scorer.eos_id)

    def score(self, tokens: Int[np.ndarray, "m n"]) -> Scores:
        """AR-NLL of the first samples of the bench, with these tokens."""
        m = len(tokens)
        return self.scorer(tokens, self.full_run.given[:m], self.full_run.valid[:m])

    def run_rule(self, rule: Criterion, live: int) -> Drawn:
        """The bench's samples under a rule: replayed, or the first `live` of them run if the rule `must_run`."""
        if self.recording is None or rule.freezes:
            return self.run_live(replace(self.sampler, criterion=rule), live)
        run = replay(self.recording, rule)
        return Drawn(run.tokens, run.nfe)

    @property
    def steps_taken(self) -> Recording:
        """The recording, of a study that looks at single steps.

        Raises:
            CdlmError: the run was in blocks and has none.
        """
        if self.recording is None:
            raise CdlmError(f"{self.run} is sampled in blocks, whose steps are not recorded: take another model")
        return self.recording

    def must_run(self, rule: Criterion) -> bool:
        """Whether the rule cannot be replayed: it freezes tokens, or the run is in blocks."""
        return self.recording is None or rule.freezes

    def run_live(self, sampler: Sampler | Decoder, live: int) -> Drawn:
        """The first `live` requests, drawn from the model."""
        samples = self.draw(sampler, live)
        return Drawn(samples.tokens, samples.nfe)

    def draw(self, sampler: Sampler | Decoder, live: int) -> Samples:
        """The first `live` requests as samples."""
        return generation.draw_spread(self.run, sampler, self.asked[:live], **asdict(self.machine))

    def loss(self, drawn: Drawn, measure: str = "ar-nll") -> Bootstrap:
        """What was lost against the full run: relative AR-NLL, or the share of tokens that differ."""
        return MEASURES[measure](self, drawn)

    def agreement(self, drawn: Drawn) -> float:
        """Share of generated tokens that are those of the full run."""
        return 1 - _disagreement(self, drawn).value


def _relative_nll(bench: Bench, drawn: Drawn) -> Bootstrap:
    m = len(drawn.tokens)
    full = Scores(bench.full.total[:m], bench.full.weight[:m])
    return bench.score(drawn.tokens).relative_to(full)


def _disagreement(bench: Bench, drawn: Drawn) -> Bootstrap:
    m, full = len(drawn.tokens), bench.full_run
    open_ = ~full.given[:m]
    wrong = ((drawn.tokens != full.tokens[:m]) & open_).sum(1).astype(np.float64)
    return bootstrap(Scores(wrong, open_.sum(1).astype(np.float64)), m)


MEASURES: dict[str, Callable[[Bench, Drawn], Bootstrap]] = {"ar-nll": _relative_nll, "agreement": _disagreement}
"""What a rule loses, by name."""


def open_bench(
    run: str,
    sampler: Sampler | Decoder,
    n: int,
    machine: Machine,
    *,
    recordings: Path | None = None,
    judge: str | None = None,
    judge_steps: int = 500,
) -> Bench:
    """Draw the full run, or take it from a folder of recordings, and prepare the judge of the run's text.

    Raises:
        CdlmError: the recordings are of another model, or none has these settings, this seed and n samples.
    """
    folder, config = hub.read(run), read_run(run)
    data = RunText.of(config, folder.tokenizer)
    asked = requests(None, n, folder.length, folder.tokenizer)
    asked_judge = api.open_judge(judge, data, config, judge_steps, machine.device, machine.progress)
    recording = None
    if recordings is not None:
        recording = _find(recordings, folder, sampler, machine.precision, n)
        full = FullRun.of(recording)
    elif isinstance(sampler, Sampler) and generation.blocks_of(sampler, asked) > 1:
        samples = generation.draw_spread(run, sampler, asked, **asdict(machine))
        full = FullRun(samples.tokens, samples.given, samples.valid, samples.nfe, sampler.steps)
    else:
        bench_sampler = replace(sampler, record=NEEDED_MASKED if isinstance(sampler, Decoder) else NEEDED)
        samples = generation.draw_spread(run, bench_sampler, asked, **asdict(machine))
        recording = api.recording_of(samples, sampler, folder, machine.precision)
        full = FullRun.of(recording)
    scorer = Scorer(asked_judge, folder.tokenizer, special_of(folder.tokenizer).eos_id if folder.ends else None)
    weights = hub.fingerprint(folder.path)
    return Bench(
        run, sampler, asked, full, recording, weights, folder.tokenizer, scorer, machine, data.valid, folder.path
    )


def _find(folder: Path, run: Folder, sampler: Sampler | Decoder, precision: Precision, n: int) -> Recording:
    weights, length = hub.fingerprint(run.path), run.length
    wanted = {**sampler.settings, "length": length, "precision": precision, **({"ends": True} if run.ends else {})}
    check_same_model(folder, weights)
    for recording in read_folder(folder).values():
        plain = not recording.given.any()
        if dict(recording.settings) == wanted and recording.seed == sampler.seed and len(recording) >= n and plain:
            return recording.first(n)
    raise CdlmError(
        f"{folder} has no recording of {n} samples without prompts, seed {sampler.seed}, settings {wanted}:"
        " record one with cdlm sample --record"
    )
