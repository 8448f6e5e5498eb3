"""Checks of settings, with one form of message: `Patience needs a whole number steps >= 1, got 0`.

Each function takes any number of settings by name, `check_whole("Patience", steps=self.steps)`, and a `hint` that says
what to write instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from cdlm.core.errors import CdlmError

Number = int | float


def check_whole(owner: str, /, *, least: int = 1, optional: bool = False, hint: str = "", **settings: object) -> None:
    """Raise unless each setting is an integer of at least `least`; if `optional`, None passes too."""
    for name, value in settings.items():
        if optional and value is None:
            continue
        if type(value) is not int or value < least:
            raise _error(f"{owner} needs a whole number {name} >= {least}", value, hint)


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
    if isinstance(value, int) and abs(value) >= 2**63:  # no tensor takes it
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
    return CdlmError(f"{expected}, got {value!r}{f': {hint}' if hint else ''}")
