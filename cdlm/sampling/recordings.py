"""Recordings of a session's runs: make them, write them, and turn what a rule would have done into samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from cdlm.core.errors import CdlmError
from cdlm.core.types import HaltReason
from cdlm.halting import Criterion
from cdlm.halting.replay import Replayed, replay
from cdlm.recording.file import Recording, check_same_model, read_folder
from cdlm.sampling.requests import Request
from cdlm.sampling.samples import Samples, spans_of
from cdlm.sampling.session import Session
from cdlm.sampling.texts import ends_of, save_tokenizer, shown_of, special_of, texts_of
from cdlm.sampling.voting import AnswerReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def recording_of(samples: Samples, session: Session) -> Recording:
    """The recorded samples of a session as something to write and replay.

    Raises:
        CdlmError: they have no record, or a rule halted some of them or settled their tokens.
    """
    if samples.record is None:
        raise CdlmError("the samples have no record to write: draw them with record=True")
    halted = sum(reason is HaltReason.CRITERION for reason in samples.reason)
    if halted:
        raise CdlmError(
            f"replay needs full-length runs, and {halted} of {len(samples)} samples halted early:"
            " record without a halting rule"
        )
    if session.criterion.freezes:
        raise CdlmError(
            f"replay needs full-length runs, and {session.criterion!r} settles tokens on the way: record without a"
            " halting rule"
        )
    return Recording(
        samples.record, samples.tokens, samples.given, samples.valid, samples.index, samples.seed, session.model.name,
        session.model.need_fingerprint(), recorded_settings(session, samples.tokens.shape[1]), samples.prompts,
        samples.made_by, _vocab(session),
    )  # fmt: skip


def _vocab(session: Session) -> int | None:
    """Tokens of a session's model, or of its tokenizer if that has more; None if neither is known."""
    tokenizer = session.model.tokenizer
    known = (getattr(session.model, "vocab", None), None if tokenizer is None else len(tokenizer))
    return max((count for count in known if count is not None), default=None)


def recorded_settings(session: Session, length: int) -> dict[str, object]:
    """What fixes the recorded steps of samples of that length, beside seed and prompts."""
    model, ends = session.model, {}
    if model.ends:
        known = () if model.tokenizer is None else special_of(model.tokenizer).end_ids
        ends = {"ends": True if set(model.end_ids) <= set(known) else list(model.end_ids)}
    return {**session.settings, "length": length, "precision": model.precision, **ends}


def write_recording(recording: Recording, session: Session, folder: Path) -> Path:
    """Write the recording into `folder`, beside the tokenizer that reads its tokens; returns the file.

    Raises:
        CdlmError: the folder holds recordings of another model.
    """
    check_same_model(folder, session.model.has_weights)
    given = recording.given & recording.valid
    prompts = [recording.index, given, recording.valid, np.where(given, recording.tokens, 0)]
    content = json.dumps([recording.settings, *(part.tolist() for part in prompts)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    file = folder / f"{recording.record.steps}-steps-seed-{recording.seed}-{digest}.safetensors"
    recording.write(file)
    save_tokenizer(session.model.need_tokenizer(), folder)
    return file


def find_recording(folder: Path, session: Session, requests: Sequence[Request]) -> Recording:
    """The first samples of a recording that holds what the session would draw for these requests.

    Raises:
        CdlmError: the recordings are of another model, or none has these settings, this seed and these requests.
    """
    check_same_model(folder, session.model.has_weights)
    n, wanted = len(requests), recorded_settings(session, len(requests[0].tokens))
    for recording in read_folder(folder).values():
        if dict(recording.settings) == wanted and recording.seed == session.seed and len(recording) >= n:
            found = recording.first(n)
            if _serves(found, requests):
                return found
    prompts = "with these prompts" if any(bool(request.given.any()) for request in requests) else "without prompts"
    raise CdlmError(
        f"{folder} has no recording of {n} samples {prompts}, seed {session.seed}, settings {wanted}:"
        " record one with cdlm sample --record"
    )


def _serves(recording: Recording, requests: Sequence[Request]) -> bool:
    """Whether the recorded samples are those of the requests: their numbers, padding, and what is given."""
    given = np.stack([request.given.numpy() for request in requests])
    valid = np.stack([np.ones(len(r.tokens), bool) if r.valid is None else r.valid.numpy() for r in requests])
    tokens = np.stack([request.tokens.numpy() for request in requests])
    masks = np.array_equal(recording.given, given) and np.array_equal(recording.valid, valid)
    prompts = masks and np.array_equal(recording.tokens[given & valid], tokens[given & valid])
    return prompts and recording.index.tolist() == [request.index for request in requests]


def _full(recording: Recording, run: Replayed, criterion: Criterion) -> Bool[np.ndarray, " m"]:
    """Samples whose positions were all committed by the step at which they leave."""
    record = recording.record
    if record.masked:  # its last step commits what is left
        return (run.steps < record.budgets) | (not criterion.waits)
    if record.commits is None:
        return np.zeros(len(record), bool)
    return np.bincount(record.commits.sample, minlength=len(record)) == (~recording.given).sum(1)


def replayed(recording: Recording, criterion: Criterion, tokenizer: PreTrainedTokenizerFast) -> Samples:
    """The samples that a live run with the rule would have given."""
    ends = ends_of_recording(recording, tokenizer)
    run = replay(recording, criterion.reading(AnswerReader(tokenizer, ends)))
    shown = shown_of(run.tokens, recording.given, recording.valid, ends)
    full = ~run.halted & _full(recording, run, criterion)
    reasons = [
        HaltReason.CRITERION if halted else HaltReason.FULL if done else HaltReason.BUDGET
        for halted, done in zip(run.halted, full, strict=True)
    ]
    return Samples(
        tokens=run.tokens,
        texts=texts_of(tokenizer, run.tokens, shown),
        nfe=run.nfe,
        steps=run.steps,
        budget=recording.record.steps,
        reason=reasons,
        seed=recording.seed,
        index=recording.index,
        given=recording.given,
        valid=recording.valid,
        shown=shown,
        settled=recording.record.settled(
            ends_of(run.tokens, recording.given & recording.valid, ends), recording.given, run.steps - 1
        ),
        spans=spans_of(tokenizer, run.tokens, recording.given, shown),
        prompts=list(recording.prompts),
        made_by={**_made_by(recording), "halt": repr(criterion)},
    )


def ends_of_recording(recording: Recording, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Stop tokens of the recorded texts: those that the settings list, or where they say that there are the
    tokenizer's."""
    ends = recording.settings.get("ends", False)
    return tuple(ends) if isinstance(ends, list) else special_of(tokenizer).end_ids if ends else ()


def _made_by(recording: Recording) -> dict[str, str]:
    """What made the full run, of older recordings as far as they say."""
    settings = json.dumps(recording.settings)
    known = {"model": recording.model, "weights": recording.weights, "sampling": settings, "halt": "", "version": ""}
    return {**known, **recording.made_by}


def agreement(tokens: Int[np.ndarray, "m n"], recording: Recording) -> Float[np.ndarray, " m"]:
    """Share of each sample's generated tokens that are those of the full run."""
    same = (tokens == recording.tokens) & ~recording.given
    return same.sum(1) / (~recording.given).sum(1)
