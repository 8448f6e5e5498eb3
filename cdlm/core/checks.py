"""Checks of settings, with one form of message: `Patience needs a whole number steps >= 1, got 0`.

Each function takes any number of settings by name, `check_whole("Patience", steps=self.steps)`, and a `hint` that says
what to write instead.
"""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from cdlm.core.errors import CdlmError

Number = int | float


LARGEST = 2**63 - 1
"""The largest whole number that a tensor holds."""
MOST_STEPS, MOST_ROWS, MOST_DEVICES, MOST_LAYERS, MOST_FEATURES = 10**6, 10**7, 1024, 10**4, 2**20
"""Ends of settings whose work has no other end: a larger number is a slip, and would hang."""


def check_whole(
    owner: str, /, *, least: int = 1, largest: int = LARGEST, optional: bool = False, hint: str = "", **settings: object
) -> None:
    """Raise unless each setting is an integer from `least` to `largest`; if `optional`, None passes too."""
    for name, value in settings.items():
        if optional and value is None:
            continue
        if type(value) is not int or not least <= value <= largest:
            large = type(value) is int and value > largest
            expected = f"{name} <= {largest}" if large else f"{name} >= {least}"
            raise _error(f"{owner} needs a whole number {expected}", value, hint)


def check_number(
    owner: str, /, *, above: Number = -math.inf, least: Number = -math.inf, below: Number = math.inf,
    most: Number = math.inf, infinite: bool = False, optional: bool = False, hint: str = "", **settings: object,
) -> None:  # fmt: skip
    """Raise unless each setting is a number in a range. NaN is in none.

    Args:
        above, below: ends of the range that it does not contain.
        least, most: ends that it contains.
        infinite: infinities pass, if the range contains them.
        optional: None passes too.
    """
    ends = above, least, below, most
    for name, value in settings.items():
        if optional and value is None:
            continue
        if not _inside(value, *ends, infinite):
            expected = _range(name, *ends)
            finite = "" if infinite or expected.count("<") == 2 else "finite "
            raise _error(f"{owner} needs a {finite}number {expected}", value, hint)


def check_flag(owner: str, /, **settings: object) -> None:
    """Raise unless each setting is True or False."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise _error(f"{owner} needs {name} to be True or False", value, "")


def check_choice(owner: str, choices: Collection[object], /, *, hint: str = "", **settings: object) -> None:
    """Raise unless each setting is one of the choices."""
    for name, value in settings.items():
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _error(f"{owner} needs {name} to be one of {', '.join(map(str, choices))}", value, hint)


def check_object(owner: str, kind: type, /, **settings: object) -> None:
    """Raise unless each setting is an object of that kind, and not its text or its class."""
    for name, value in settings.items():
        if not isinstance(value, kind):
            raise _error(f"{owner} needs {name} to be a {kind.__name__}", value, "make the object itself")


def _inside(value: object, above: Number, least: Number, below: Number, most: Number, infinite: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, int) and abs(value) > LARGEST:  # no tensor takes it
        return False
    low = value > above if above > -math.inf else value >= least
    high = value < below if below < math.inf else value <= most
    return low and high and (infinite or -math.inf < value < math.inf)


def _range(name: str, above: Number, least: Number, below: Number, most: Number) -> str:
    """The name between its ends, such as `nats > 0` or `0 <= warmup < 1`."""
    high = f" < {below:g}" if below < math.inf else f" <= {most:g}" if most < math.inf else ""
    if high:
        low = f"{above:g} < " if above > -math.inf else f"{least:g} <= " if least > -math.inf else ""
        return low + name + high
    return name + (f" > {above:g}" if above > -math.inf else f" >= {least:g}" if least > -math.inf else "")


def _error(expected: str, value: object, hint: str) -> CdlmError:
    return CdlmError(f"{expected}, got {shown(value)}{f': {hint}' if hint else ''}")


def shown(value: object, most: int = 80) -> str:
    """A value as errors show it: in one line, and short."""
    if type(value) is int and value.bit_length() > 128:  # too long to be written out
        return f"a number of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever another's repr raises
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


class Settings:
    """Base of frozen dataclasses that people write: a value must be of the type that its field declares.

    A whole number is a number too, a truth is neither, and a list may stand for a tuple. A type that is none of the
    plain ones (numbers, texts, truths, choices, sequences of these, classes) is not checked. The check comes before
    those of ranges in `__post_init__`, which may compare numbers.
    """

    if not TYPE_CHECKING:  # a type checker is to read the constructor

        def __new__(cls, *args: Any, **settings: Any) -> Any:
            hints = _hints(cls)
            for name, value in (dict(zip(hints, args, strict=False)) | settings).items():
                if name in hints and not _is(value, hints[name]):
                    raise _error(f"{cls.__name__} needs {name} to be {_words(hints[name])}", value, "")
            return super().__new__(cls)


@cache
def _hints(kind: type[Any]) -> Mapping[str, Any]:
    """The types of what a dataclass is made from, in order; nothing of other classes, and of names that are not known
    where the class is defined."""
    if not is_dataclass(kind):
        return {}
    try:
        hints = get_type_hints(kind)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def _is(value: object, hint: Any) -> bool:
    """Whether a value is of a type, as far as that is one of the plain ones."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (tuple, list, Sequence):
        items = {part for part in parts if part is not ...}
        one = len(items) == 1
        return isinstance(value, list | tuple) and (not one or all(_is(item, *items) for item in value))
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> str:
    """A type in words, such as "a whole number or None"."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (tuple, list, Sequence):
        return "a list"
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "None"}
    return plain.get(hint, f"a {getattr(hint, '__name__', hint)}")
