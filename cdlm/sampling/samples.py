"""Consumers of the sampling loop: samples in the order of their requests, per-step records, progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int

from cdlm.core.types import HaltReason, LoopStep
from cdlm.halting.signals import RECORDED, SPATIAL
from cdlm.recording.record import Record
from cdlm.recording.writer import Recorder
from cdlm.sampling.requests import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


from dataclasses import dataclass
from typing import TYPE_CHECKING

NEEDED = frozenset({"tokens", *RECORDED})
"""Signals that the sampler of a recorded run computes."""
NEEDED_MASKED = NEEDED - SPATIAL
"""The same of a decoder."""


def collect(
    steps: Iterable[LoopStep],
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    budget: int,
    seed: int,
    record: bool = False,
    mask_id: int | None = None,
    eos_id: int | None = None,
) -> Samples:
    """Run the loop to its end. `record` needs a sampler that computes the signals of `NEEDED`, as far as there are any.

    Args:
        tokenizer: None leaves out the texts.
        mask_id: of a masked model.
        eos_id: texts are cut at the first such token that was generated; None cuts none.
    """
    place = {request.index: i for i, request in enumerate(requests)}
    count = len(requests)
    tokens = torch.stack([request.tokens for request in requests])
    nfe, taken, settled = (np.zeros(count, np.int64) for _ in range(3))
    reasons = [HaltReason.BUDGET] * count
    tape = Recorder(RECORDED, budget, tokens, mask_id) if record else None
    for step in steps:
        columns = np.array([place[row] for row in step.state.row.tolist()])
        if tape is not None:
            tape.write(step.state, columns, step.canvas)
        leaving = step.done.nonzero().squeeze(1).tolist()
        for row, final in zip(leaving, step.tokens.cpu(), strict=True):
            i = columns[row]
            tokens[i] = final
            counted = step.state.step[row] + 1 if step.taken is None else step.taken[row]
            nfe[i], taken[i] = int(step.state.nfe[row]), int(counted)
            settled[i] = nfe[i] if step.settled is None else int(step.settled[row]) or nfe[i]
            if bool(step.halted[row]):
                reasons[i] = HaltReason.CRITERION
            elif bool(step.full[row]):
                reasons[i] = HaltReason.FULL
    valid = np.stack([np.ones(len(r.tokens), bool) if r.valid is None else r.valid.numpy() for r in requests])
    given = np.stack([request.given.numpy() for request in requests])
    shown = shown_of(tokens.numpy(), given, valid, eos_id)
    return Samples(
        tokens=tokens.numpy(),
        texts=[] if tokenizer is None else texts_of(tokenizer, tokens.numpy(), shown),
        nfe=nfe,
        steps=taken,
        budget=budget,
        reason=reasons,
        seed=seed,
        index=np.array([request.index for request in requests]),
        given=given,
        valid=valid,
        shown=shown,
        settled=settled,
        record=None if tape is None else tape.record(),
    )


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Text of a packed row: the end-of-text token, which joins documents, is a line break."""
    return str(tokenizer.decode(ids, skip_special_tokens=False)).replace(str(tokenizer.eos_token), "\n")


def texts_of(
    tokenizer: PreTrainedTokenizerFast, tokens: Int[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
) -> list[str]:
    """Text of each row without its padding."""
    return [text_of(tokenizer, ids[real].tolist()) for ids, real in zip(tokens, valid, strict=True)]


def shown_of(
    tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"], eos_id: int | None
) -> Bool[np.ndarray, "m n"]:
    """Positions that are text: no padding, and nothing from the first generated `eos_id` on; None ends no text."""
    if eos_id is None:
        return valid
    return valid & ~np.logical_or.accumulate(ends_of(tokens, given & valid, eos_id), 1)


def ends_of(
    tokens: Int[np.ndarray, "m n"], given: Bool[np.ndarray, "m n"], eos_id: int | None
) -> Bool[np.ndarray, "m n"]:
    """Where a text may end: at an `eos_id` after the last position that was given (padding apart)."""
    after = ~np.logical_or.accumulate(given[:, ::-1], 1)[:, ::-1]
    return (tokens == eos_id) & after


def given_spans(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], given: Bool[np.ndarray, " n"]
) -> list[tuple[int, int]]:
    """Characters [start, end) of the decoded text that came from a prompt."""
    edges = np.flatnonzero(np.diff(given.astype(np.int8), prepend=0, append=0))
    at = [len(text_of(tokenizer, ids[:edge])) for edge in edges.tolist()]
    return list(zip(at[::2], at[1::2], strict=True))


COLUMNS = ("tokens", "nfe", "steps", "index", "given", "valid", "shown", "settled")
"""Fields of samples that are arrays with a row for each."""


@dataclass(frozen=True)
class Samples:
    """A finished run, in the order of the requests."""

    tokens: Int[np.ndarray, "m n"]
    texts: list[str]
    """Empty when there is no tokenizer."""
    nfe: Int[np.ndarray, " m"]
    """Denoiser calls spent on each sample."""
    steps: Int[np.ndarray, " m"]
    """Grid points visited by each sample."""
    budget: int
    """Grid points of the run."""
    reason: list[HaltReason]
    seed: int
    index: Int[np.ndarray, " m"]
    """Index of each sample: with the seed it fixes the sample's noise."""
    given: Bool[np.ndarray, "m n"]
    """True at prompt positions and padding."""
    valid: Bool[np.ndarray, "m n"]
    """False on padding, which a template shorter than the length leaves."""
    shown: Bool[np.ndarray, "m n"]
    """Positions that are text: no padding, and nothing from the end of a text on where texts have one."""
    settled: Int[np.ndarray, " m"]
    """Calls after which the text up to its first end-of-text token was decided: what was spent beyond, was spent after
    the end. Of a continuous model all calls."""
    record: Record | None = None
    """Statistics of every step; None unless asked for."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def calls_after_end(self) -> Int[np.ndarray, " m"]:
        """Calls that each sample spent when its text was already decided."""
        return self.nfe - self.settled

    @staticmethod
    def merge(parts: Sequence[Samples]) -> Samples:
        """The samples of several processes as one run, in the order of their index."""
        order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")

        def all_of(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])[order]

        texts = [text for part in parts for text in part.texts]
        reasons = [reason for part in parts for reason in part.reason]
        records = [part.record for part in parts if part.record is not None]
        record = Record.join(records).select(order) if records else None
        return Samples(
            **{name: all_of(name) for name in COLUMNS},
            texts=[texts[i] for i in order] if texts else [],
            reason=[reasons[i] for i in order],
            seed=parts[0].seed,
            budget=max(part.budget for part in parts),
            record=record,
        )
