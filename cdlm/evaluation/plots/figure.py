"""What all plots share: colours, the look of axes, and the file, whose kind is that of its name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing
from cdlm.core.inert import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers see apart too.
BLUE, ORANGE, GREEN, PURPLE, RED, CYAN = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
GREY, LIGHT_GREY = "#555555", "#E6E6E6"
COLORS = (
    BLUE, ORANGE, GREEN, PURPLE, RED, CYAN, "#8C6D31", "#7B4EA3", "#B2182B", "#4D9221", "#777777", "#1B2A6B",
)  # fmt: skip
"""Of lines: after Okabe and Ito's, shades that stay apart from them."""
MARKERS = "osD^vP*X<>ph"
"""Of lines, to tell them apart in grey print too."""

METADATA: dict[str, dict[str, None]] = {".pdf": {"CreationDate": None}, ".png": {}, ".svg": {"Date": None}}
"""Kinds of files by ending, each with what is left out of it: the same figure gives the same bytes at any time."""

MOST_DECADES = 4
"""Of a logarithmic axis with ticks between powers of ten."""


def check_plot_path(path: Path) -> None:
    """Raise unless the file name ends in a kind of picture that can be written."""
    if path.suffix.lower() not in METADATA:
        raise CdlmError(f"cannot write a plot to {path}: end its name in {', '.join(METADATA)}")


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """An empty figure of so many inches, outside pyplot's global state.

    Args:
        dpi: dots per inch of a .png.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: Path) -> Path:
    """Write the figure as the kind of file that its name ends in; parent folders are made.

    Raises:
        CdlmError: the kind is not known, or the place cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    check_plot_path(path)
    kind = path.suffix.lower()
    for text in cast(list[Text], figure.findobj(Text)):
        text.set_text(visible(text.get_text()))
        text.set_parse_math(False)  # a name with dollars is no formula
    with replacing(path) as temporary, rc_context({"svg.hashsalt": "cdlm"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is drawn as a box
        figure.savefig(temporary, format=kind[1:], metadata=METADATA[kind])
    return path


def label_axes(axis: Axes, title: str, x: str, y: str) -> None:
    """Heading and names of the axes; no frame at the top and on the right."""
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(x, fontsize=10)
    axis.set_ylabel(y, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def plain_log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ..., written out; of one over many decades at 1, 10, ... alone."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    many = low > 0 and high / low > 10**MOST_DECADES  # where LogLocator has no ticks between powers of ten, nor these
    axis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
