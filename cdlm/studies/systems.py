"""Which rules work on which system? Calls saved by each rule on each model at a bounded change of quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from cdlm.core.stats import Scores
from cdlm.evaluation.bench import Bench
from cdlm.evaluation.plots.panels import Panel
from cdlm.halting import Criterion, sweep
from cdlm.halting.calibration import Goal
from cdlm.halting.replay import check_recorded
from cdlm.sampling.session import Session
from cdlm.studies.study import Finding, Judged, curve, ends, label


@dataclass(frozen=True, kw_only=True)
class Systems(Judged):
    """Which rules work on which system? Each is sampled as its paper does.

    Args:
        steps: grid points of the full runs of continuous models, shared by the blocks of a row; masked models take one
            step for each position.
        rules: names to sweep, from strict to loose, until the first setting that loses too much.
        max_change: share of the gap to real text that AR-NLL may change by, in either direction.
        confidence: how surely.
    """

    steps: int
    rules: list[str]
    max_change: float
    confidence: float

    def check(self) -> None:
        super().check()
        check_recorded(rule for name in self.rules for rule in sweep(name, self.steps))

    def find(self) -> Finding:
        goal = Goal(self.max_change, self.confidence)
        goal.check(self.n)
        rows = [row for model in self.models for row in self._of(model, goal)]
        note = (
            "Calls saved by the loosest setting of each rule that changes AR-NLL by at most"
            f" {self.max_change:.1%} of the gap to real text with {self.confidence:.0%} confidence, with 95 % interval"
            f" (bootstrap over {self.n} samples). A dash: no tried setting does. A cross: the rule"
            " reads what the model has not. Rules that freeze tokens, and rows of several blocks, are run; the others"
            " are replayed."
        )
        return Finding(rows, list(self._lines(rows)), note, self._panels(rows))

    def sampled(self, model: str) -> Session:
        """A model as its paper samples it, in `steps` where these are a setting of their own."""
        session = self.session(model).with_seed(self.seed)
        if "steps" not in session.settings:
            return session
        return session.with_steps(max(1, self.steps // session.blocks_of(session.requests())))

    def _of(self, model: str, goal: Goal) -> Iterator[dict[str, Any]]:
        """Every setting that was tried on a model, one row each."""
        bench = self.bench(model, self.sampled(model))
        bench.check_gap(goal.confidence)
        for name in self.rules:
            for rule in sweep(name, bench.steps):
                row = {"model": label(model), **_row(bench, name, rule, goal)}
                yield row
                if not row["within"]:
                    break

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
        models = list(dict.fromkeys(row["model"] for row in rows))
        for name in self.rules:
            cells = {m: _cell([r for r in rows if r["model"] == m and r["rule"] == name]) for m in models}
            yield {"rule": name, **cells}

    def _panels(self, rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
        panels = []
        for model, of_model in groupby([row for row in rows if row["fits"]], key=lambda row: row["model"]):
            lines = [
                curve(name, list(tried), "saved", "share") for name, tried in groupby(of_model, key=lambda r: r["rule"])
            ]
            limit = [(f"{self.max_change:.1%}", self.max_change)]
            change = "change of AR-NLL, share of the gap"
            panels.append(Panel(model, "calls saved", change, lines, "linear", "symlog", self.max_change, limit))
        return panels


def _row(bench: Bench, name: str, rule: Criterion, goal: Goal) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(
        ("calls", "saved", "saved_low", "saved_high", "ar_nll_full", "agreement", "share", "share_low", "share_high",
         "share_most")
    )  # fmt: skip
    found = {"rule": name, "setting": repr(rule), "fits": not bench.session.refuses(rule), **found}
    if not found["fits"]:
        return {**found, "within": False}
    drawn = bench.under(rule, len(bench.full_run))
    before, share = bench.full_calls[: len(drawn.nfe)], bench.share_of_gap(drawn)
    left = Scores(drawn.nfe.astype(np.float64), before).bootstrap()
    low, high = left.interval95
    most = share.most(goal.confidence)
    return found | {
        "calls": float(drawn.nfe.mean()), "saved": 1 - left.value, "saved_low": 1 - high, "saved_high": 1 - low,
        "ar_nll_full": float(bench.full.bootstrap().value), "agreement": bench.agreement(drawn),
        **ends("share", share), "share_most": most, "within": most <= goal.limit,
    }  # fmt: skip


def _cell(tried: Sequence[Mapping[str, Any]]) -> str:
    """What the loosest setting within the goal saves."""
    if not tried or not tried[0]["fits"]:
        return "x"
    good = [row for row in tried if row["within"]]
    if not good or not good[-1]["saved"] > 0:
        return "-"
    best = good[-1]
    return f"{best['saved']:.0%} [{best['saved_low']:.0%}, {best['saved_high']:.0%}]"


STUDY = Systems
