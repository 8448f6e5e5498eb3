"""Panels of lines, some with a band: the pictures of comparisons and studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Num
from numpy import ndarray
from numpy.typing import ArrayLike

from cdlm.core.errors import CdlmError
from cdlm.evaluation.plots.figure import (
    COLORS,
    GREY,
    LIGHT_GREY,
    MARKERS,
    Style,
    check_plot_path,
    label_axes,
    look_of,
    new_figure,
    plain_log_ticks,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        band: lower and upper ends around it.
        dashed: draw it black and dashed, as what the others are compared with.
        dots: mark its points.
        ring: index of the point to draw a ring around.
    """

    label: str
    x: Num[ndarray, " k"]
    y: Num[ndarray, " k"]
    band: tuple[Num[ndarray, " k"], Num[ndarray, " k"]] | None = None
    dashed: bool = False
    dots: bool = False
    ring: int | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        linear_below: where the "symlog" axis turns from logarithmic to linear, so that it can show 0.
        levels: lines across, by name.
        ticks: names of the places 0, 1, ... of the upright axis, from the top; a line is then dots at these places,
            and its band the intervals of x.
        x_limits, y_limits: ends of the axes; by default all is shown.
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
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None


LineStyle = tuple[str, str]
"""Colour and marker of a line."""
STYLES: tuple[LineStyle, ...] = tuple(zip(COLORS, MARKERS, strict=True))
RULE_STYLES: dict[str, LineStyle] = dict(zip(
    ("Patience", "Entropy", "KL", "SchED", "Prophet", "JoT", "NormConvergence", "AngleConvergence", "FixedPoint",
     "StableAndConfident", "Mutual", "Full"), STYLES, strict=True,
))  # fmt: skip
"""A rule looks the same in every picture."""
RING: dict[str, Any] = {"marker": "o", "fillstyle": "none", "linestyle": "", "zorder": 6}
"""How a point is marked."""
RIVALS = ".x+1"
"""Markers of dashed lines."""


def draw(
    panels: Sequence[Panel], path: Path, *, columns: int = 3, width: float = 5.2, shared: bool = False,
    equal: bool = False, ring: str = "", style: Style = "screen",
) -> Path:  # fmt: skip
    """Draw the panels side by side into a .png, .pdf or .svg file.

    Args:
        columns: panels in a row, at most.
        width: of a panel, in inches, on a screen.
        shared: one legend below all panels, in which a label has one colour; otherwise each panel has its own.
        equal: all panels have the same ends of their axes, to be compared by eye.
        ring: what the ring around a point says, in the shared legend.
        style: "screen", or "paper" for panels of 3.3 inches with small serif letters.

    Raises:
        CdlmError: there are no panels, or the file or the style is of another kind.
    """
    check_plot_path(path)
    if not panels:
        raise CdlmError("there is nothing to draw: give at least one panel")
    look = look_of(style)
    columns = min(columns, len(panels), look.columns)
    rows, scale = -(-len(panels) // columns), look.scale(width)
    height = max(4.0, 0.625 * width, *(0.27 * len(panel.ticks) + 1 for panel in panels))
    with look.on():
        figure = new_figure(scale * width * columns, scale * height * rows + shared, dpi=140)
        axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
        common = styles(panels) if shared else None
        for panel, axis in zip(panels, axes, strict=False):
            _draw(axis, panel, common or styles([panel]))
            if not shared and any(line.label for line in panel.lines):
                axis.legend(frameon=False)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if equal:
            _make_equal(axes[: len(panels)])
        if shared:
            has_ring = any(line.ring is not None for panel in panels for line in panel.lines)
            _add_legend(figure, axes, look.entries + 2 * (columns - 1), ring if has_ring else "")
        return write_figure(figure, path)


def _make_equal(axes: Sequence[Axes]) -> None:
    ends = [(axis.get_xlim(), axis.get_ylim()) for axis in axes]
    for name, own in zip("xy", zip(*ends, strict=True), strict=True):
        low, high = min(low for low, _ in own), max(high for _, high in own)
        for axis in axes:
            axis.set(**{f"{name}lim": (low, high)})


def styles(panels: Sequence[Panel]) -> dict[str, LineStyle]:
    """Colour and marker of each label: those of its rule (`RULE_STYLES`), or the next ones that are free. Dashed lines
    are black and differ by their marker."""
    lines = [line for panel in panels for line in panel.lines]
    colored, black = (dict.fromkeys(x.label for x in lines if x.dashed is dashed) for dashed in (False, True))
    found = dict[str, LineStyle]()
    for label in colored:
        own = RULE_STYLES.get(label.split("(")[0])
        if own is not None and own not in found.values():
            found[label] = own
    free = [style for style in STYLES if style not in found.values()] or list(STYLES)
    others = [label for label in colored if label not in found]
    found |= {label: free[i % len(free)] for i, label in enumerate(others)}
    return found | {label: ("black", RIVALS[i % len(RIVALS)]) for i, label in enumerate(black)}


def _add_legend(figure: Figure, axes: Sequence[Axes], columns: int, ring: str) -> None:
    from matplotlib.lines import Line2D

    found = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if ring:
        found[ring] = Line2D([], [], **RING, color=GREY, markersize=8)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _draw(axis: Axes, panel: Panel, style: Mapping[str, LineStyle]) -> None:
    _set_scales(axis, panel)
    _draw_levels(axis, panel)
    for line in panel.lines:
        color, marker = style[line.label]
        (_draw_dots if panel.ticks else _draw_curve)(axis, line, color, marker)
    if panel.ticks:
        axis.set_yticks(range(len(panel.ticks)), panel.ticks, fontsize="small")
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=5)
    axis.set(**{f"{name}lim": ends for name, ends in (("x", panel.x_limits), ("y", panel.y_limits)) if ends})
    label_axes(axis, panel.title, panel.x, panel.y)
    axis.grid(color=LIGHT_GREY, linewidth=0.6)


