"""When do tokens stop changing? Over models (sizes, masking), prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cdlm.core.stats import Scores
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.recording.file import Recording
from cdlm.sampling.recordings import recording_of
from cdlm.studies.measures import position_zero_switch, settled_by, zero_switch
from cdlm.studies.study import Continuous, Finding, column, ends, interval, label

NOTE = (
    "Zero-switch: the last step, from 1, at which any token of a sample changes; as a share of the steps, mean over"
    " samples with 95 % interval (bootstrap), and the middle 80 % of the samples. Noise level: at the median step, in"
    " units of the embedding norm. Last 5 %: samples that still change a token there. Position: the same step for a"
    " single position, mean."
)


class Cell(NamedTuple):
    """One run of the study."""

    model: str
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class ZeroSwitch(Continuous):
    """When do tokens stop changing? Every model with the first prompt and seed; the first model with all of them.

    Args:
        steps: grid points.
        prompts: prefixes or templates; an empty one is no prompt.
        seeds: of the samples.
        grid: Warped(), LogT() or UniformT().
    """

    steps: int
    prompts: list[str]
    seeds: list[int]
    grid: str

    @property
    def groups(self) -> dict[str, list[Cell]]:
        """What is varied, one thing at a time."""
        model, prompt, seed = self.models[0], self.prompts[0], self.seeds[0]
        return {
            "models": [Cell(m, prompt, seed) for m in self.models],
            "prompts": [Cell(model, p, seed) for p in self.prompts],
            "seeds": [Cell(model, prompt, s) for s in self.seeds],
        }

    def find(self) -> Finding:
        cells = list(dict.fromkeys(cell for group in self.groups.values() for cell in group))
        rows = {cell: self._measure(cell) for cell in cells}
        return Finding(
            [row for cell in cells for row in rows[cell]],
            [self._line(cell, rows[cell]) for cell in cells],
            NOTE,
            [
                self._panel(name, group, rows)
                for name, group in self.groups.items()
                if len(group) > 1 or name == "models"
            ],
        )

    def draw(self, cell: Cell) -> Recording:
        """The samples of a cell, with their steps."""
        session = self.flow(cell.model, self.steps, cell.seed, self.grid)
        requests = session.requests([cell.prompt] if cell.prompt else None, self.n)
        return recording_of(session.recorded().run(requests), session)

    def _measure(self, cell: Cell) -> list[dict[str, object]]:
        run, rho = self.draw(cell), self.denoiser(cell.model).rho
        last = zero_switch(run.record)
        each = position_zero_switch(run.record, run.tokens.shape[1])
        return [
            {
                "model": label(cell.model), "prompt": cell.prompt, "seed": cell.seed, "index": int(index),
                "steps": self.steps, "zero_switch": int(step), "t": float(run.record.t[step - 1, column]) / rho,
                "position_mean": float(where[~given].mean()),
            }
            for column, (index, step, where, given) in enumerate(zip(run.index, last, each, run.given, strict=True))
        ]  # fmt: skip

    def _line(self, cell: Cell, rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
        share = column(rows, "zero_switch") / self.steps
        mean = ends("share", Scores(share, np.ones(len(share))).bootstrap())
        low, high = np.quantile(share, [0.1, 0.9])
        return {
            "model": label(cell.model),
            "prompt": cell.prompt or "-",
            "seed": str(cell.seed),
            "samples": str(len(rows)),
            "zero-switch": interval(mean, "share", ".1%"),
            "middle 80 %": f"{low:.0%} to {high:.0%}",
            "noise level": f"{np.median(column(rows, 't')):.3f}",
            "last 5 %": f"{(share > 0.95).mean():.0%}",
            "position": f"{column(rows, 'position_mean').mean() / self.steps:.1%}",
        }

    def _panel(self, name: str, group: list[Cell], rows: Mapping[Cell, Sequence[Mapping[str, object]]]) -> Panel:
        share = np.arange(1, self.steps + 1) / self.steps
        lines = [
            Line(_title(name, cell), share, settled_by(column(rows[cell], "zero_switch").astype(int), self.steps))
            for cell in group
        ]
        return Panel(f"Over {name}", "share of the steps", "samples without a later switch", lines)


def _title(name: str, cell: Cell) -> str:
    return {"models": label(cell.model), "prompts": cell.prompt or "no prompt", "seeds": f"seed {cell.seed}"}[name]


STUDY = ZeroSwitch
