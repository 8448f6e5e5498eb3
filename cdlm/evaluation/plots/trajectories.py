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
from cdlm.evaluation.plots.figure import (
    BLUE,
    GREEN,
    GREY,
    LIGHT_GREY,
    PURPLE,
    RED,
    Look,
    Style,
    check_plot_path,
    label_axes,
    look_of,
    new_figure,
    plain_log_ticks,
    write_figure,
)
from cdlm.sampling.samples import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 12
"""Single rows drawn behind the median, evenly spaced over the rows; more would hide each other."""

MOST_BINS = 60
"""Of the histogram of halting steps."""

CAPTION = "Thick line: median of the samples still running; band: 10th to 90th percentile; thin lines: single samples."
HALT_CAPTION = "Orange red: halting steps, dashed at their median."


@dataclass(frozen=True)
class SignalGroup:
    """Signals on one pair of axes: heading, axis label, (key, legend, colour) of each, and the kind of axis."""

    title: str
    label: str
    signals: tuple[tuple[str, str, str], ...]
    logarithmic: bool = False


GROUPS = (
    SignalGroup("Token switches", "tokens changed per step", (("switches", "switches", BLUE),)),
    SignalGroup(
        "Norms", "norm / embedding norm", (("z_norm", "state z", PURPLE), ("x0_norm", "prediction x̂₀", GREEN)), True
    ),
    SignalGroup("Direction of the score", "degrees from previous step", (("score_angle", "angle", GREEN),)),
    SignalGroup("Self-conditioning residual", "squared embedding norms", (("residual", "residual", PURPLE),), True),
    SignalGroup("Entropy of the prediction", "nats per token", (("mean_entropy", "entropy", BLUE),)),
)


def plot_samples(samples: Samples, path: str | Path, title: str, style: Style = "screen") -> Path:
    """Switches, norms and angles of recorded samples against the step, with the halting steps marked if some of them
    took fewer steps than they might.

    Raises:
        CdlmError: the samples have no record, or the file is of a kind that cannot be written.
    """
    if samples.record is None:
        raise CdlmError("the samples have no record to plot: draw them with record=True")
    record = samples.record
    columns = {**record.signals, "switches": np.where(record.nfe > 0, record.switch_counts(), np.nan)}
    halted = samples.steps - 1 if (samples.steps < record.budgets).any() else None
    return plot_trajectories(columns, path, halted=halted, title=title, style=style)


def plot_trajectories(
    record: Mapping[str, Num[np.ndarray, "steps rows"]],
    path: str | Path,
    *,
    halted: Int[np.ndarray, " halts"] | None = None,
    title: str = "",
    style: Style = "screen",
) -> Path:
    """Draw the recorded signals against the step into a .png, .pdf or .svg file.

    Each panel has the median over rows, the band from the 10th to the 90th percentile, and thin lines of single rows
    (at most `MOST_LINES`). A signal that `record` does not hold is left out, and with it a panel that has none.

    Args:
        record: any of "switches" (tokens changed since the step before), "z_norm" and "x0_norm" (in units of the
            embedding norm), "score_cosine" (with the previous step's score), "residual" (of the estimate from the one
            shown, in squared embedding norms), "mean_entropy" (nats per token), each [steps, rows]; NaN where a row has
            no value. Other keys are ignored.
        path: of the file; parent folders are made, and it appears whole or not at all.
        halted: step (from 0) at which each row halted; they get a histogram, and a tick each at the foot of the panels.
        title: heading of the figure.
        style: "screen", or "paper" for the width of two columns and small serif letters.

    Raises:
        CdlmError: no signal can be drawn, shapes disagree, or the file or the style is of another kind.
    """
    check_plot_path(Path(path))
    if "score_cosine" in record:  # near 1 all along, so its angle is what can be seen
        cosine = np.asarray(record["score_cosine"], dtype=np.float64).clip(-1, 1)
        record = {**record, "score_angle": np.degrees(np.arccos(cosine))}
    if "residual" in record:  # infinite at a first step
        residual = np.asarray(record["residual"], dtype=np.float64)
        record = {**record, "residual": np.where(np.isinf(residual), np.nan, residual)}
    groups = [group for group in GROUPS if any(key in record for key, _, _ in group.signals)]
    steps = _checked_steps(record, halted, groups)
    look = look_of(style)
    with look.on():
        figure, axes, strip = _canvas(len(groups), halted is not None, look)
        for group, axis in zip(groups, axes, strict=True):
            _draw_group(axis, group, record)
            if halted is not None:
                _mark_halts(axis, halted)
        if halted is not None and strip is not None:
            _draw_halts(strip, halted, steps)
        for axis in [*axes, *([strip] if strip else [])]:
            axis.set_xlim(0, max(1, steps - 1))
        if title:
            figure.suptitle(title, x=0.015, ha="left")
        caption = [CAPTION, *([HALT_CAPTION] if halted is not None else [])]
        between = "\n" if len(groups) == 1 or style == "paper" else " "
        figure.supxlabel(between.join(caption), fontsize="small", color=GREY, x=0.015, ha="left")
        return write_figure(figure, Path(path))


