"""The one exception for bad input."""

from __future__ import annotations


class CdlmError(Exception):
    """Bad input: one line that says what was expected, what came and what to change.

    The command line prints the line and exits with code 2; from Python it is an ordinary exception.
    """

    exit_code = 2
    """Of the command line."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
