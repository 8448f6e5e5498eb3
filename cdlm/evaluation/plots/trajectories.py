"""Trajectories of sampling as a picture: how text and state settle, and where a rule stopped."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, Num

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#555555"

MOST_LINES = 12
"""Single rows drawn behind the median, evenly spread over the rows; more would hide each other."""

CAPTION = "Thick line: median of the samples still running; band: 10th to 90th percentile; thin lines: single samples."
HALT_CAPTION = "Red: halting steps, dashed at their median."


@dataclass(frozen=True)
class SignalPanel:
    """One signal group: heading, axis label, (key, legend, colour) of each signal, and the kind of axis."""

    title: str
    label: str
    signals: tuple[tuple[str, str, str], ...]
    logarithmic: bool = False


PANELS = (
    SignalPanel("Token switches", "tokens changed per step", (("switches", "switches", BLUE),)),
    SignalPanel(
        "Norms", "norm / embedding norm", (("z_norm", "state z", PURPLE), ("x0_norm", "prediction x̂₀", GREEN)), True
    ),
    SignalPanel("Direction of the score", "degrees from previous step", (("score_angle", "angle", GREEN),)),
    SignalPanel("Entropy of the prediction", "nats per token", (("mean_entropy", "entropy", BLUE),)),
)


def plot_trajectories(
    record: Mapping[str, Num[np.ndarray, "steps rows"]],
    path: str | Path,
    *,
    halted: Int[np.ndarray, " halts"] | None = None,
    title: str = "",
) -> Path:
    """Draw the recorded signals against the step and write a PNG.

    Each panel has the median over rows, the band from the 10th to the 90th percentile, and thin lines of single rows
    (at most `MOST_LINES`). A signal that `record` does not hold is left out, and with it a panel that has none.

    Args:
        record: any of "switches" (tokens changed since the step before), "z_norm" and "x0_norm" (in units of the
            embedding norm), "score_cosine" (with the previous step's score), "mean_entropy" (nats per token), each
            [steps, rows]; NaN where a row has no value. Other keys are ignored.
        path: of the PNG; parent folders are made, and the file appears whole or not at all.
        halted: step (from 0) at which each row halted; they get a histogram, and a tick each at the foot of the panels.
        title: heading of the figure.

    Returns the path. Raises CdlmError when no signal can be drawn or shapes disagree.
    """
    if "score_cosine" in record:  # near 1 all along, so its angle is what can be seen
        cosine = np.asarray(record["score_cosine"], dtype=np.float64).clip(-1, 1)
        record = {**record, "score_angle": np.degrees(np.arccos(cosine))}
    panels = [panel for panel in PANELS if any(key in record for key, _, _ in panel.signals)]
    steps = _checked_steps(record, halted, panels)
    figure, axes, strip = _canvas(len(panels), halted is not None)
    for panel, axis in zip(panels, axes, strict=True):
        _draw_panel(axis, panel, record)
        if halted is not None:
            _mark_halts(axis, halted)
    if halted is not None and strip is not None:
        _draw_halts(strip, halted, steps)
    for axis in [*axes, *([strip] if strip else [])]:
        axis.set_xlim(0, max(1, steps - 1))
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.015, ha="left")
    caption = [CAPTION, *([HALT_CAPTION] if halted is not None else [])]
    figure.supxlabel(("\n" if len(panels) == 1 else " ").join(caption), fontsize=8.5, color=GREY, x=0.015, ha="left")
    return _write(figure, Path(path))


def _checked_steps(record: Mapping[str, np.ndarray], halted: np.ndarray | None, panels: Sequence[SignalPanel]) -> int:
    shapes = {record[key].shape for panel in panels for key, _, _ in panel.signals if key in record}
    if not shapes:
        known = ", ".join(key for panel in PANELS for key, _, _ in panel.signals).replace("_angle", "_cosine")
        raise CdlmError(f"expected a record with some of {known}, got {sorted(record)}; sample with record=True")
    if len(shapes) > 1 or 0 in next(iter(shapes)):
        raise CdlmError(f"expected signals of one shape [steps, rows] without a zero, got {sorted(shapes)}")
    steps, rows = shapes.pop()
    if halted is not None and len(halted) != rows:
        raise CdlmError(f"expected a halting step for each of {rows} rows, got {len(halted)}")
    return steps


def _canvas(panels: int, with_strip: bool) -> tuple[Figure, list[Axes], Axes | None]:
    """Panels in two columns (one when alone), and below them a low strip over the full width for the halting steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, width = (1, 7.5) if panels == 1 else (2, 10.4)
    lines = -(-panels // columns)
    figure = Figure(figsize=(width, 2.9 * lines + (1.9 if with_strip else 0.5)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines + with_strip, columns, height_ratios=[1.0] * lines + [0.42] * with_strip)
    places = [divmod(index, columns) for index in range(panels)]
    wide_last = panels % columns == 1
    axes = [
        figure.add_subplot(grid[line, :] if wide_last and index == panels - 1 else grid[line, column])
        for index, (line, column) in enumerate(places)
    ]
    strip = figure.add_subplot(grid[lines, :]) if with_strip else None
    for axis in [*axes, *([strip] if strip else [])]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#E6E6E6", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9, colors="#333333")
        axis.set_xlabel("step", fontsize=10)
    return figure, axes, strip


def _draw_panel(axis: Axes, panel: SignalPanel, record: Mapping[str, np.ndarray]) -> None:
    present = [signal for signal in panel.signals if signal[0] in record]
    for key, legend, color in present:
        _draw_signal(axis, record[key].astype(np.float64), legend, color)
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_ylabel(panel.label, fontsize=10)
    if panel.logarithmic and any(np.nanmax(record[key], initial=0) > 0 for key, _, _ in present):
        _make_logarithmic(axis)
    if len(panel.signals) > 1:
        axis.legend(frameon=False, fontsize=9)


def _make_logarithmic(axis: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_signal(axis: Axes, values: Float[np.ndarray, "steps rows"], legend: str, color: str) -> None:
    step = np.arange(len(values))
    shown = np.unique(np.linspace(0, values.shape[1] - 1, min(MOST_LINES, values.shape[1])).astype(int))
    axis.plot(step, values[:, shown], color=color, linewidth=0.6, alpha=0.18)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # steps without a live row stay blank
        low, middle, high = np.nanpercentile(values, [10, 50, 90], axis=1)
    axis.fill_between(step, low, high, color=color, alpha=0.18, linewidth=0)
    axis.plot(step, middle, color=color, linewidth=2.0, label=legend)


def _mark_halts(axis: Axes, halted: Int[np.ndarray, " rows"]) -> None:
    middle = float(np.median(halted))
    axis.axvline(middle, color=RED, linewidth=1.3, linestyle=(0, (4, 3)))
    axis.plot(
        halted, np.full(len(halted), 0.025), "|", color=RED, markersize=8, alpha=0.6,
        transform=axis.get_xaxis_transform(), clip_on=False,
    )  # fmt: skip


def _draw_halts(axis: Axes, halted: Int[np.ndarray, " rows"], steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    middle = float(np.median(halted))
    axis.hist(halted, bins=np.linspace(-0.5, steps - 0.5, min(steps, 60) + 1).tolist(), color=RED, alpha=0.75)
    axis.axvline(middle, color=RED, linewidth=1.3, linestyle=(0, (4, 3)))
    axis.set_title(f"Halting step: median {middle:g} of {steps} steps", fontsize=11, loc="left")
    axis.set_ylabel("samples", fontsize=10)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _write(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
