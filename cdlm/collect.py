"""Consumers of the sampling loop: samples in the order of their requests, per-step records, progress."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cdlm.loop import Request
from cdlm.record import RECORDED, Record, Switches, in_order, joined
from cdlm.signals import SPATIAL
from cdlm.types import Finished, HaltReason, Samples, StepState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEEDED = frozenset({"tokens", *RECORDED})
"""Signals that the sampler of a recorded run computes."""
NEEDED_MASKED = NEEDED - SPATIAL
"""The same of a decoder."""


def collect(
    steps: Iterable[Finished],
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
    tape = Tape(budget, tokens, mask_id) if record else None
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


class Tape:
    """A record in the making."""

    def __init__(self, budget: int, start: Int[Tensor, "m n"], mask_id: int | None = None):
        count, self.mask_id = len(start), mask_id
        self.tokens = np.full(start.shape, -1, np.int64)
        self.t = np.full(budget, np.nan)
        self.nfe = np.zeros((budget, count), np.int32)
        self.budget = np.full(count, budget)
        self.signals: dict[str, np.ndarray] = {}
        self.switches: list[Switches] = []
        self.commits: list[Switches] = []

    def write(self, state: StepState, columns: Int[np.ndarray, " b"], canvas: Int[Tensor, "b n"] | None = None) -> None:
        """Take down one step of the rows whose places among the samples are `columns`."""
        steps, tokens = state.step.cpu().numpy(), state.tokens.cpu().numpy()
        self.nfe[steps, columns], self.budget[columns] = state.nfe.cpu().numpy(), state.budget.cpu().numpy()
        for name in RECORDED:
            if name in state.signals:
                values = self.signals.setdefault(name, np.full(self.nfe.shape, np.nan, np.float32))
                values[steps, columns] = state.signals[name].cpu().numpy()
        open_ = state.open.cpu().numpy()
        self.switches.append(_changes(tokens, self.tokens[columns], open_, steps, columns))
        self.tokens[columns] = tokens
        if canvas is None:
            self.t[steps] = state.t.cpu().numpy()  # rows of a masked model have levels of their own
        else:
            after = canvas.cpu().numpy()
            self.commits.append(_changes(after, np.full_like(after, self.mask_id), open_, steps, columns))

    def record(self) -> Record:
        """What was taken down."""
        commits = in_order(joined(self.commits)) if self.commits else None
        budget = None if commits is None else self.budget
        return Record(self.t, self.nfe, self.signals, in_order(joined(self.switches)), commits, budget)


def _changes(
    now: Int[np.ndarray, "b n"], before: Int[np.ndarray, "b n"], open_: Bool[np.ndarray, "b n"],
    steps: Int[np.ndarray, " b"], columns: Int[np.ndarray, " b"],
) -> Switches:  # fmt: skip
    """Open positions whose token is another than before."""
    row, position = np.nonzero((now != before) & open_)
    changed = (steps[row], columns[row], position, now[row, position])
    kinds = (np.uint32, np.uint32, np.uint16, np.uint32)
    return Switches(*(part.astype(kind) for part, kind in zip(changed, kinds, strict=True)))


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


def with_progress(steps: Iterable[Finished], total: int) -> Iterator[Finished]:
    """Pass the steps on while a bar on standard error shows the samples done and their mean calls."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done, calls = 0, 0
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TextColumn("mean calls {task.fields[calls]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total, calls="-")
        for step in steps:
            if len(step.tokens):
                done, calls = done + len(step.tokens), calls + int(step.state.nfe[step.done].sum())
                bar.update(task, completed=done, calls=f"{calls / done:.1f}")
            yield step
