"""The text in a terminal while it forms: it fits, it is drawn in one place, and it leaves nothing behind."""

import io
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_watch import PROMPT, session_of
from toys import ssd, tokenizer

import cdlm
from cdlm.core.inert import visible
from cdlm.sampling.session import Session
from cdlm.sampling.watch import terminal
from cdlm.sampling.watch.terminal import NEW, PLAIN, UNDECIDED, Canvas, Cell, Screen, columns_of, onlooker_on, wrapped

CHARACTERS = st.sampled_from("ab  \n\t\u4e2d\u0301\U0001f642")
CELLS = st.lists(st.builds(Cell, st.text(CHARACTERS, max_size=9), st.sampled_from(["", NEW, UNDECIDED])), max_size=9)


class Terminal(io.StringIO):
    """A terminal, whose lines are what it shows: it knows the few moves that are used."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.at, self.sent = [""], 0, ""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no file")

    def write(self, text: str) -> int:
        self.sent += text
        parts = text.replace(NEW, "").replace(UNDECIDED, "").replace(PLAIN, "").split("\x1b[")
        self._put(parts[0])
        for part in parts[1:]:
            if part.startswith("J"):
                self.lines[self.at :] = [""]
                self._put(part[1:])
            else:
                count, _, rest = part.partition("A")
                self.at -= int(count)
                assert self.at >= 0
                self._put(rest)
        return len(text)

    def _put(self, text: str) -> None:
        assert "\x1b" not in text
        for k, line in enumerate(text.replace("\r", "").split("\n")):
            if k:
                self.at += 1
                self.lines[self.at :] = [""]
            self.lines[self.at] += line


def width_of(line: str) -> int:
    return sum(map(columns_of, line))


@given(cells=CELLS, width=st.integers(1, 12), most=st.integers(1, 6))
def test_lines_fit_and_hold_the_text(cells: list[Cell], width: int, most: int) -> None:
    lines = wrapped(cells, width, 1000, colour=False)
    assert all(width_of(line) <= width for line in lines)
    text = "".join(cell.text for cell in cells)
    fitting = "".join(c for c in text if columns_of(c) <= width)
    assert "".join("".join(lines).split()) == "".join(fitting.split())
    cut = wrapped(cells, width, most, colour=False)
    assert len(cut) <= most
    assert cut == lines or cut == [*lines[: most - 1], "..."[:width]]


@given(cells=CELLS, width=st.integers(1, 12))
def test_colours_change_no_line(cells: list[Cell], width: int) -> None:
    coloured = wrapped(cells, width, 9)
    bare = [line.replace(NEW, "").replace(UNDECIDED, "").replace(PLAIN, "") for line in coloured]
    assert bare == wrapped(cells, width, 9, colour=False)


def test_words_stay_whole_where_they_fit() -> None:
    assert wrapped([Cell("the cat sat on"), Cell(" the mat")], 8, 9) == ["the cat", "sat on", "the mat"]
    assert wrapped([Cell("abcdefghij k")], 4, 9) == ["abcd", "efgh", "ij k"]


@pytest.mark.parametrize("size", [(80, 24), (40, 8), (3, 2), (1, 1)])
def test_each_drawing_stands_in_the_place_of_the_one_before(size: tuple[int, int]) -> None:
    shown = Terminal()
    screen = Screen(shown, colour=True, size=lambda: size)
    for count in (3, 1, 2):
        screen.draw([(f"sample {k}", [Cell("a few words\n" * (k + 1), NEW)]) for k in range(count)])
        assert len(shown.lines) - 1 <= max(2, size[1] - 1)
        assert shown.lines[0] == "sample 0"[: max(1, size[0] - 1)]
        assert all(width_of(line) <= max(1, size[0] - 1) for line in shown.lines)
    screen.clear()
    assert shown.lines == [""]


def blocks() -> Session:
    """A session whose samples are several runs in a row."""
    model = ssd(len(tokenizer()), block=4)
    model.tokenizer, model.length = tokenizer(), 12
    return cdlm.open_session(model.eval(), steps=5)


@pytest.mark.parametrize("kind", ["continuous", "committed", "masked", "blocks"])
def test_the_last_drawing_of_a_sample_is_its_text(kind: str) -> None:
    session = blocks() if kind == "blocks" else session_of(kind)
    model, last = session.model, dict[int, str]()

    def look(steps, requests):
        canvas = Canvas(requests, model.need_tokenizer(), model.mask_id, model.end_ids)
        for step in steps:
            for row, (heading, cells) in zip(sorted(step.counts.row), canvas.look(step), strict=True):
                assert heading.startswith(f"sample {row}, step ")
                last[row] = "".join(cell.text for cell in cells)
            yield step

    samples = session.with_onlooker(look).run(session.requests([PROMPT], 3))
    assert [last[row] for row in range(3)] == [visible(text) for text in samples.texts]


def test_of_many_samples_the_first_are_drawn_and_the_number_of_all_is_told() -> None:
    session, headings = session_of("continuous"), list[list[str]]()

    def look(steps, requests):
        canvas = Canvas(requests, session.model.need_tokenizer())
        for step in steps:
            headings.append([heading for heading, _ in canvas.look(step)])
            yield step

    session.with_onlooker(look).run(session.requests(n=6))
    assert headings[0] == ["sample 0, step 1 (6 samples in flight)", *(f"sample {k}, step 1" for k in (1, 2, 3))]
    headings.clear()
    session.with_onlooker(look).run(session.requests(n=4))
    assert headings[0] == [f"sample {k}, step 1" for k in range(4)]


@pytest.mark.parametrize("kind", ["continuous", "committed", "masked"])
def test_a_run_that_is_watched_is_the_run_that_is_not(kind: str) -> None:
    session, shown = session_of(kind), Terminal()
    requests = session.requests([PROMPT], 3)
    onlooker = onlooker_on(shown, session.model, {"TERM": "xterm"})
    assert onlooker is not None
    seen = session.with_onlooker(onlooker).run(requests)
    assert seen.texts == session.run(requests).texts
    assert seen.record is None
    assert "sample 2, step 1" in shown.sent
    assert shown.lines == [""]


def test_what_was_drawn_vanishes_when_the_run_breaks_off() -> None:
    session, shown = session_of("continuous"), Terminal()
    steps = session.with_onlooker(lambda steps, _: steps)
    screen = Screen(shown, colour=False, size=lambda: (40, 10))
    requests = session.requests(n=1)
    canvas = Canvas(requests, session.model.need_tokenizer())
    loop = steps.sampling.loop(session.model, steps.options, 4).steps(requests)
    watching = terminal.watched(loop, requests, canvas, screen)
    next(watching)
    assert shown.lines != [""]
    watching.close()
    assert shown.lines == [""]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}, {}])
def test_a_terminal_without_moves_is_left_alone(environment: Mapping[str, str]) -> None:
    assert onlooker_on(Terminal(), session_of("masked").model, environment) is None
    assert onlooker_on(io.StringIO(), session_of("masked").model, {"TERM": "xterm"}) is None


@pytest.mark.parametrize(("value", "coloured"), [("1", False), ("", True)])
def test_no_color_is_honoured(value: str, coloured: bool) -> None:
    session, shown = session_of("masked"), Terminal()
    onlooker = onlooker_on(shown, session.model, {"TERM": "xterm", "NO_COLOR": value})
    assert onlooker is not None
    session.with_onlooker(onlooker).run(session.requests(n=1))
    assert (NEW in shown.sent) == coloured
