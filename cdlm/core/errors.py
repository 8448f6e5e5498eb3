"""The one exception for bad input."""

from __future__ import annotations

from cdlm.core.inert import shortened


class CdlmError(Exception):
    """Bad input: one line that says what was expected, what came and what to change.

    The command line prints the line and exits with code 2; from Python it is an ordinary exception.
    """

    exit_code = 2
    """Of the command line."""

    def __init__(self, line: str = ""):
        super().__init__(" ".join(line.splitlines()))  # of what came there may be several


def first_line(error: Exception) -> str:
    """What another library's error says, in one line without a full stop; some repeat whole files."""
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."), 300)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether another library's error says that there is no more memory."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
