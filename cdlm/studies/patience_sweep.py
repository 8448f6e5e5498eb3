"""How patient must patience be? Quality lost over the number of quiet steps, and where the loss becomes acceptable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Any

from cdlm.evaluation.bench import Bench
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.halting import Patience
from cdlm.halting.calibration import Goal
from cdlm.studies.study import Finding, JudgedContinuous, curve, ends, interval, label

SHOWN = (1, 2, 5, 10, 15, 20)
"""Lines of the table, beside the boundary and the most patient."""


@dataclass(frozen=True, kw_only=True)
class PatienceSweep(JudgedContinuous):
    """How patient must patience be? Quality lost over the number of quiet steps.

    Args:
        steps: grid points of the full runs, one or more.
        patience: numbers of quiet steps to try.
        max_change: share of AR-NLL that may change, in either direction: the boundary.
        confidence: how surely.
    """

    steps: list[int]
    patience: list[int]
    max_change: float
    confidence: float

    def find(self) -> Finding:
        goal = Goal(self.max_change, self.confidence)
        goal.check(self.n)
        sweeps = [self._sweep(model, steps) for model, steps in product(self.models, self.steps)]
        rows = [row for sweep in sweeps for row in sweep]
        note = (
            f"Loss: AR-NLL over that of the full run, less 1, on the same {self.n} samples, with 95 % interval"
            " (bootstrap). Boundary: the least patience from which on every tried one changes it by"
            f" at most {self.max_change:.1%} with {self.confidence:.0%} confidence."
        )
        return Finding(rows, [line for sweep in sweeps for line in self._lines(sweep)], note, self._panels(sweeps))

    def _sweep(self, model: str, steps: int) -> list[dict[str, Any]]:
        bench = self.full_run(model, steps)
        return [{"model": label(model), **self._try(bench, patience)} for patience in sorted(set(self.patience))]

    def _try(self, bench: Bench, patience: int) -> dict[str, Any]:
        drawn = bench.under(Patience(patience), self.n)
        loss = bench.relative(drawn)
        return {
            "steps": bench.steps, "samples": len(drawn.tokens), "patience": patience,
            "calls": float(drawn.nfe.mean()), "saved": 1 - float(drawn.nfe.sum() / bench.full_calls.sum()),
            "agreement": bench.agreement(drawn), **ends("loss", loss),
            "loss_upper": loss.most(self.confidence), "ar_nll": float(bench.score(drawn.tokens).bootstrap().value),
            "ar_nll_full": float(bench.full.bootstrap().value),
        }  # fmt: skip

    def boundary(self, sweep: Sequence[Mapping[str, Any]]) -> int | None:
        """The least patience from which on nothing changes too much; None if the most patient does."""
        kept = list(takewhile(lambda row: row["loss_upper"] <= self.max_change, reversed(sweep)))
        return kept[-1]["patience"] if kept else None

    def _lines(self, sweep: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        limit = self.boundary(sweep)
        most = sweep[-1]["patience"]
        return [
            {
                "model": row["model"], "steps": str(row["steps"]), "patience": str(row["patience"]),
                "calls": f"{row['calls']:.1f}", "saved": f"{row['saved']:.1%}", "agreement": f"{row['agreement']:.2%}",
                "AR-NLL": f"{row['ar_nll']:.3f}", "loss": interval(row, "loss", "+.2%"),
                "boundary": _mark(row, sweep[-1], limit),
            }
            for row in sweep
            if row["patience"] in (*SHOWN, limit, most)
        ]  # fmt: skip

    def _panels(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Panel]:
        def lines(x: str, y: str) -> list[Line]:
            return [curve(f"{rows[0]['model']}, {rows[0]['steps']} steps", rows, x, y) for rows in sweeps]

        limit = [(f"{self.max_change:.1%}", self.max_change)]
        return [
            Panel("Quality", "patience, steps", "relative loss of AR-NLL", lines("patience", "loss"), "log", "symlog",
                  self.max_change, limit),
            Panel("Cost", "patience, steps", "calls saved", lines("patience", "saved"), "log"),
            Panel("Exchange", "calls saved", "relative loss of AR-NLL", lines("saved", "loss"), "linear", "symlog",
                  self.max_change, limit),
        ]  # fmt: skip


def _mark(row: Mapping[str, Any], last: Mapping[str, Any], limit: int | None) -> str:
    if limit is None:
        return "not reached" if row is last else ""
    return "here" if row["patience"] == limit else ""


STUDY = PatienceSweep
