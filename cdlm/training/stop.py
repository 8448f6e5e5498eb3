"""Stopping on request: SIGTERM and Ctrl-C end a run between two optimiser steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from cdlm.core.errors import CdlmError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(CdlmError):
    """The run was asked to stop and can be resumed. `signal` is the number of the signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
        self.exit_code = 128 + signal


class StopRequest:
    """Remembers a signal; a second Ctrl-C raises KeyboardInterrupt at once. As a context, it restores the handlers.

    Outside the main thread, where Python allows no handlers, it never hears anything.
    """

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that came, or 0."""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._former = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def listen(self) -> None:
        """From here on; the trainer's own handlers, registered since, would stop amid an accumulation."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._former.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
