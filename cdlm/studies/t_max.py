"""What does the largest noise level decide? Quality, diversity and settling of models trained with different ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cdlm.continuous.schedules import Schedule
from cdlm.core.stats import Scores
from cdlm.evaluation.bench import Bench
from cdlm.evaluation.metrics.diversity import sample_entropy, unigram_entropy
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.halting import Patience
from cdlm.studies.measures import settled_by, zero_switch
from cdlm.studies.study import Finding, JudgedContinuous, curve, ends, interval, label

PAPER_NORM = 16
"""Norm of the embeddings of CDCD and DDLM, in which their noise levels are given."""


def prior_mismatch(level: float) -> float:
    """Nats per token by which the start N(0, t_max^2) falls short of the noised embeddings N(e, t_max^2).

    KL(N(e, t^2) || N(0, t^2)) = |e|^2 / (2 t^2), with `level` = t_max / |e|. An upper bound of what the sampler gets
    wrong, since the mixture over all tokens is nearer to N(0, t_max^2) than each of its parts.
    """
    return 1 / (2 * level**2)


def top_level(schedule: Schedule, rho: float) -> float:
    """t_max in units of the embedding norm."""
    return schedule.t_max / rho


@dataclass(frozen=True, kw_only=True)
class TMax(JudgedContinuous):
    """What does the largest noise level of training decide? Give models that were trained with different ones.

    Args:
        steps: grid points.
        patience: quiet steps of the halting rule whose calls and change are shown.
    """

    steps: int
    patience: int

    def find(self) -> Finding:
        found = sorted((self._measure(model) for model in self.models), key=lambda row: row[0]["t_max"])
        rows = [row for row, _ in found]
        note = (
            f"t_max: in units of the embedding norm, and in brackets at norm {PAPER_NORM} as the papers give it."
            f" Mismatch: nats per token, an upper bound. H: entropy of tokens inside a sample, and of all {self.n}"
            f" samples. Zero-switch: mean share of the {self.steps} steps after which no token changes. Saved, change:"
            f" calls and nats under Patience({self.patience}), beside the full run. Intervals are 95 %,"
            " bootstrap over samples."
        )
        return Finding(rows, [_line(row) for row in rows], note, self._panels(found))

    def _measure(self, model: str) -> tuple[dict[str, Any], np.ndarray]:
        denoiser, bench = self.denoiser(model), self.full_run(model, self.steps)
        level = top_level(denoiser.schedule, denoiser.rho)
        drawn = bench.under(Patience(self.patience), self.n)
        last = zero_switch(bench.steps_taken.record)
        return {
            "model": label(model), "steps": self.steps, "samples": self.n, "t_max": level,
            "mismatch": prior_mismatch(level), **_text(bench),
            **ends("zero_switch", Scores(last / self.steps, np.ones(len(last))).bootstrap()),
            "patience": self.patience, "saved": 1 - float(drawn.nfe.sum() / bench.full_calls.sum()),
            **ends("change", bench.change(drawn)), "agreement": bench.agreement(drawn),
        }, last  # fmt: skip

    def _panels(self, found: list[tuple[dict[str, Any], np.ndarray]]) -> list[Panel]:
        rows = [row for row, _ in found]
        every = np.geomspace(0.8 * rows[0]["t_max"], 1.25 * rows[-1]["t_max"], 50)
        share = np.arange(1, self.steps + 1) / self.steps
        name = "t_max / embedding norm"
        real = [("real text", float(np.mean([row["ar_nll_real"] for row in rows])))]
        return [
            Panel("Prior mismatch", name, "nats per token, at most",
                  [Line("1 / (2 t_max^2)", every, np.array([prior_mismatch(x) for x in every]), dashed=True),
                   curve("models", rows, "t_max", "mismatch")], "log", "log"),
            Panel("Quality", name, "AR-NLL, nats per token", [curve("full run", rows, "t_max", "ar_nll")], "log",
                  levels=real),
            Panel("When tokens settle", "share of the steps", "samples without a later switch",
                  [Line(row["model"], share, settled_by(last, self.steps)) for row, last in found]),
        ]  # fmt: skip


def _text(bench: Bench) -> dict[str, Any]:
    rows = bench.full_run.tokens.tolist()
    return {
        **ends("ar_nll", bench.full.bootstrap()),
        "ar_nll_real": bench.reference.scores.bootstrap().value,
        "entropy_sample": sample_entropy(rows),
        "entropy_corpus": unigram_entropy(rows),
        "entropy_corpus_real": unigram_entropy(bench.reference.corpus.tokens),
    }


def _line(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        "t_max": f"{row['t_max']:g} ({PAPER_NORM * row['t_max']:g})",
        "mismatch": f"{row['mismatch']:.3g}",
        "AR-NLL": interval(row, "ar_nll", ".3f"),
        "real text": f"{row['ar_nll_real']:.3f}",
        "H sample": f"{row['entropy_sample']:.2f}",
        "H corpus": f"{row['entropy_corpus']:.2f}",
        "zero-switch": interval(row, "zero_switch", ".1%"),
        "saved": f"{row['saved']:.1%}",
        "change": interval(row, "change", "+.3f"),
    }


STUDY = TMax