def _set_scales(axis: Axes, panel: Panel) -> None:
    """An axis is logarithmic only where it has something to show, and linear otherwise."""
    if panel.x_scale == "log" and _any_positive([line.x for line in panel.lines]):
        axis.set_xscale("log")
        plain_log_ticks(axis.xaxis)
    if panel.y_scale == "log" and _any_positive([*(line.y for line in panel.lines), [y for _, y in panel.levels]]):
        axis.set_yscale("log")
        plain_log_ticks(axis.yaxis)
    elif panel.y_scale == "symlog":
        axis.set_yscale("symlog", linthresh=panel.linear_below)


def _any_positive(values: Sequence[ArrayLike]) -> bool:
    """Whether a logarithmic axis would show any of them. What was not measured is NaN."""
    flat = np.concatenate([np.asarray(each, dtype=float).ravel() for each in values])
    return bool((np.isfinite(flat) & (flat > 0)).any())


def _draw_levels(axis: Axes, panel: Panel) -> None:
    least = 0 if axis.get_yscale() == "log" else -np.inf
    shown = [(name, value) for name, value in panel.levels if np.isfinite(value) and value > least]
    for i, (name, value) in enumerate(shown):
        axis.axhline(value, color=GREY, linewidth=0.9, linestyle=":")
        place, side = (0.99, "right") if i % 2 else (0.01, "left")  # levels may lie upon each other
        axis.annotate(name, (place, value), xycoords=("axes fraction", "data"), fontsize="small", color=GREY, ha=side,
                      va="bottom")  # fmt: skip


def _draw_curve(axis: Axes, line: Line, color: str, marker: str) -> None:
    axis.plot(
        line.x, line.y, color=color, label=line.label, linestyle="--" if line.dashed else "-",
        marker=marker if line.dots else "", zorder=5 if line.dashed else 2,
    )  # fmt: skip
    if line.band is not None:
        axis.fill_between(line.x, *line.band, color=color, alpha=0.12, linewidth=0)
    if line.ring is not None:
        (curve,) = axis.plot(line.x[line.ring], line.y[line.ring], **RING, color=color)
        curve.set(markersize=2.7 * curve.get_markersize(), markeredgewidth=1.3 * curve.get_linewidth())


def _draw_dots(axis: Axes, line: Line, color: str, marker: str) -> None:
    axis.plot(line.x, line.y, color=color, label=line.label, linestyle="", marker=marker)
    if line.band is not None:
        axis.hlines(line.y, *line.band, color=color, linewidth=1.2)
