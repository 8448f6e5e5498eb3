"""What can a distance see? Real text of each run, made worse step by step, under several kinds of features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from cdlm.api import real_text, small_judge
from cdlm.core.checks import check_whole
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.ladder import ladder
from cdlm.evaluation.metrics.features import FEATURES
from cdlm.evaluation.metrics.reference import Spread
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.runs import config as names
from cdlm.runs.train import RunText
from cdlm.studies.study import Finding, Study, column, label

NOTE = (
    "Real text with 5, 10, 20 and 40 % of its tokens replaced at random, with its tokens shuffled, and tokens drawn"
    " from its frequencies (salad), each compared with other real text: mean and deviation over random splits. A"
    " distance that sees falls (MAUVE) or grows (Fréchet) from left to right. The text is that which samples of the run"
    " are compared with."
)
DISTANCES = {"mauve": "MAUVE", "frechet": "Fréchet"}


@dataclass(frozen=True, kw_only=True)
class Ladder(Study):
    """What MAUVE and the Fréchet distance see of text that is made worse step by step. Nothing is generated.

    Args:
        features: kinds of them: NGrams(), MeanState(), LastState(), "Encoder('FOLDER')".
        splits: random splits of the real text.
        judge_steps: training steps of the small judge that gives the states; by default those of `SmallJudge`.
    """

    features: list[str]
    splits: int
    judge_steps: int | None = None

    def check(self) -> None:
        super().check()
        check_whole("a ladder", splits=self.splits, n=self.n)
        for kind in self.features:
            FEATURES.parse(kind)
        for model in self.models:
            names.read_run(model)

    def find(self) -> Finding:
        rows = [row for model in self.models for row in self._of(model)]
        groups = [(key, list(of)) for key, of in groupby(rows, lambda r: (r["model"], r["n"], r["features"]))]
        table = [_line(key, of, distance) for key, of in groups for distance in DISTANCES]
        return Finding(rows, table, NOTE, _panels(rows))

    def _of(self, model: str) -> Iterator[dict[str, Any]]:
        text = RunText.of_run(model)
        real = real_text(text)
        judge = small_judge(text, self.judge_steps).open(self.device, not self.quiet)
        count = min(self.n, real.most)
        for kind in self.features:
            found = ladder(real, count, FEATURES.parse(kind), Readers(judge), self.splits)
            for place, (rung, spreads) in enumerate(found.items()):
                yield {
                    "model": label(model), "n": count, "features": kind, "place": place, "rung": rung,
                    **_columns("mauve", spreads), **_columns("frechet", spreads),
                }  # fmt: skip


def _columns(name: str, spreads: Mapping[str, Spread]) -> dict[str, float]:
    return spreads[name].columns(name)


def _line(key: tuple[str, int, str], rows: Sequence[Mapping[str, Any]], distance: str) -> dict[str, str]:
    model, count, kind = key
    cells = {row["rung"]: f"{row[distance]:.3f} ± {row[f'{distance}_sd']:.3f}" for row in rows}
    return {"model": model, "n": str(count), "features": kind, "distance": DISTANCES[distance], **cells}


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    panels = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for distance, name in DISTANCES.items():
            lines = [
                _curve(kind, [row for row in own if row["features"] == kind], distance)
                for kind in dict.fromkeys(row["features"] for row in own)
            ]
            panels.append(Panel(model, "real, 5, 10, 20, 40 % wrong, shuffled, salad", name, lines))
    return panels


def _curve(kind: str, rows: Sequence[Mapping[str, Any]], distance: str) -> Line:
    value, sd = column(rows, distance), column(rows, f"{distance}_sd")
    return Line(kind, column(rows, "place"), value, (value - sd, value + sd), dots=True)


STUDY = Ladder
