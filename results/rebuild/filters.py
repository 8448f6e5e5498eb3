"""How numbers look in pages. A value of None raises `Missing`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cdlm.core.errors import CdlmError


class Missing(CdlmError):
    """A number that was not measured: a dash in a table, an error in a sentence."""


def number(value: Any, digits: int = 2, sign: bool = False) -> str:
    """`0.93`."""
    return f"{_single(value):{'+' if sign else ''}.{digits}f}"


def percent(value: Any, digits: int = 1, sign: bool = False) -> str:
    """A share as `94.6 %`."""
    return f"{number(100 * _single(value), digits, sign)} %"


def interval(value: Any, ends: Sequence[float | None] | None, digits: int = 2, percent: bool = False,
             sign: bool = False) -> str:  # fmt: skip
    """`0.93 [0.91, 0.96]`; without known ends the value alone."""
    scale, unit = (100, " %") if percent else (1, "")
    shown = f"{number(scale * _single(value), digits, sign)}{unit}"
    if ends is None or None in ends:
        return shown
    return f"{shown} [{', '.join(number(scale * _single(end), digits, sign) for end in ends)}]"


def spread(values: Any, digits: int = 2, percent: bool = False) -> str:
    """Mean and sample standard deviation as `1.18 ± 0.02`; of equal values, or of one, the value alone."""
    scale, unit = (100, " %") if percent else (1, "")
    found = [scale * _single(value) for value in (values if isinstance(values, list) else [values])]
    mean = number(statistics.fmean(found), digits)
    return f"{mean}{unit}" if len(set(found)) == 1 else f"{mean} ± {number(statistics.stdev(found), digits)}{unit}"


def spread_of(value: Any, deviation: float | None, digits: int = 2) -> str:
    """`0.94 ± 0.01`, of a mean and its deviation; without one the mean alone."""
    return number(value, digits) if deviation is None else f"{number(value, digits)} ± {number(deviation, digits)}"


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float:
    """Spearman's coefficient of two lists in one order: 1 is the same ranking. Equal values share their mean rank."""
    ranks = [_ranks([_single(value) for value in each]) for each in (values, others)]
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def plain(value: Any) -> str:
    """A value as it is, a number to four digits."""
    if value is None:
        raise Missing("there is no such number")
    if isinstance(value, list | dict):
        raise CdlmError(f"expected one value, got {value!r}: use a filter such as spread")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _single(value: Any) -> float:
    if value is None:
        raise Missing("expected a number, but it was not measured: it is null in the table")
    if isinstance(value, list):
        raise CdlmError(f"expected one number, got {len(value)} that differ: use spread")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CdlmError(f"expected a number, got {value!r}")
    return value


FILTERS: Mapping[str, Callable[..., Any]] = {
    "number": number, "percent": percent, "interval": interval, "spread": spread, "spread_of": spread_of,
    "rank_correlation": rank_correlation,
}  # fmt: skip
