"""Quality over calls as a picture: every rule's settings, and the plain sampler with fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdlm.evaluation.plots.figure import Style
from cdlm.evaluation.plots.panels import Line, Panel, draw

CHOSEN = "ring: setting chosen on other samples"
LEAST = 0.85
"""Share of the lowest rival or level at which the axis ends at the latest."""
MOST = 1.35
"""Upper end of the axis over the full run's value: the region in which one would want to be."""


@dataclass(frozen=True)
class Curve:
    """The settings of one rule; lists in one order.

    Args:
        rival: draw it as what the others have to beat: black, dashed, with its interval as a band.
        chosen: place of the setting to mark, if any.
    """

    label: str
    calls: Sequence[float]
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    rival: bool = False
    chosen: int | None = None

    @property
    def line(self) -> Line:
        """How it is drawn."""
        band = (np.array(self.low), np.array(self.high)) if self.rival else None
        return Line(self.label, np.array(self.calls), np.array(self.value), band, self.rival, True, self.chosen)


@dataclass(frozen=True)
class CurvePanel:
    """One model at one number of steps; `levels` are lines across, by name (real text, the full run)."""

    title: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[str, float]]


def plot_pareto(
    panels: Sequence[CurvePanel], path: Path, label: str = "AR-NLL, nats per token", whole: bool = False, *,
    equal: bool = False, style: Style = "screen",
) -> Path:  # fmt: skip
    """A panel for each model, into a .png, .pdf or .svg file; lower and further left is better.

    Calls are on a logarithmic axis, and a ring marks what was chosen.

    Args:
        label: of the upright axis.
        whole: show every point, with both axes logarithmic, in place of the region in which one would want to be.
        equal: all panels have the same axes: their text and their judge are the same.
        style: "screen" or "paper".

    Raises:
        CdlmError: there are no panels, or the file or the style is of another kind.
    """
    drawn = [_panel(panel, label, whole) for panel in panels]
    return draw(drawn, path, columns=2, width=8.0, shared=True, equal=equal, ring=CHOSEN, style=style)


def _panel(panel: CurvePanel, label: str, whole: bool) -> Panel:
    ends = None if whole else limits(panel)
    points = [(x, y) for c in panel.curves for x, y in zip(c.calls, c.value, strict=True)]
    shown = [x for x, y in points if ends is None or ends[0] <= y <= ends[1]]
    return Panel(
        panel.title,
        "mean calls a sample",
        label,
        [curve.line for curve in panel.curves],
        x_scale="log",
        y_scale="log" if whole else "linear",
        levels=panel.levels,
        x_limits=(0.85 * min(shown), 1.1 * max(shown)),
        y_limits=ends,
    )


def limits(panel: CurvePanel) -> tuple[float, float] | None:
    """From the lowest value to a little over the best rival or the highest level, so that settings that fail badly do
    not flatten it; and no lower than `LEAST` of the rivals and levels, for text that collapses is too easy. None if
    nothing was measured, as of empty texts, or all of it is zero."""
    values = [v for c in panel.curves for v in c.value if np.isfinite(v)]
    if not values:
        return None
    levels = [value for _, value in panel.levels]
    rivals = [v for c in panel.curves if c.rival for v in c.value if np.isfinite(v)] or values
    lows = [v for c in panel.curves if c.rival for v in c.low if np.isfinite(v)]
    low = min([*levels, *lows, max(min(values), LEAST * min([*rivals, *levels]))])
    high = MOST * max([min(rivals), *levels])
    return (low - 0.05 * (high - low), high) if high > low else None
