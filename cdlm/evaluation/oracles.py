"""What could be saved at most, by the record of the full run: rows of a comparison that no rule reaches but by luck."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cdlm.evaluation.bench import Bench, Outcome
from cdlm.halting.calibration import Goal
from cdlm.halting.oracles import hindsight, last_change

LAST_CHANGE, HINDSIGHT = "oracle, last change", "oracle, hindsight"
ORACLES = (LAST_CHANGE, HINDSIGHT)
FINEST = 1024
"""Units of a loss where the samples have no small common number of tokens: hindsight is then exact to one a sample."""


@dataclass(frozen=True)
class Oracle:
    """Samples that ended where an oracle said."""

    name: str
    setting: str
    """What it keeps to; empty if it loses nothing."""
    outcome: Outcome


def oracles(bench: Bench, goal: Goal, measure: str) -> list[Oracle]:
    """What could be saved without any loss, and within the goal; nothing of a run without a record.

    `oracle, last change`: each sample ends at the first step after which none of its tokens changes.
    `oracle, hindsight`: the fewest calls at which the mean share of tokens that differ (of the measure `texts`: the
    share of samples) is within the goal. It knows the samples that it is judged on, and meets the goal in the mean,
    without a bound; there is none where the goal does not limit the tokens.
    """
    if bench.recording is None:
        return []
    losses = losses_by_step(bench)
    found = [Oracle(LAST_CHANGE, "", _ended(bench, last_change(losses)))]
    limit = goal.limit if measure in ("agreement", "texts") else 1 - goal.agreement
    if limit < 1:
        whole = measure == "texts"
        lost, grain = ((losses > 0).astype(np.float64), 1) if whole else (losses, _grain(bench))
        ends = hindsight(lost, bench.recording.record.nfe.astype(np.int64), limit, grain)
        kept = f"{1 - limit:.4g} of the {'samples' if whole else 'tokens'} kept"
        found.append(Oracle(HINDSIGHT, kept, _ended(bench, ends)))
    return found


def losses_by_step(bench: Bench) -> Float[np.ndarray, "steps m"]:
    """Share of each sample's tokens that are not the full run's if it ends at a step; 0 from its last step on."""
    recording, calls = bench.steps_taken, bench.full_run.nfe
    found = [bench.differ(Outcome(tokens, calls)) for tokens in recording.record.walk(recording.tokens)]
    over = np.arange(len(found))[:, None] >= recording.record.last_step(committed=True)
    return np.where(over, 0.0, np.stack(found))


def _ended(bench: Bench, step: Int[np.ndarray, " m"]) -> Outcome:
    """The samples, each halted at its step."""
    recording = bench.steps_taken
    record, m = recording.record, len(recording)
    early = step < record.last_step(committed=True)
    tokens = np.where(early[:, None], record.tokens_at(step, recording.tokens), recording.tokens)
    return Outcome(tokens, record.nfe[step, np.arange(m)].astype(np.int64))


def _grain(bench: Bench) -> int:
    """A number of units of which each sample's token is a whole number, if a small one is known."""
    if bench.scorer.end_ids:  # samples count up to an end that is another at each step
        return FINEST
    return min(FINEST, math.lcm(*(~bench.full_run.given).sum(1).clip(min=1).tolist()))
