"""The text of a few samples in a terminal, drawn again at every step."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from cdlm.core.types import LoopStep
from cdlm.recording.writer import OPEN
from cdlm.sampling.requests import Request
from cdlm.sampling.texts import shown_of, special_of
from cdlm.sampling.watch.pieces import Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cdlm.sampling.session import Model, Onlooker

MOST_SAMPLES = 4
"""Samples that are shown at a time, of those in flight."""
MASK = "_"
NONE = -1
"""In place of a token where there is none yet."""
NEW, UNDECIDED = "\x1b[33m", "\x1b[2m"
"""How a piece is shown that has just changed, and one that may still change while others may not."""
PLAIN = "\x1b[0m"


@runtime_checkable
class Stream(Protocol):
    """What text is written to, such as standard error."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


class Cell(NamedTuple):
    """A piece of text with the sequence that sets its style; empty for none."""

    text: str
    style: str = ""


def onlooker_on(stream: Stream, model: Model, environment: Mapping[str, str] | None = None) -> Onlooker | None:
    """What shows the steps of a model's runs on a stream; None unless that is a terminal that can move its cursor.

    Args:
        environment: variables that say what the terminal can do; by default those of the process.
    """
    environment = os.environ if environment is None else environment
    if not stream.isatty() or environment.get("TERM", "dumb") in ("", "dumb"):
        return None
    # An empty NO_COLOR asks for nothing.
    screen = Screen(stream, colour=not environment.get("NO_COLOR"), size=lambda: _size(stream))
    tokenizer, mask_id, end_ids = model.need_tokenizer(), model.mask_id, model.end_ids
    return lambda steps, requests: watched(steps, requests, Canvas(requests, tokenizer, mask_id, end_ids), screen)