def _checked_steps(record: Mapping[str, np.ndarray], halted: np.ndarray | None, groups: Sequence[SignalGroup]) -> int:
    shapes = {record[key].shape for group in groups for key, _, _ in group.signals if key in record}
    if not shapes:
        known = ", ".join(key for group in GROUPS for key, _, _ in group.signals).replace("_angle", "_cosine")
        raise CdlmError(f"expected a record with some of {known}, got {sorted(record)}; sample with record=True")
    if len(shapes) > 1 or 0 in next(iter(shapes)):
        raise CdlmError(f"expected signals of one shape [steps, rows] without a zero, got {sorted(shapes)}")
    steps, rows = shapes.pop()
    if halted is not None and len(halted) != rows:
        raise CdlmError(f"expected a halting step for each of {rows} rows, got {len(halted)}")
    return steps


def _canvas(groups: int, with_strip: bool, look: Look) -> tuple[Figure, list[Axes], Axes | None]:
    """Groups in two columns (one when alone), and below them a low strip over the full width for the halting steps."""
    columns, width = (1, 7.5) if groups == 1 else (2, 10.4)
    lines, scale = -(-groups // columns), look.scale(width / columns)
    figure = new_figure(scale * width, scale * (2.9 * lines + (1.9 if with_strip else 0.5)), dpi=160)
    grid = figure.add_gridspec(lines + with_strip, columns, height_ratios=[1.0] * lines + [0.42] * with_strip)
    places = [divmod(index, columns) for index in range(groups)]
    wide_last = groups % columns == 1
    axes = [
        figure.add_subplot(grid[line, :] if wide_last and index == groups - 1 else grid[line, column])
        for index, (line, column) in enumerate(places)
    ]
    strip = figure.add_subplot(grid[lines, :]) if with_strip else None
    for axis in [*axes, *([strip] if strip else [])]:
        axis.grid(axis="y", color=LIGHT_GREY, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(colors="#333333")
    return figure, axes, strip


def _draw_group(axis: Axes, group: SignalGroup, record: Mapping[str, np.ndarray]) -> None:
    present = [signal for signal in group.signals if signal[0] in record]
    for key, legend, color in present:
        _draw_signal(axis, record[key].astype(np.float64), legend, color)
    label_axes(axis, group.title, "step", group.label)
    if group.logarithmic and any(np.nanmax(record[key], initial=0) > 0 for key, _, _ in present):
        axis.set_yscale("log")
        plain_log_ticks(axis.yaxis)
    if len(group.signals) > 1:
        axis.legend(frameon=False)


def _draw_signal(axis: Axes, values: Float[np.ndarray, "steps rows"], legend: str, color: str) -> None:
    step = np.arange(len(values))
    shown = np.unique(np.linspace(0, values.shape[1] - 1, min(MOST_LINES, values.shape[1])).astype(int))
    axis.plot(step, values[:, shown], color=color, linewidth=0.6, alpha=0.18)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # steps without a live row stay blank
        low, middle, high = np.nanpercentile(values, [10, 50, 90], axis=1)
    axis.fill_between(step, low, high, color=color, alpha=0.18, linewidth=0)
    (line,) = axis.plot(step, middle, color=color, label=legend)
    line.set_linewidth(1.4 * line.get_linewidth())


def _mark_halts(axis: Axes, halted: Int[np.ndarray, " rows"]) -> None:
    middle = float(np.median(halted))
    axis.axvline(middle, color=RED, linestyle=(0, (4, 3)))
    axis.plot(
        halted, np.full(len(halted), 0.025), "|", color=RED, markersize=8, alpha=0.6,
        transform=axis.get_xaxis_transform(), clip_on=False,
    )  # fmt: skip


def halting_bins(steps: int) -> list[float]:
    """Ends of at most `MOST_BINS` bins of whole steps, the first at step 0."""
    width = -(-steps // MOST_BINS)
    return (np.arange(0, steps + width, width) - 0.5).tolist()


def _draw_halts(axis: Axes, halted: Int[np.ndarray, " rows"], steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    middle = float(np.median(halted))
    axis.hist(halted, bins=halting_bins(steps), color=RED, alpha=0.75)
    axis.axvline(middle, color=RED, linestyle=(0, (4, 3)))
    label_axes(axis, f"Halting step: median {middle:g} of {steps} steps", "step", "samples")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
