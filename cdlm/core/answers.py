"""Answers that stand in texts: the parsers that votes, rules and marks read them with, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

MARK = "####"
"""Stands before the answer, as in GSM8K."""
BOX = "\\boxed{"
"""Opens an answer, as in MATH."""

_NUMBER = re.compile(r"(-?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.([0-9]*))?")
_WITHIN = re.compile(r"-?\$?[0-9][0-9,]*(?:\.[0-9]+)?")


def number_of(text: str) -> str | None:
    """One spelling for each number; None if the text is not a number."""
    match = _NUMBER.fullmatch(text.replace("$", "").strip())
    if match is None:
        return None
    sign, whole, fraction = match[1], match[2].replace(",", "").lstrip("0") or "0", (match[3] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number


def answer_of(text: str) -> str | None:
    """The number that a text gives as its answer: all that follows the first "####" on its line.

    Blanks around it, "$" and the commas of thousands do not count, nor do zeros that change nothing: "$1,200.0",
    "1200." and "01200" are "1200". None if there is no mark or no number, or something else beside the number.
    """
    _, mark, rest = text.partition(MARK)
    return number_of(re.split(r"[\r\n]", rest, maxsplit=1)[0]) if mark else None


def last_number(text: str) -> str | None:
    """The last number of a text; None if there is none."""
    found = [number for part in _WITHIN.findall(text) if (number := number_of(part.rstrip(","))) is not None]
    return found[-1] if found else None


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text, without blanks around it; None if there is none, or if it is
    empty or does not close."""
    _, box, rest = text.rpartition(BOX)
    depth = 1
    for place, char in enumerate(rest if box else ""):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[:place].strip() or None
    return None


PARSERS: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {"marked": answer_of, "number": last_number, "boxed": boxed}
)
"""What reads the answer of a text, by name: a number behind "####", the last number, or what is boxed."""
