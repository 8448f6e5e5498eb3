"""The pictures of studies: panels of lines, some with a band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxtyping import Num
from numpy import ndarray

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing
from cdlm.evaluation.plots.pareto import COLORS, GREY, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        band: lower and upper ends around it.
        dashed: draw it black and dashed, as what the others are compared with.
        dots: mark its points.
    """

    label: str
    x: Num[ndarray, " k"]
    y: Num[ndarray, " k"]
    band: tuple[Num[ndarray, " k"], Num[ndarray, " k"]] | None = None
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        linear_below: where the "symlog" axis turns from logarithmic to linear, so that it can show 0.
        levels: lines across, by name.
        ticks: names of the places 0, 1, ... of the upright axis, from the top; a line is then dots at these places,
            and its band the intervals of x.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log", "symlog"] = "linear"
    linear_below: float = 1.0
    levels: Sequence[tuple[str, float]] = ()
    ticks: Sequence[str] = ()


def draw(panels: Sequence[Panel], path: Path) -> Path:
    """A PNG with the panels side by side; each has its own legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise CdlmError("there is nothing to draw: give at least one panel")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = max(4.0, *(0.27 * len(panel.ticks) + 1 for panel in panels))
    figure = Figure(figsize=(5.2 * columns, height * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, axis in zip(panels, axes, strict=False):
        _draw(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw(axis: Axes, panel: Panel) -> None:
    styles = zip(cycle(COLORS), cycle(MARKERS), strict=True)
    for line in panel.lines:
        color, marker = ("black", ".") if line.dashed else next(styles)
        (_draw_dots if panel.ticks else _draw_curve)(axis, line, color, marker)
    for name, value in panel.levels:
        axis.axhline(value, color=GREY, linewidth=0.9, linestyle=":")
        axis.annotate(name, (0.995, value), xycoords=("axes fraction", "data"), fontsize=8, color=GREY, ha="right",
                      va="bottom")  # fmt: skip
    axis.set_xscale(panel.x_scale)
    axis.set_yscale(panel.y_scale, **({"linthresh": panel.linear_below} if panel.y_scale == "symlog" else {}))
    if panel.ticks:
        axis.set_yticks(range(len(panel.ticks)), panel.ticks, fontsize=8)
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=5)
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_xlabel(panel.x, fontsize=10)
    axis.set_ylabel(panel.y, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#E6E6E6", linewidth=0.6)
    if any(line.label for line in panel.lines):
        axis.legend(frameon=False, fontsize=8)


def _draw_curve(axis: Axes, line: Line, color: str, marker: str) -> None:
    axis.plot(
        line.x, line.y, color=color, label=line.label, linewidth=1.6, linestyle="--" if line.dashed else "-",
        marker=marker if line.dots else "", markersize=4,
    )  # fmt: skip
    if line.band is not None:
        axis.fill_between(line.x, *line.band, color=color, alpha=0.15, linewidth=0)


def _draw_dots(axis: Axes, line: Line, color: str, marker: str) -> None:
    axis.plot(line.x, line.y, color=color, label=line.label, linestyle="", marker=marker, markersize=5)
    if line.band is not None:
        axis.hlines(line.y, *line.band, color=color, linewidth=1.2)
