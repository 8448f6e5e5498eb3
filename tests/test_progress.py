"""Progress: lines by a clock, a bar where there is a person, silence unless it is shown."""

from __future__ import annotations

import io
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core import progress as module
from cdlm.core.progress import SECONDS, Bar, Lines, Meter, Parts, announce, drop_announced, meter, progress


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream with a person in front of it."""

    def isatty(self) -> bool:
        return True


@given(st.lists(st.tuples(st.floats(0, 25), st.integers(0, 4)), max_size=30), st.integers(1, 40))
def test_lines_come_at_most_every_ten_seconds_and_at_the_end(steps: list[tuple[float, int]], total: int) -> None:
    clock, written, done = Clock(), list[str](), 0
    made, shown = Lines(total, "rows", clock, written.append), 0.0
    for seconds, by in steps:
        clock.now += seconds
        before, count = done, len(written)
        done += by
        made.advance(by)
        expected = clock.now - shown >= SECONDS or before < total <= done
        assert len(written) - count == expected
        if expected:
            shown = clock.now
            assert written[-1].startswith(f"rows: {done} of {total}")


def test_a_line_says_what_is_left_and_what_was_measured() -> None:
    clock, written = Clock(), list[str]()
    made = Lines(8, "samples", clock, written.append)
    clock.now = 20.0
    made.advance(0, loop_steps=3)
    made.advance(2, mean_calls="4.5")
    clock.now = 40.0
    made.advance(0)
    clock.now = 41.0
    made.advance(6, mean_calls="5.0")
    assert written == [
        "samples: 0 of 8, loop steps 3",
        "samples: 2 of 8, loop steps 3, mean calls 4.5, 0:02:00 left",
        "samples: 8 of 8, loop steps 3, mean calls 5.0",
    ]


def test_the_iterator_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(progress([3, 1], total=2, label="rows", fields=lambda item: {"loss": item}))
    assert found == [3, 1]
    assert capsys.readouterr().err == "rows: 2 of 2, loss 1\n"


def test_work_that_is_broken_off_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Recorded(Meter):
        def close(self) -> None:
            closed.append("closed")

    monkeypatch.setattr(module, "meter", lambda *_: Recorded())
    for item in progress(range(9), total=9, label="rows"):
        if item == 3:
            break
    assert closed == ["closed"]


def test_what_is_not_shown_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    announce("device: cpu")
    with meter(1, "rows", shown=False) as made:
        made.advance(1, loss=2)
    assert list(progress([1], total=1, label="rows", fields=lambda _: pytest.fail("in vain"), shown=False)) == [1]
    with Parts(shown=False) as parts:
        parts("bound", 1, 1)
    drop_announced()
    assert capsys.readouterr() == ("", "")


def test_parts_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with Parts() as parts:
        for label in ("bound", "ODE"):
            for done in (2, 3):
                parts(label, done, 3)
    assert capsys.readouterr().err == "bound: 3 of 3\nODE: 3 of 3\n"


def test_what_is_announced_comes_before_the_first_progress_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    announce("device: cpu")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        meter(1, "rows").advance(1)
    assert capsys.readouterr().err == "device: cpu\nrows: 1 of 1\nrows: 1 of 1\n"


def test_a_terminal_gets_a_bar_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with meter(3, "samples") as made:
        assert isinstance(made, Bar)
        for count in range(3):
            made.advance(1, mean_calls=count)
        made.advance(0)
        shown = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "samples" in shown
    assert "0/3" in shown
    last = sys.stderr.getvalue().split("\r")[-1]  # pyright: ignore[reportAttributeAccessIssue]
    assert last.strip() == ""


@pytest.mark.parametrize(("columns", "kind"), [(80, Bar), (0, Lines)])
def test_a_terminal_without_a_width_gets_lines(
    columns: int, kind: type[Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(terminal, "fileno", lambda: 2)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    monkeypatch.setattr(sys, "stderr", terminal)
    with meter(1, "rows") as made:
        assert isinstance(made, kind)


@pytest.mark.parametrize(("config", "kind"), [({"IPKernelApp": {}}, Bar), ({}, Lines)])
def test_a_notebook_gets_a_bar_and_a_plain_python_lines(
    config: dict, kind: type[Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with meter(2, "samples") as made:
        assert isinstance(made, kind)