def _size(stream: Stream) -> tuple[int, int]:
    """Columns and lines of a terminal."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except OSError:
        columns, lines = 0, 0
    return columns or 80, lines or 24


def watched(
    steps: Iterable[LoopStep], requests: Sequence[Request], canvas: Canvas, screen: Screen
) -> Generator[LoopStep, None, None]:
    """Pass the steps on, each drawn; what was drawn vanishes in the end."""
    try:
        for step in steps:
            screen.draw(canvas.look(step))
            yield step
    finally:
        screen.clear()


class Canvas:
    """The texts of the samples in flight.

    Args:
        requests: of the run.
        mask_id: of a masked model, of which only what is committed is shown.
        end_ids: tokens at which a text ends.
    """

    def __init__(
        self, requests: Sequence[Request], tokenizer: PreTrainedTokenizerFast, mask_id: int | None = None,
        end_ids: Collection[int] = (),
    ):  # fmt: skip
        self._requests = {request.index: request for request in requests}
        special = special_of(tokenizer)
        shown = {} if special.eos_id is None else {special.eos_id: "\n"}
        self._pieces = Pieces(tokenizer, shown if mask_id is None else {**shown, mask_id: MASK})
        self._mask_id, self._end_ids = mask_id, end_ids
        self._before: dict[int, Int[np.ndarray, " n"]] = {}

    def look(self, step: LoopStep) -> list[tuple[str, list[Cell]]]:
        """A heading and the text of the first samples in flight, by their numbers; the first heading counts all."""
        counts = step.counts
        first = sorted(range(len(counts.row)), key=counts.row.__getitem__)[:MOST_SAMPLES]
        looked = [(f"sample {counts.row[i]}, step {counts.taken[i]}", self._cells(step, i)) for i in first]
        if len(counts.row) > len(first):
            heading, cells = looked[0]
            looked[0] = f"{heading} ({len(counts.row)} samples in flight)", cells
        return looked

    def _cells(self, step: LoopStep, i: int) -> list[Cell]:
        row, request = step.counts.row[i], self._requests[step.counts.row[i]]
        given, before = request.given.numpy(), self._before.get(row)
        start = np.where(given, request.tokens.numpy(), NONE) if before is None else before
        tokens, undecided = self._now(step, i, start)
        tokens, undecided = np.where(given, start, tokens), undecided & ~given
        self._before[row] = tokens
        valid = np.ones(len(tokens), bool) if request.valid is None else request.valid.numpy()
        text = shown_of(tokens[None], given[None], valid[None], self._end_ids)[0]
        changed = np.zeros(len(tokens), bool) if before is None else tokens != before
        texts = [self._pieces.texts[number] for number in self._pieces.of(tokens[text])]
        return [
            Cell(piece, NEW if new else UNDECIDED if open_ else "")
            for piece, new, open_ in zip(texts, changed[text], undecided[text], strict=True)
        ]

    def _now(
        self, step: LoopStep, i: int, before: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """A row after the step, and what of it is undecided while other positions are decided for good."""
        nothing = np.zeros(len(before), bool)
        if step.counts.done[i]:
            return step.tokens[step.counts.leaving.index(i)].cpu().numpy(), nothing
        canvas = None if step.canvas is None else step.canvas[i].cpu().numpy()
        if self._mask_id is not None and canvas is not None:
            return canvas, canvas == self._mask_id
        # Of a run of blocks in a row those before are done, and those after have not begun.
        tokens = np.where(step.state.open[i].cpu().numpy(), step.state.tokens[i].cpu().numpy(), before)
        if canvas is None:
            return tokens, nothing
        return np.where(canvas == OPEN, tokens, canvas), canvas == OPEN


@dataclass
class Screen:
    """The last lines of a terminal, drawn again in the same place.

    Args:
        colour: whether pieces have styles.
        size: columns and lines at the moment.
    """

    stream: Stream
    colour: bool
    size: Callable[[], tuple[int, int]]
    _drawn: int = field(default=0, init=False)
    """Lines that stand there."""

    def draw(self, texts: Sequence[tuple[str, Sequence[Cell]]]) -> None:
        """Draw headings with texts in place of what stands there, as much as there is room for."""
        columns, lines = self.size()
        width, room = max(1, columns - 1), max(2, lines - 1)  # the last column and line would scroll
        texts = texts[: max(1, room // 2)]
        each = max(1, room // max(1, len(texts)) - 1)
        made: list[str] = []
        for heading, cells in texts:
            made += [heading[:width], *wrapped(cells, width, each, self.colour)]
        self._write(made)

    def clear(self) -> None:
        """Take away what stands there."""
        if self._drawn:
            self._write([])

    def _write(self, lines: Sequence[str]) -> None:
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self.stream.write(f"{up}\r\x1b[J" + "".join(f"{line}\n" for line in lines))
        self.stream.flush()
        self._drawn = len(lines)


def wrapped(cells: Iterable[Cell], width: int, most: int, colour: bool = True) -> list[str]:
    """Lines of at most `width` columns, at most `most` of them: of a longer text the beginning, and an ellipsis. Lines
    are broken between words, whose space is left out there, and in words that are longer than a line."""
    lines, line = list[list[Cell]](), list[Cell]()
    for one in (Cell(character, style) for text, style in cells for character in text.replace("\t", " ")):
        columns = columns_of(one.text)
        if one.text == "\n" or (one.text == " " and _columns(line) + 1 > width):
            lines, line = [*lines, line], []
            continue
        if _columns(line) + columns > width:
            spaces = [place for place, cell in enumerate(line) if cell.text == " "]
            end = spaces[-1] if spaces else len(line)
            lines, line = [*lines, line[:end]], line[end + 1 :]
        if columns <= width:
            line.append(one)
    made = [_styled(line, colour) for line in [*lines, line]]
    return made if len(made) <= most else [*made[: most - 1], "..."[:width]]


def _columns(line: Iterable[Cell]) -> int:
    return sum(columns_of(character) for character, _ in line)


def _styled(line: Iterable[Cell], colour: bool) -> str:
    """The text of a line, with styles around what has one."""
    runs = ((style, "".join(cell.text for cell in run)) for style, run in groupby(line, lambda cell: cell.style))
    return "".join(f"{style}{text}{PLAIN}" if style and colour else text for style, text in runs)


def columns_of(character: str) -> int:
    """Columns that a character takes in a terminal: 2 of those that are as wide as high, 0 of marks on others."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
