import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toys

from cdlm.api import generate
from cdlm.core.errors import CdlmError
from cdlm.evaluation.plots import panels
from cdlm.evaluation.plots.figure import (
    COLORS,
    LOOKS,
    MARKERS,
    check_plot_path,
    new_figure,
    plain_log_ticks,
    short_names,
)  # fmt: skip
from cdlm.evaluation.plots.panels import Line, Panel, draw, styles
from cdlm.evaluation.plots.pareto import CHOSEN, Curve, CurvePanel, limits, plot_pareto
from cdlm.evaluation.plots.trajectories import GROUPS, MOST_BINS, halting_bins, plot_samples, plot_trajectories

STEPS, ROWS = 30, 9
HALTED = np.arange(10, 10 + ROWS)


def record(*keys: str) -> dict[str, np.ndarray]:
    """Random positive signals that end for each row after it halted."""
    draw = np.random.default_rng(0)
    gone = np.arange(STEPS)[:, None] > HALTED
    return {key: np.where(gone, np.nan, draw.uniform(0.1, 1, (STEPS, ROWS))) for key in keys}


def png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_all_panels_make_one_picture_without_leftovers(tmp_path):
    everything = record("switches", "z_norm", "x0_norm", "score_cosine", "residual", "mean_entropy")
    everything["residual"][0] = np.inf  # as at the first step
    path = plot_trajectories(everything, tmp_path / "new" / "a.png", halted=HALTED, title="run")
    assert png_size(path)[0] > 1000
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_signals_that_are_missing_leave_their_panel_out(tmp_path):
    four = record("switches", "z_norm", "score_cosine", "mean_entropy")
    sizes = [png_size(plot_trajectories(part, tmp_path / "a.png")) for part in (four, record("z_norm"), four)]
    assert sizes[1][1] < sizes[0][1]
    assert sizes[0] == sizes[2]
    with_halts = plot_trajectories(four, tmp_path / "b.png", halted=HALTED)
    assert png_size(with_halts)[1] > sizes[0][1]


@pytest.mark.parametrize("part", [("switches",), ("z_norm", "x0_norm"), ("mean_entropy", "switches", "x0_norm")])
def test_any_part_can_be_drawn(tmp_path, part):
    png_size(plot_trajectories(record(*part), tmp_path / "a.png", halted=HALTED))


def test_one_row_one_step_and_integers_can_be_drawn(tmp_path):
    halted = np.zeros(1, dtype=np.int64)
    png_size(plot_trajectories({"mean_entropy": np.ones((1, 1))}, tmp_path / "a.png", halted=halted))
    png_size(plot_trajectories({"switches": np.arange(12).reshape(6, 2)}, tmp_path / "b.png"))
    never = {"mean_entropy": np.full((5, 2), np.nan), "z_norm": np.zeros((5, 2))}
    png_size(plot_trajectories(never, tmp_path / "c.png"))


def test_the_same_record_gives_the_same_bytes(tmp_path):
    first = plot_trajectories(record("mean_entropy"), tmp_path / "a.png", halted=HALTED)
    second = plot_trajectories(record("mean_entropy"), tmp_path / "b.png", halted=HALTED)
    assert first.read_bytes() == second.read_bytes()


