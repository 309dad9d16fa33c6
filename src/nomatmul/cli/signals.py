"""What a command does when it is told to end."""

from __future__ import annotations

import signal
from typing import Any


def clean_up_when_terminated() -> None:
    """A terminated run, or one whose terminal has gone, cleans up like an interrupted one."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
