"""SIGTERM and Ctrl-C: raised at once while data is prepared, remembered while a step runs."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """Raised by a signal outside the training loop, where nothing needs to be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Context manager that turns the two signals into `requested`.

    While `deferred` is False a signal raises `Stopped`; while True it only sets `requested`, and
    the second Ctrl-C raises. In a thread that is not the main one nothing is installed.
    echo: seconds in which a second Ctrl-C is taken for the first one again, as torchrun sends it
    to processes that have had it from the terminal.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.requested: int | None = None
        self.deferred = False
        self.echo = echo
        self._at = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None and number == signal.SIGINT
        if again and time.monotonic() - self._at < self.echo:
            return
        self.requested, self._at = number, time.monotonic()
        if not self.deferred or again:
            raise Stopped(number)
