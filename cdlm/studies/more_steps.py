"""Are calls better spent on more and finer steps that end early, or on fewer steps that run to their end?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from cdlm.core.stats import Scores, bootstrap
from cdlm.evaluation.bench import Bench, Outcome
from cdlm.evaluation.plots.panels import Panel
from cdlm.halting import sweep
from cdlm.halting.replay import check_recorded
from cdlm.studies.study import Finding, JudgedContinuous, curve, ends, interval, label

VANILLA = "none"
NOTHING: Mapping[str, float | None] = dict.fromkeys(("beside_vanilla", "beside_vanilla_low", "beside_vanilla_high"))
NOTE = (
    "Calls: mean a sample. AR-NLL in nats per token. Beside vanilla: AR-NLL less that of the sampler that runs all its"
    " steps, at as many calls (linear between its budgets), on the same samples; below 0, more steps that end early are"
    " the better way to spend the calls. Intervals are 95 %, bootstrap over samples. Of each sweep the settings nearest"
    " to the vanilla budgets are shown, and the one that does best beside vanilla."
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Vanilla:
    """The sampler that runs all its steps, with ever more of them."""

    steps: Sequence[int]
    drawn: Sequence[Outcome]
    scores: Sequence[Scores]

    def at(self, calls: float, m: int) -> Callable[[Float[np.ndarray, "r m"]], Float[np.ndarray, " r"]] | None:
        """Its AR-NLL on the first m samples at so many mean calls, linear between its budgets; None outside them."""
        spent = [float(d.nfe.mean()) for d in self.drawn]
        cut = [scores.first(m) for scores in self.scores]
        for (low, before), (high, after) in pairwise(zip(spent, cut, strict=True)):
            if low <= calls <= high and low < high:
                share = (calls - low) / (high - low)
                return lambda times, a=before, b=after, w=share: (1 - w) * a(times) + w * b(times)
        return None


@dataclass(frozen=True, kw_only=True)
class MoreSteps(JudgedContinuous):
    """More steps that end early against fewer that run to their end, at the same mean calls.

    Args:
        steps: large numbers of grid points, for the runs that are halted.
        vanilla: numbers of grid points of the sampler without a rule.
        rule: halting rule whose settings are swept, such as Patience or "KL(..., warmup=0.3)".
    """

    steps: list[int]
    vanilla: list[int]
    rule: str

    def check(self) -> None:
        super().check()
        check_recorded(sweep(self.rule, max(self.steps)))

    def find(self) -> Finding:
        rows = [row for model in self.models for row in self._model(model)]
        table = [_line(row) for model in self.models for row in _shown([r for r in rows if r["model"] == label(model)])]
        panels = [panel for m in self.models for panel in _panels([r for r in rows if r["model"] == label(m)])]
        return Finding(rows, table, NOTE, panels)

    def _model(self, model: str) -> list[Row]:
        benches = [self.full_run(model, steps) for steps in sorted(self.steps)]
        plain = self._plain(benches)
        rows = [_row(benches[0], VANILLA, steps, d, plain) for steps, d in zip(plain.steps, plain.drawn, strict=True)]
        for bench in benches:
            rules = sweep(self.rule, bench.steps)
            rows += [_row(bench, repr(r), bench.steps, bench.under(r, self.n), plain) for r in rules]
        return [{"model": label(model), **row} for row in rows]

    def _plain(self, benches: Sequence[Bench]) -> Vanilla:
        """The vanilla sampler: its own budgets, and the full runs."""
        full = {b.steps: Outcome(b.full_run.tokens, b.full_run.nfe) for b in benches}
        first = benches[0]
        budgets = sorted({*self.vanilla, *full})
        drawn = [full.get(b) or first.run(first.session.with_steps(b), self.n) for b in budgets]
        return Vanilla(budgets, drawn, [first.score(d.tokens) for d in drawn])


def _row(bench: Bench, rule: str, steps: int, drawn: Outcome, plain: Vanilla) -> Row:
    scores, calls, m = bench.score(drawn.tokens), float(drawn.nfe.mean()), len(drawn.tokens)
    rival = None if rule == VANILLA else plain.at(calls, m)
    if rival is None:
        beside = NOTHING
    else:
        beside = ends("beside_vanilla", bootstrap(lambda times: scores(times) - rival(times), m))
    return {
        "steps": steps, "rule": rule, "samples": m, "calls": calls,
        **ends("ar_nll", scores.bootstrap()), **beside,
    }  # fmt: skip


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The vanilla budgets, and of each sweep the setting nearest to each of them, as a ratio, and the best one."""
    budgets = [row for row in rows if row["rule"] == VANILLA]
    shown = list(budgets)
    for steps in dict.fromkeys(row["steps"] for row in rows if row["rule"] != VANILLA):
        swept = [row for row in rows if row["rule"] != VANILLA and row["steps"] == steps]
        near = [min(swept, key=lambda row, b=b: abs(np.log(row["calls"] / b["calls"]))) for b in budgets]
        beside = [row for row in swept if row["beside_vanilla"] is not None]
        best = [min(beside, key=lambda row: row["beside_vanilla"])] if beside else []
        shown += [row for row in swept if row in near + best]
    return shown


def _line(row: Row) -> dict[str, str]:
    return {
        "model": row["model"],
        "steps": str(row["steps"]),
        "rule": row["rule"],
        "calls": f"{row['calls']:.1f}",
        "AR-NLL": interval(row, "ar_nll", ".3f"),
        "beside vanilla": "" if row["beside_vanilla"] is None else interval(row, "beside_vanilla", "+.3f"),
    }


def _panels(rows: Sequence[Row]) -> list[Panel]:
    vanilla = [row for row in rows if row["rule"] == VANILLA]
    swept = [row for row in rows if row["rule"] != VANILLA]
    quality = [curve("vanilla", vanilla, "calls", "ar_nll", dashed=True)]
    beside = []
    for steps in dict.fromkeys(row["steps"] for row in swept):
        own = sorted((row for row in swept if row["steps"] == steps), key=lambda row: row["calls"])
        met = [row for row in own if row["beside_vanilla"] is not None]
        quality.append(curve(f"{steps} steps, halted", own, "calls", "ar_nll"))
        beside += [curve(f"{steps} steps, halted", met, "calls", "beside_vanilla")] if met else []
    model, calls = vanilla[0]["model"], "mean calls a sample"
    return [
        Panel(model, calls, "AR-NLL, nats per token", quality, "log", "log"),
        Panel("Beside vanilla", calls, "difference of AR-NLL", beside, "log", "symlog", 0.02, [("vanilla", 0.0)]),
    ]


STUDY = MoreSteps
