"""What rendering a chat template may cost: steps, time, and characters of what it makes."""

from __future__ import annotations

import contextvars
import time
from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any

MAX_SECONDS = 1.0  # of computing
MAX_STEPS = 1_000_000
MAX_SIZE = 1 << 23  # characters (and entries) of one value, and of the whole output
MAX_TOTAL = 1 << 27  # of all values that were ever made

_CONTAINERS = (list, tuple, dict, set, KeysView, ValuesView, ItemsView)


class UnsafeTemplate(ValueError):
    """A template did what it may not do, or would have cost too much."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps, self._total = MAX_STEPS, MAX_TOTAL
        self._end = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        """Count one step; raises UnsafeTemplate when there were too many or they took too long."""
        self._steps -= 1
        if self._steps < 0:
            raise UnsafeTemplate(f"it takes more than {MAX_STEPS:,} steps")
        if time.thread_time() > self._end:
            raise UnsafeTemplate(f"it computes for more than {MAX_SECONDS} seconds")

    def charge(self, value: Any) -> Any:
        """Count a value that was made and return it; raises UnsafeTemplate if it is too large."""
        self.step()
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, _CONTAINERS):
            self.spend(self._weight(value, 0))
        elif isinstance(value, int) and value.bit_length() > 64:
            raise UnsafeTemplate("it makes a number of more than 64 bits")
        return value

    def spend(self, size: int) -> None:
        """Count characters or entries; raises UnsafeTemplate when there are too many."""
        self._total -= size
        if size > MAX_SIZE or self._total < 0:
            raise UnsafeTemplate(f"it makes texts or lists of more than {MAX_SIZE:,} characters")

    def _weight(self, value: Any, depth: int) -> int:
        """Characters and entries of a container, each as often as it is reached."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, _CONTAINERS):
            return 1
        if depth > 64:
            raise UnsafeTemplate("it nests lists more than 64 deep")
        pairs = value.items() if isinstance(value, dict) else value
        total = 1
        for entry in pairs:
            self.step()
            total += 1 + self._weight(entry, depth + 1)
            if total > MAX_SIZE:
                break
        return total


budget_of_now: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")
