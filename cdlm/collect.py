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
from cdlm.record import RECORDED, Record, Switches, in_order
from cdlm.types import Finished, HaltReason, Samples, StepState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEEDED = frozenset({"tokens", *RECORDED})
"""Signals that the sampler of a recorded run computes."""


def collect(
    steps: Iterable[Finished],
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerFast,
    *,
    budget: int,
    seed: int,
    record: bool = False,
) -> Samples:
    """Run the loop to its end. `record` needs a sampler that computes the signals of `NEEDED`."""
    place = {request.index: i for i, request in enumerate(requests)}
    count = len(requests)
    tokens = torch.stack([request.tokens for request in requests])
    nfe, taken = np.zeros(count, np.int64), np.zeros(count, np.int64)
    reasons = [HaltReason.BUDGET] * count
    tape = Tape(budget, tokens) if record else None
    for step in steps:
        columns = np.array([place[row] for row in step.state.row.tolist()])
        if tape is not None:
            tape.write(step.state, columns)
        leaving = step.done.nonzero().squeeze(1).tolist()
        for row, final in zip(leaving, step.tokens.cpu(), strict=True):
            i = columns[row]
            tokens[i] = final
            nfe[i], taken[i] = int(step.state.nfe[row]), int(step.state.step[row]) + 1
            if bool(step.halted[row]):
                reasons[i] = HaltReason.CRITERION
            elif bool(step.full[row]):
                reasons[i] = HaltReason.FULL
    valid = np.stack([np.ones(len(r.tokens), bool) if r.valid is None else r.valid.numpy() for r in requests])
    return Samples(
        tokens=tokens.numpy(),
        texts=texts_of(tokenizer, tokens.numpy(), valid),
        nfe=nfe,
        steps=taken,
        budget=budget,
        reason=reasons,
        seed=seed,
        index=np.array([request.index for request in requests]),
        given=np.stack([request.given.numpy() for request in requests]),
        valid=valid,
        record=None if tape is None else tape.record(),
    )


class Tape:
    """A record in the making."""

    def __init__(self, budget: int, start: Int[Tensor, "m n"]):
        count = len(start)
        self.tokens = np.full(start.shape, -1, np.int64)
        self.t = np.full(budget, np.nan)
        self.nfe = np.zeros((budget, count), np.int32)
        self.signals = {name: np.full((budget, count), np.nan, np.float32) for name in RECORDED}
        self.switches: list[Switches] = []

    def write(self, state: StepState, columns: Int[np.ndarray, " b"]) -> None:
        """Take down one step of the rows whose places among the samples are `columns`."""
        steps, tokens = state.step.cpu().numpy(), state.tokens.cpu().numpy()
        self.t[steps], self.nfe[steps, columns] = state.t.cpu().numpy(), state.nfe.cpu().numpy()
        for name, values in self.signals.items():
            values[steps, columns] = getattr(state, name).cpu().numpy()
        row, position = np.nonzero((tokens != self.tokens[columns]) & state.open.cpu().numpy())
        switches = Switches(steps[row], columns[row], position, tokens[row, position])
        kinds = (np.uint32, np.uint32, np.uint16, np.uint32)
        self.switches.append(Switches(*(part.astype(kind) for part, kind in zip(switches, kinds, strict=True))))
        self.tokens[columns] = tokens

    def record(self) -> Record:
        """What was taken down."""
        switches = Switches(*(np.concatenate(parts) for parts in zip(*self.switches, strict=True)))
        return Record(self.t, self.nfe, self.signals, in_order(switches))


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Text of a packed row: the end-of-text token, which joins documents, is a line break."""
    return str(tokenizer.decode(ids, skip_special_tokens=False)).replace(str(tokenizer.eos_token), "\n")


def texts_of(
    tokenizer: PreTrainedTokenizerFast, tokens: Int[np.ndarray, "m n"], valid: Bool[np.ndarray, "m n"]
) -> list[str]:
    """Text of each row without its padding."""
    return [decode(tokenizer, ids[real].tolist()) for ids, real in zip(tokens, valid, strict=True)]


def given_spans(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], given: Bool[np.ndarray, " n"]
) -> list[tuple[int, int]]:
    """Characters [start, end) of the decoded text that came from a prompt."""
    edges = np.flatnonzero(np.diff(given.astype(np.int8), prepend=0, append=0))
    at = [len(decode(tokenizer, ids[:edge])) for edge in edges.tolist()]
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
