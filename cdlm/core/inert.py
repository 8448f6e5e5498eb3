"""Names and texts that come from files, made harmless where they are shown: on a terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters but for tab and line feed, marks that turn the direction of text, and halves of characters."""


def visible(text: str) -> str:
    r"""The text with every control character written as an escape such as \x1b, so that it moves no cursor."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The text in one line, visible."""
    return " ".join(visible(text).split("\n"))


def shortened(text: str, most: int = 600) -> str:
    """The text without its middle if it is longer than `most`: what was wrong stands at its ends."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def in_markdown(text: str) -> str:
    """The text as part of one line of Markdown: no new lines, tags, links or pictures."""
    line = one_line(text).replace("\\", "\\\\").replace("](", "]\\(")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line).replace("://", "&#58;//").replace("www.", "www&#46;")


def table_line(cells: Iterable[object]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(in_markdown(str(cell)).replace('|', chr(92) + '|') for cell in cells)} |"


def fenced(text: str, language: str) -> str:
    """A block of code in Markdown whose text cannot end it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text).strip()}\n{fence}"


class Inert:
    """A stream for people that shows control characters as escapes; all else is as in the stream that it wraps."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, visible."""
        return int(self._stream.write(visible(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
