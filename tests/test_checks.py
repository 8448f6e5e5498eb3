"""Laws of the checks of settings: what passes, and one form of message."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.checks import LARGEST, Settings, check_choice, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.halting import Full

numbers = st.floats() | st.integers(-LARGEST, LARGEST)  # larger ones fit no tensor, and are refused


def passes(check: object, *args: object, **settings: object) -> bool:
    try:
        check(*args, **settings)  # type: ignore[operator]
    except CdlmError:
        return False
    return True


@given(value=st.integers(-5, 5) | st.booleans() | st.floats() | st.text() | st.none(), least=st.integers(-3, 3))
def test_whole_numbers_are_integers_from_the_least_on(value: object, least: int) -> None:
    whole = type(value) is int and value >= least
    assert passes(check_whole, "x", least=least, n=value) == whole
    assert passes(check_whole, "x", least=least, optional=True, n=value) == (whole or value is None)


@given(value=numbers, low=st.floats(-5, 5), high=st.floats(-5, 5))
def test_a_range_contains_its_closed_ends_and_not_its_open_ones(value: float, low: float, high: float) -> None:
    assert passes(check_number, "x", above=low, below=high, n=value) == (low < value < high)
    assert passes(check_number, "x", least=low, most=high, n=value) == (low <= value <= high)
    assert passes(check_number, "x", above=low, most=high, n=value) == (low < value <= high)
    finite = -math.inf < value < math.inf
    assert passes(check_number, "x", least=low, n=value) == (finite and value >= low)
    assert passes(check_number, "x", below=high, infinite=True, n=value) == (value < high)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, [1.0], 1j])
def test_other_values_are_no_numbers(value: object) -> None:
    assert not passes(check_number, "x", infinite=True, n=value)


@pytest.mark.parametrize("value", [LARGEST + 1, -LARGEST - 1, 10**30])
def test_whole_numbers_that_fit_no_tensor_are_no_numbers(value: int) -> None:
    assert not passes(check_number, "x", n=value)
    assert not passes(check_number, "x", infinite=True, n=value)


def test_infinities_pass_where_they_may() -> None:
    assert passes(check_number, "x", infinite=True, a=math.inf, b=-math.inf)
    assert not passes(check_number, "x", a=math.inf)
    assert passes(check_number, "x", optional=True, a=None, b=10**18)
    assert not passes(check_number, "x", b=10**400)  # no float holds it, and no tensor


def test_a_choice_is_one_of_them_in_its_own_type() -> None:
    assert passes(check_choice, "x", ("a", "b"), n="b")
    assert passes(check_choice, "x", (True, False), n=False)
    assert not passes(check_choice, "x", (True, False), n=0)
    assert not passes(check_choice, "x", ("a",), n=["a"])


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (lambda: check_whole("Patience", steps=0), "Patience needs a whole number steps >= 1, got 0"),
        (lambda: check_number("KL", above=0.0, nats=-1.0), "KL needs a finite number nats > 0, got -1.0"),
        (lambda: check_number("KL", least=0.0, below=1.0, w="a"), "KL needs a number 0 <= w < 1, got 'a'"),
        (lambda: check_number("f", infinite=True, tau=None), "f needs a number tau, got None"),
        (lambda: check_number("f", most=3.0, hint="try 2", a=1.0, b=4), "f needs a finite number b <= 3, got 4: try 2"),
        (lambda: check_choice("f", ("a", "b"), kind="c"), "f needs kind to be one of a, b, got 'c'"),
    ],
)
def test_messages_have_one_form(check: object, expected: str) -> None:
    with pytest.raises(CdlmError) as caught:
        check()  # type: ignore[operator]
    assert str(caught.value) == expected


@dataclass(frozen=True)
class Everything(Settings):
    whole: int = 1
    number: float = 1.0
    truth: bool = False
    text: str = ""
    choice: Literal["a", "b"] = "a"
    several: tuple[int, ...] = ()
    perhaps: int | None = None
    part: Settings | None = None
    unchecked: Mapping[str, int] | None = None


FITS: dict[str, Sequence[object]] = {
    "whole": (1, -5, 10**30), "number": (1, 1.5, math.nan), "truth": (True, False), "text": ("", "x"),
    "choice": ("a", "b"), "several": ((1, 2), [1], ()), "perhaps": (3, None), "part": (Full(), None),
    "unchecked": ({}, 3),
}  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, 1, 1.5, 10**30, math.nan, "", "x", "a", b"x", [], (1,), [1], ["x"], {}, object(), int, len, 1j, Full(),
    Full,
)  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_a_setting_is_of_the_type_that_it_declares(name: str) -> None:
    for value in FITS[name]:
        Everything(**{name: value})  # pyright: ignore[reportArgumentType]
    kinds: dict[str, tuple[type, ...]] = {"whole": (int,), "number": (int, float), "truth": (bool,), "text": (str,)}
    for value in VALUES if name in kinds else ():
        right = isinstance(value, kinds[name]) and (name == "truth" or not isinstance(value, bool))
        if not right:
            with pytest.raises(CdlmError, match=f"^Everything needs {name} to be a? ?.*, got "):
                Everything(**{name: value})  # pyright: ignore[reportArgumentType]


def test_settings_are_checked_by_place_and_when_they_are_replaced() -> None:
    with pytest.raises(CdlmError, match="Everything needs number to be a number, got 'x'"):
        Everything(1, "x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CdlmError, match="Everything needs choice to be one of a, b, got 'c'"):
        replace(Everything(), choice="c")
    with pytest.raises(CdlmError, match="Everything needs several to be a list"):
        Everything(several="12")  # pyright: ignore[reportArgumentType]


def test_a_long_value_is_cut_in_a_message() -> None:
    for value in (10**10_000, "x" * 10_000, [1] * 10_000):
        with pytest.raises(CdlmError) as caught:
            Everything(truth=value)  # pyright: ignore[reportArgumentType]
        assert len(str(caught.value)) < 200
