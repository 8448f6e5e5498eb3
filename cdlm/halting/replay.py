"""What a rule would have done to a recorded run, without the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int

from cdlm.core.errors import CdlmError
from cdlm.core.types import NewRows, StepState
from cdlm.halting.criterion import Criterion
from cdlm.halting.signals import RECORDED
from cdlm.recording.file import Recording

FROM_SWITCHES = ("switches", "tokens")
"""Signals that replay computes from the switches and commits of a recording."""


class Replayed(NamedTuple):
    """The run that the rule would have made of it."""

    steps: Int[np.ndarray, " m"]
    """Grid points visited by each sample."""
    halted: Bool[np.ndarray, " m"]
    """Whether the rule fired; the others took all steps."""
    nfe: Int[np.ndarray, " m"]
    tokens: Int[np.ndarray, "m n"]
    """Final tokens, prompts included."""


def replay(recording: Recording, rule: Criterion) -> Replayed:
    """Each sample up to the step at which `rule` fires: the live run of the same rule, token for token.

    Raises:
        CdlmError: the rule freezes positions, or reads a signal that the recording does not hold.
    """
    check_replayable(recording, rule)
    record, m = recording.record, len(recording)
    memory = rule.start(new_rows(recording))
    end = last = torch.from_numpy(record.last_step(committed=not rule.waits))
    halted = torch.zeros(m, dtype=torch.bool)
    for k, state in enumerate(states(recording, rule.needs)):
        memory, decision = rule.look(memory, state)
        fresh = decision.halt & ~halted & (k <= end)
        last, halted = torch.where(fresh, k, last), halted | fresh
        if bool((halted | (end <= k)).all()):
            break
    step, fired = last.numpy(), halted.numpy()
    calls = record.nfe[step, np.arange(m)].astype(np.int64)
    tokens_then = record.tokens_at(step, recording.tokens)
    return Replayed(step + 1, fired, calls, np.where(fired[:, None], tokens_then, recording.tokens))


def new_rows(recording: Recording) -> NewRows:
    """The samples as they entered the run."""
    budget = torch.from_numpy(recording.record.budgets.astype(np.int64))
    return NewRows(torch.from_numpy(~recording.given), budget, torch.from_numpy(recording.valid))


def states(recording: Recording, needs: frozenset[str]) -> Iterator[StepState]:
    """All samples at one step after the other, with the signals in `needs`; those that have left hold NaN."""
    record, m = recording.record, len(recording)
    budget, row = torch.from_numpy(record.budgets.astype(np.int64)), torch.from_numpy(np.array(recording.index))
    signals = {name: torch.from_numpy(record.signals[name]) for name in needs & record.signals.keys()}
    if "switches" in needs:
        signals["switches"] = torch.from_numpy(record.switch_counts())
    t, nfe = torch.from_numpy(np.array(record.t)), torch.from_numpy(record.nfe).long()
    frames, tokens = _Open(recording), record.walk(recording.tokens) if "tokens" in needs else None
    for k in range(record.steps):
        now = {name: values[k] for name, values in signals.items()}
        if tokens is not None:
            now["tokens"] = torch.from_numpy(next(tokens))
        yield StepState(row, torch.full((m,), k), budget, t[k], nfe[k], frames.at(k), now)


def check_replayable(recording: Recording, rule: Criterion) -> None:
    """Raise unless the recording holds all that the rule needs, and is of the model that it was made for."""
    rule.check_made_for(lambda weights: weights == recording.weights, recording.settings)
    if rule.freezes:
        raise CdlmError(
            f"{rule!r} freezes positions, which changes the steps that follow; a recording cannot tell how:"
            " run it live, with cdlm sample --halt"
        )
    if rule.modules:
        raise CdlmError(
            f"{rule!r} reads activations of the network, which no recording keeps: run it live, with cdlm sample --halt"
        )
    held = {*recording.record.signals, *FROM_SWITCHES}
    missing = sorted(rule.needs - held)
    if missing:
        raise CdlmError(
            f"{rule!r} reads {missing[0]!r}, which the recording of {recording.model} does not keep"
            f" (it has {', '.join(sorted(held))}): run it live, with cdlm sample --halt"
        )


def check_recorded(rules: Iterable[Criterion]) -> None:
    """Raise if one of the rules reads a signal that no recording has. Those that have to run pass."""
    known = (*RECORDED, *FROM_SWITCHES)
    for rule in rules:
        missing = sorted(rule.needs - set(known))
        if missing and not rule.live:
            raise CdlmError(
                f"{rule!r} reads {missing[0]!r}, which no recording keeps (they have {', '.join(known)}):"
                " it can only be run, with cdlm sample --halt"
            )


class _Open:
    """Positions that are open at the start of each step, walked forward; in a run without commits all the generated."""

    def __init__(self, recording: Recording):
        self.commits, self.now = recording.record.commits, torch.from_numpy(~recording.given)
        self.seen = 0

    def at(self, step: int) -> Bool[torch.Tensor, "m n"]:
        if self.commits is None:
            return self.now
        until = int(np.searchsorted(self.commits.step, step))
        where = [torch.from_numpy(c[self.seen : until].astype(np.int64)) for c in self.commits[1:3]]
        self.now = self.now.clone()
        self.now[where[0], where[1]] = False
        self.seen = until
        return self.now