def test_pyplot_and_its_global_state_are_not_used(tmp_path):
    code = """
import sys, numpy as np
from cdlm.evaluation.plots.trajectories import plot_trajectories
plot_trajectories({"mean_entropy": np.ones((4, 2))}, sys.argv[1])
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = plot_trajectories(record("mean_entropy"), tmp_path / "a.png")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CdlmError, match="disk full"):
        plot_trajectories(record("switches"), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_records_are_explained(tmp_path):
    with pytest.raises(CdlmError, match="expected a record with some of switches"):
        plot_trajectories({"other": np.ones((3, 2))}, tmp_path / "a.png")
    with pytest.raises(CdlmError, match="halting step for each of 9 rows, got 2"):
        plot_trajectories(record("mean_entropy"), tmp_path / "a.png", halted=np.array([1, 2]))
    with pytest.raises(CdlmError, match="without a zero"):
        plot_trajectories({"mean_entropy": np.ones((3, 0))}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# --- quality over calls ---


def curve(label: str, rival: bool = False, chosen: int | None = None) -> Curve:
    value = [0.9, 1.0, 1.7]
    return Curve(label, [100.0, 50.0, 20.0], value, [v - 0.05 for v in value], [v + 0.05 for v in value], rival, chosen)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_panel_for_each_model(count: int, tmp_path):
    curves = [curve("plain", True), curve("a", chosen=1), curve("b")]
    panels = [CurvePanel(f"m{i}", curves, [("real", 0.7)]) for i in range(count)]
    png_size(plot_pareto(panels, tmp_path / "p.png"))


def test_a_panel_without_a_rival_and_with_one_point_can_be_drawn(tmp_path):
    single = Curve("a", [7.0], [0.9], [0.8], [1.0])
    png_size(plot_pareto([CurvePanel("m", [single], [])], tmp_path / "p.png"))


def test_what_was_not_measured_is_not_shown(tmp_path):
    unknown = Curve("of empty texts", [7.0], [np.nan], [np.nan], [np.nan], rival=True)
    assert limits(CurvePanel("m", [unknown], [])) is None
    png_size(plot_pareto([CurvePanel("m", [unknown], [])], tmp_path / "none.png"))
    assert limits(CurvePanel("m", [unknown, curve("a")], [])) == limits(CurvePanel("m", [curve("a")], []))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [0.0], [0.0, 0.8], [np.nan, 0.8]], ids=str)
@pytest.mark.parametrize("levels", [[], [("real", np.nan)], [("real", 0.0)], [("real", 0.7)]], ids=str)
@pytest.mark.filterwarnings("error")
def test_values_that_a_logarithmic_axis_cannot_show_leave_a_picture(values, levels, whole, tmp_path):
    found = Curve("a", [7.0, 9.0][: len(values)], values, values, values, rival=True)
    png_size(plot_pareto([CurvePanel("m", [found], levels)], tmp_path / "p.png", whole=whole))


def test_a_rule_looks_the_same_in_every_picture_and_no_two_lines_look_alike():
    def panel(*labels: str) -> Panel:
        return Panel("", "", "", [Line(label, np.ones(1), np.ones(1)) for label in labels])

    alone = styles([panel("Patience")])["Patience"]
    many = ["plain", "SchED", "other", "Patience(8)", "Patience", "Entropy", *(f"way {i}" for i in range(5))]
    found = styles([panel(*many)])
    assert alone in (found["Patience"], found["Patience(8)"])
    assert len(set(found.values())) == len(many)
    assert styles([panel(*many[::-1])])["SchED"] == found["SchED"]


@pytest.mark.parametrize("steps", [1, 2, 59, 60, 61, 200, 1000])
def test_bins_of_halting_steps_hold_whole_steps(steps: int):
    ends = np.array(halting_bins(steps))
    assert len(ends) <= MOST_BINS + 1
    assert ends[0] == -0.5
    assert ends[-1] >= steps - 0.5
    assert set(np.diff(ends)) == {np.diff(ends)[0]}
    assert np.diff(ends)[0].is_integer()


def test_rules_that_fail_badly_do_not_flatten_the_picture():
    wild = Curve("wild", [3.0], [1e6], [1e6], [1e6])
    low, high = limits(CurvePanel("m", [curve("plain", True), wild], [("real", 0.7)])) or (0, 0)
    assert low < 0.7
    assert high == pytest.approx(1.35 * 0.9)


def test_rules_that_collapse_do_not_hide_the_full_run():
    collapsed = Curve("collapsed", [3.0], [0.1], [0.1], [0.1])
    low, high = limits(CurvePanel("m", [curve("plain", True), collapsed], [("full run", 0.9), ("real", 0.7)])) or (0, 0)
    assert 0.1 < low < 0.7
    assert high == pytest.approx(1.35 * 0.9)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(CdlmError, match="nothing to draw"):
        plot_pareto([], tmp_path / "p.png")
    assert not any(tmp_path.iterdir())


def test_a_choice_has_a_ring_and_a_label_one_colour_in_all_panels():
    first, second = (
        Panel("m", "calls", "nats", [c.line for c in (curve("plain", True), *rest)])
        for rest in ([curve("a")], [curve("b", chosen=1), curve("a")])
    )
    found = styles([first, second])
    assert found.pop("plain")[0] == "black"
    assert found == {"a": (COLORS[0], MARKERS[0]), "b": (COLORS[1], MARKERS[1])}
    assert [line.ring for line in second.lines] == [None, 1, None]
    assert [line.band is not None for line in second.lines] == [True, False, False]


# --- kinds of files ---

HEADS = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-", ".svg": b"<?xml"}


def line_panels() -> list[Panel]:
    x = np.array([1.0, 2.0, 4.0])
    return [Panel("curves", "x", "y", [Line("a", x, x, (x - 1, x + 1)), Line("b", x, x, dashed=True)], "log")]


def draw_each(folder: Path, suffix: str) -> list[Path]:
    """A picture of each of the three plots."""
    curves = [CurvePanel("m", [curve("plain", True), curve("a", chosen=1)], [("real", 0.7)])]
    return [
        plot_trajectories(record("mean_entropy", "z_norm"), folder / f"t{suffix}", halted=HALTED),
        plot_pareto(curves, folder / f"p{suffix}"),
        draw(line_panels(), folder / f"d{suffix}"),
    ]


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".PDF"])
def test_the_name_decides_the_kind_of_picture(suffix: str, tmp_path: Path):
    paths = draw_each(tmp_path, suffix)
    assert all(path.read_bytes().startswith(HEADS[suffix.lower()]) for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_vector_pictures_have_the_same_bytes_at_any_time(suffix: str, tmp_path: Path):
    first, second = draw(line_panels(), tmp_path / f"a{suffix}"), draw(line_panels(), tmp_path / f"b{suffix}")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("suffix", [".jpg", "", ".jsonl"])
def test_other_kinds_of_pictures_are_refused_before_any_work(suffix: str, tmp_path: Path):
    for call in (
        lambda: check_plot_path(tmp_path / f"a{suffix}"),
        lambda: plot_trajectories({}, tmp_path / f"a{suffix}"),
        lambda: plot_pareto([], tmp_path / f"a{suffix}"),
        lambda: draw([], tmp_path / f"a{suffix}"),
    ):
        with pytest.raises(CdlmError, match=r"end its name in \.pdf, \.png, \.svg") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_samples_without_a_record_have_no_plot(tmp_path: Path):
    model = toys.with_tokenizer()
    samples = generate(model, n=1, steps=2)
    with pytest.raises(CdlmError, match="no record to plot"):
        plot_samples(samples, tmp_path / "a.png", "")


def test_a_run_that_nothing_ended_early_has_no_halting_steps(tmp_path: Path):
    model = toys.with_tokenizer()
    full, halted = (generate(model, n=2, steps=6, record=True, halt=halt) for halt in (None, "FixedSteps(3)"))
    sizes = [png_size(plot_samples(samples, tmp_path / "a.png", "")) for samples in (full, halted)]
    assert sizes[0][1] < sizes[1][1]


@pytest.mark.parametrize("low", [1e-9, 1e-7, 1e-6, 1e-5, 1e-3, 0.3])
@pytest.mark.parametrize("height", [1.5, 3.0])
def test_a_logarithmic_axis_has_ticks_over_any_number_of_decades(low: float, height: float):
    figure = new_figure(4.0, height, 100)
    axis = figure.add_subplot()
    axis.plot([low, 1.0])
    axis.set_yscale("log")
    plain_log_ticks(axis.yaxis)
    bottom, top = axis.get_ylim()
    assert sum(bottom <= tick <= top for tick in axis.yaxis.get_ticklocs()) >= 2


def test_a_picture_for_a_paper_is_as_wide_as_a_column_or_two(tmp_path):
    panel = Panel("a", "x", "y", [Line("b", np.arange(3.0), np.arange(3.0))])
    one, two, four = (draw([panel] * n, tmp_path / f"{n}.png", style="paper") for n in (1, 2, 4))
    assert [png_size(each)[0] for each in (one, two, four)] == [462, 924, 924]  # 3.3 inches at 140 dots, or twice
    drawn = [plot_trajectories(record("z_norm"), tmp_path / f"{k}.png", style=k) for k in ("paper", "screen")]
    assert png_size(drawn[0])[0] == 528 < png_size(drawn[1])[0]  # at 160 dots


def test_a_style_is_gone_after_the_picture(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw([Panel("a", "x", "y", [Line("b", np.arange(3.0), np.arange(3.0))])], tmp_path / "a.pdf", style="paper")
    assert dict(matplotlib.rcParams) == before


def test_every_letter_of_a_paper_has_its_glyph(tmp_path):
    """Type 42 letters of the PDF, and none drawn as a box: the sign of an estimate has a hat and a low zero."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    families = LOOKS["paper"].settings["font.family"]
    fonts = [get_font(findfont(FontProperties(family=family), fallback_to_default=False)) for family in families]
    for _, legend, _ in (signal for group in GROUPS for signal in group.signals):
        assert all(any(font.get_char_index(ord(sign)) for font in fonts) for sign in legend)


