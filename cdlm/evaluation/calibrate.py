"""Calibration of a rule on a model's own full runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cdlm.core.stats import Bootstrap
from cdlm.evaluation.bench import Bench
from cdlm.halting import Criterion
from cdlm.halting import calibration as halting
from cdlm.halting.calibration import Calibration, Goal


def calibrate(bench: Bench, candidates: Sequence[Criterion], goal: Goal, measure: str) -> Calibration:
    """The loosest of `candidates`, which run from strict to loose, that stays within the goal.

    Raises:
        CdlmError: too few samples for the goal, or no candidate that halts reaches it.
    """
    n = len(bench.full_run)

    def trial(rule: Criterion) -> tuple[float, float, Bootstrap]:
        drawn = bench.run_rule(rule, live=n)
        return float(drawn.nfe.mean()), float(1 - drawn.nfe.sum() / bench.full_calls.sum()), bench.loss(drawn, measure)

    trials = halting.search(candidates, trial, goal, n)
    return Calibration(
        settings=bench.settings,
        rule=halting.loosest(trials).rule,
        measure=measure,
        goal=goal,
        samples=n,
        seed=bench.sampler.seed,
        judge=bench.scorer.judge.describe() if measure == "ar-nll" else None,
        trials=trials,
    )


def keep(bench: Bench, found: Calibration) -> Path:
    """Write the choice beside the weights; returns the file."""
    halting.write_calibration(bench.folder, bench.weights, found)
    return bench.folder / halting.FILE
