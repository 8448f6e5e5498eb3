"""What plain values from a file must look like: one kind for each file, checked when it is read.

A kind is a type of Python: a dataclass, a `TypedDict`, `list[Whole]`, `Literal["a", "b"]`. A truth is no number, a text
is no number, and 1.0 is no whole number. Constructors of dataclasses run their own checks.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, TypeVar

from msgspec import Meta, ValidationError, convert

from cdlm.core.errors import CdlmError

T = TypeVar("T")

Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A whole number that a tensor can hold, >= 0."""
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""The same, >= 1."""
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A number; neither infinite nor NaN."""


def checked(value: Any, kind: type[T] | Any, place: str, advice: str) -> T:
    """The value as one of that kind.

    Args:
        value: mappings, lists, texts, numbers, truths and None, as a file has them.
        kind: the type that it must have.
        place: the file, and the line if it has many, for the error.
        advice: what to do if it is another.

    Raises:
        CdlmError: `PLACE: expected ... in 'FIELD'; ADVICE`.
    """
    try:
        return convert(value, kind)
    except (ValidationError, AttributeError, UnicodeEncodeError, RecursionError, OverflowError) as error:
        raise CdlmError(f"{place}: {_in_words(str(error))}; {advice}") from error


_WORDS = {
    "int": "whole number", "float": "number", "str": "text", "bool": "truth", "array": "list", "null": "nothing",
    "|": "or",
    f"<= {2**63 - 1}": "< 2**63", f">= {-sys.float_info.max}": "that is finite",
    f"<= {sys.float_info.max}": "that is finite", "object missing required field": "expected a field",
    "object contains unknown field": "unknown field", "invalid enum value": "unknown choice",
}  # fmt: skip
"""What the library says, and what we say."""


def _in_words(message: str) -> str:
    """The library's message in our words, with the path `$.a.b[2]` as `a.b[2]`."""
    what, _, path = message.partition(" - at `$")
    what = what[:1].lower() + what[1:].replace("`", "")
    for theirs, ours in _WORDS.items():
        what = re.sub(rf"(?<!\w){re.escape(theirs)}(?!\w)", ours, what)
    return f"{what} in {path.rstrip('`').lstrip('.')!r}" if path else what