def test_panels_that_are_compared_have_the_same_axes(monkeypatch, tmp_path):
    ends = []

    def keep(figure, path):
        ends.extend((axis.get_xlim(), axis.get_ylim()) for axis in figure.axes)
        return path

    monkeypatch.setattr(panels, "write_figure", keep)
    few, many = (Panel("a", "x", "y", [Line("b", np.arange(n), np.arange(n) ** 2.0)]) for n in (3, 9))
    draw([few, many], tmp_path / "a.png", equal=True)
    assert ends[0] == ends[1]
    draw([few, many], tmp_path / "a.png")
    assert ends[2] != ends[3]
    assert ends[1][1][1] >= max(ends[2][1][1], ends[3][1][1])


def test_the_legend_says_what_a_ring_is_where_there_is_one(monkeypatch, tmp_path):
    legends = []

    def keep(figure, path):
        legends.append([text.get_text() for text in figure.legends[0].get_texts()])
        return path

    monkeypatch.setattr(panels, "write_figure", keep)
    for chosen in (0, None):
        line = [1.0, 2.0]
        curve = Curve("Patience", line, line, line, line, chosen=chosen)
        plot_pareto([CurvePanel("a", [curve], [])], tmp_path / "a.png")
    assert legends == [["Patience", CHOSEN], ["Patience"]]


def test_a_heading_names_a_folder_and_no_path(tmp_path):
    for name in ("one/a", "two/a", "two/b"):
        (tmp_path / name).mkdir(parents=True)
    same, other, unlike = (str(tmp_path / name) for name in ("one/a", "two/a", "two/b"))
    assert short_names([same, unlike, "you/model"]) == {same: "a", unlike: "b", "you/model": "you/model"}
    assert short_names([same, other]) == {same: same, other: other}
