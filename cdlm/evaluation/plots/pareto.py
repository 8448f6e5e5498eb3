"""Quality over calls as a picture: every rule's sweep, and the plain sampler with fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, then shades that stay apart from them; markers tell lines apart in grey print too.
COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#7B4EA3", "#B2182B", "#4D9221",
    "#777777", "#1B2A6B",
)  # fmt: skip
MARKERS = "osD^vP*X<>ph"
MOST = 1.35
"""Upper end of the axis over the full run's value: the region in which one would want to be."""
GREY = "#555555"


@dataclass(frozen=True)
class Curve:
    """A sweep; lists in one order.

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


@dataclass(frozen=True)
class CurvePanel:
    """One model at one number of steps; `levels` are lines across, by name (real text, the full run)."""

    title: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[str, float]]


def plot_pareto(panels: Sequence[CurvePanel], path: Path, label: str = "AR-NLL, nats per token") -> Path:
    """A PNG with one panel each; lower and further left is better. Calls on a logarithmic axis, rings at choices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise CdlmError("there is nothing to draw: give at least one panel")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(8.0 * columns, 5.0 * lines + 1.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(c.label for p in panels for c in p.curves if not c.rival))
    style = {n: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}
    for panel, axis in zip(panels, axes, strict=False):
        _draw(axis, panel, style, label)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=1 + 2 * columns, frameon=False, fontsize=8
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw(axis: Axes, panel: CurvePanel, style: dict[str, tuple[str, str]], label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for curve in panel.curves:
        if curve.rival:
            axis.fill_between(curve.calls, curve.low, curve.high, color="black", alpha=0.10, linewidth=0)
            axis.plot(curve.calls, curve.value, "k--", marker=".", linewidth=1.8, label=curve.label, zorder=5)
            continue
        color, marker = style[curve.label]
        axis.plot(curve.calls, curve.value, color=color, marker=marker, markersize=3.5, linewidth=1.2, alpha=0.9,
                  label=curve.label)  # fmt: skip
        if curve.chosen is not None:
            at = curve.calls[curve.chosen], curve.value[curve.chosen]
            axis.plot(*at, marker="o", markersize=11, fillstyle="none", color=color, markeredgewidth=1.8, zorder=6)
    for name, value in panel.levels:
        axis.axhline(value, color=GREY, linewidth=0.9, linestyle=":")
        axis.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), fontsize=8, color=GREY, ha="left",
                      va="bottom")  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(*limits(panel))
    low, high = limits(panel)
    shown = [x for c in panel.curves for x, y in zip(c.calls, c.value, strict=True) if low <= y <= high]
    axis.set_xlim(0.85 * min(shown), 1.1 * max(shown))
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_xlabel("mean calls a sample", fontsize=10)
    axis.set_ylabel(label, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#E6E6E6", linewidth=0.6)


def limits(panel: CurvePanel) -> tuple[float, float]:
    """From the lowest level or rival to a little over the best or the highest level, so that settings that fail badly,
    or collapse to text that is too easy, do not flatten it."""
    rival = [v for c in panel.curves if c.rival for v in c.low]
    low = min([*(value for _, value in panel.levels), *(rival or [v for c in panel.curves for v in c.value])])
    best = max([min(v for c in panel.curves for v in c.value), *(value for _, value in panel.levels)])
    return low - 0.05 * (MOST * best - low), MOST * best
