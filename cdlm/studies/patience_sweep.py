"""How patient must patience be? The change over the number of quiet steps, and where it becomes small enough."""

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
    """How patient must patience be? What changes over the number of quiet steps.

    Args:
        steps: grid points of the full runs, one or more.
        patience: numbers of quiet steps to try.
        max_change: share of the gap to real text that AR-NLL may change by, in either direction: the boundary.
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
            f"Change: AR-NLL less that of the full run, on the same {self.n} samples, in nats per token and as a share"
            " of the gap between the full run and real text, with 95 % intervals (bootstrap). Boundary: the least"
            f" patience from which on every tried one changes it by at most {self.max_change:.1%} of the gap with"
            f" {self.confidence:.0%} confidence. Chosen and shown on the same samples."
        )
        return Finding(rows, [line for sweep in sweeps for line in self._lines(sweep)], note, self._panels(sweeps))

    def _sweep(self, model: str, steps: int) -> list[dict[str, Any]]:
        bench = self.full_run(model, steps)
        bench.check_gap(self.confidence)
        return [{"model": label(model), **self._try(bench, patience)} for patience in sorted(set(self.patience))]

    def _try(self, bench: Bench, patience: int) -> dict[str, Any]:
        drawn = bench.under(Patience(patience), self.n)
        share = bench.share_of_gap(drawn)
        return {
            "steps": bench.steps, "samples": len(drawn.tokens), "patience": patience,
            "calls": float(drawn.nfe.mean()), "saved": 1 - float(drawn.nfe.sum() / bench.full_calls.sum()),
            "agreement": bench.agreement(drawn), **ends("change", bench.change(drawn)),
            **ends("share", share), "share_most": share.most(self.confidence),
            "ar_nll": float(bench.score(drawn.tokens).bootstrap().value),
            "ar_nll_full": float(bench.full.bootstrap().value),
        }  # fmt: skip

    def boundary(self, sweep: Sequence[Mapping[str, Any]]) -> int | None:
        """The least patience from which on nothing changes too much; None if the most patient does."""
        kept = list(takewhile(lambda row: row["share_most"] <= self.max_change, reversed(sweep)))
        return kept[-1]["patience"] if kept else None

    def _lines(self, sweep: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        limit = self.boundary(sweep)
        most = sweep[-1]["patience"]
        return [
            {
                "model": row["model"], "steps": str(row["steps"]), "patience": str(row["patience"]),
                "calls": f"{row['calls']:.1f}", "saved": f"{row['saved']:.1%}", "agreement": f"{row['agreement']:.2%}",
                "AR-NLL": f"{row['ar_nll']:.3f}", "change": interval(row, "change", "+.4f"),
                "of the gap": interval(row, "share", "+.1%"), "boundary": _mark(row, sweep[-1], limit),
            }
            for row in sweep
            if row["patience"] in (*SHOWN, limit, most)
        ]  # fmt: skip

    def _panels(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[Panel]:
        def lines(x: str, y: str) -> list[Line]:
            return [curve(f"{rows[0]['model']}, {rows[0]['steps']} steps", rows, x, y) for rows in sweeps]

        limit, change = [(f"{self.max_change:.1%}", self.max_change)], "change of AR-NLL, share of the gap"
        return [
            Panel("Quality", "patience, steps", change, lines("patience", "share"), "log", "symlog",
                  self.max_change, limit),
            Panel("Cost", "patience, steps", "calls saved", lines("patience", "saved"), "log"),
            Panel("Exchange", "calls saved", change, lines("saved", "share"), "linear", "symlog",
                  self.max_change, limit),
        ]  # fmt: skip


def _mark(row: Mapping[str, Any], last: Mapping[str, Any], limit: int | None) -> str:
    if limit is None:
        return "not reached" if row is last else ""
    return "here" if row["patience"] == limit else ""


STUDY = PatienceSweep
