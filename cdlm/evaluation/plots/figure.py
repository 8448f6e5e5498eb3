"""What all plots share: colours, the look of axes, and the file, whose kind is that of its name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from cdlm.core.checks import check_choice
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

Style = Literal["screen", "paper"]
"""Where a picture is looked at."""


@dataclass(frozen=True)
class Look:
    """What a place asks of a picture.

    Args:
        ending: kind of file where no name is given.
        panel: width of a pair of axes in inches; None is what the picture asks for.
        columns: of panels, at most.
        entries: of a legend below all panels, in a row below one of them.
        settings: of matplotlib, while the picture is made.
    """

    ending: str
    panel: float | None
    columns: int
    entries: int
    settings: Mapping[str, Any]

    def scale(self, width: float) -> float:
        """What lengths are multiplied with where the picture asks for panels of this width."""
        return 1.0 if self.panel is None else self.panel / width

    @contextmanager
    def on(self) -> Iterator[None]:
        """Make what is drawn look so."""
        from matplotlib import rc_context

        with rc_context(cast(Any, {"svg.hashsalt": "cdlm", **self.settings})):
            yield


def _letters(size: float, title: float, legend: float, heading: float) -> dict[str, float | str]:
    return {
        "font.size": size, "axes.titlesize": title, "axes.labelsize": size, "legend.fontsize": legend,
        "figure.titlesize": heading, "figure.titleweight": "bold", "axes.titlelocation": "left",
    }  # fmt: skip


LOOKS: dict[Style, Look] = {
    "screen": Look(".png", None, 3, 3, {
        **_letters(10.0, 11.0, 8.0, 13.0), "lines.linewidth": 1.4, "lines.markersize": 4,
    }),
    "paper": Look(".pdf", 3.3, 2, 2, {
        **_letters(8.0, 8.0, 6.5, 8.0), "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.0,
        "lines.markersize": 2.8, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "font.family": ["STIXGeneral", "DejaVu Serif"],  # the second has the signs that the first lacks
        "pdf.fonttype": 42,  # TrueType: conferences refuse the other kind
    }),
}  # fmt: skip
"""A page on a screen, and a column of 3.3 inches in a paper of two columns; two panels are as wide as both."""


def look_of(style: Style) -> Look:
    """The look by its name.

    Raises:
        CdlmError: there is none of that name.
    """
    check_choice("a plot", get_args(Style), style=style)
    return LOOKS[style]


METADATA: dict[str, dict[str, None]] = {".pdf": {"CreationDate": None}, ".png": {}, ".svg": {"Date": None}}
"""Kinds of files by ending, each with what is left out of it: the same figure gives the same bytes at any time."""

MOST_DECADES = 4
"""Of a logarithmic axis with ticks between powers of ten."""


def check_plot_path(path: Path) -> None:
    """Raise unless the file name ends in a kind of picture that can be written."""
    if path.suffix.lower() not in METADATA:
        raise CdlmError(f"cannot write a plot to {path}: end its name in {', '.join(METADATA)}")


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Of each model what to call it in a heading: of a folder its own name, unless another one has the same."""
    short = {model: Path(model).name if Path(model).is_dir() else model for model in models}
    return {model: name if list(short.values()).count(name) == 1 else model for model, name in short.items()}


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
    """Write the figure as the kind of file that its name ends in, under its `Look`; parent folders are made.

    Raises:
        CdlmError: the kind is not known, or the place cannot be written.
    """
    from matplotlib.text import Text

    check_plot_path(path)
    kind = path.suffix.lower()
    for text in cast(list[Text], figure.findobj(Text)):
        text.set_text(visible(text.get_text()))
        text.set_parse_math(False)  # a name with dollars is no formula
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is drawn as a box
        figure.savefig(temporary, format=kind[1:], metadata=METADATA[kind])
    return path


def label_axes(axis: Axes, title: str, x: str, y: str) -> None:
    """Heading and names of the axes; no frame at the top and on the right."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)


def plain_log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ..., written out; of one over many decades at 1, 10, ... alone."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    many = low > 0 and high / low > 10**MOST_DECADES  # where LogLocator has no ticks between powers of ten, nor these
    axis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
