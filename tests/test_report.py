import struct
import subprocess
import sys

import numpy as np
import pytest

from cdlm.core.errors import CdlmError
from cdlm.evaluation.plots.pareto import Curve, CurvePanel, limits, plot_pareto
from cdlm.evaluation.plots.trajectories import plot_trajectories

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
    everything = record("switches", "z_norm", "x0_norm", "score_cosine", "mean_entropy")
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
from cdlm.report.plot import plot_trajectories
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


def test_rules_that_fail_badly_do_not_flatten_the_picture():
    wild = Curve("wild", [3.0], [1e6], [1e6], [1e6])
    low, high = limits(CurvePanel("m", [curve("plain", True), wild], [("real", 0.7)]))
    assert low < 0.7
    assert high == pytest.approx(1.35 * 0.9)


def test_rules_that_collapse_do_not_hide_the_full_run():
    collapsed = Curve("collapsed", [3.0], [0.1], [0.1], [0.1])
    low, high = limits(CurvePanel("m", [curve("plain", True), collapsed], [("full run", 0.9), ("real", 0.7)]))
    assert 0.1 < low < 0.7
    assert high == pytest.approx(1.35 * 0.9)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(CdlmError, match="nothing to draw"):
        plot_pareto([], tmp_path / "p.png")
    assert not any(tmp_path.iterdir())
