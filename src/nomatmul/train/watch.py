"""A thread that notices when the processes of a run no longer get on.

Each process writes a sign of life into the store that torchrun keeps for them: a counter that its
thread moves twice a second, and what its main thread does. So a process can say which other one is
gone (its counter stands still) or stuck (its work does not change), also while its own main thread
waits for a device that waits for the lost one.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_EVERY = 0.5  # seconds between two signs of life
_STANDS_STILL = 6 * _EVERY  # without a sign for so long a process is gone, if something failed
_PATIENCE = 5.0  # seconds for the main thread to end by itself after another process failed

FAILED = "failed"


class Watch:
    """Signs of life of `size` processes, and the time limit of what this one waits for.

    store: a c10d store, used by this thread only. timeout: seconds that an operation may take.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        # Whether SIGTERM has come: torchrun sends it when another process has died.
        self.terminated: Callable[[], bool] = lambda: False
        self.operation = "starting"
        self._since: float | None = None  # None: may take as long as it likes
        self._beats: dict[int, tuple[str, str, float]] = {}
        self._failed_at: float | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()  # the store answers one question at a time
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def begin(self, operation: str, *, limited: bool = True) -> None:
        """The main thread starts something else."""
        self.operation = operation
        self._since = time.monotonic() if limited else None

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join(5)

    def lost(self) -> str:
        """Which processes show no life, in words; waits a few seconds to be sure. May be empty."""
        time.sleep(_STANDS_STILL + 2 * _EVERY)
        now = time.monotonic()
        silent = [
            rank for rank, (_, _, at) in sorted(self._beats.items()) if now - at > _STANDS_STILL
        ]
        never = [rank for rank in range(self._size) if rank not in self._beats]
        return _names([rank for rank in {*silent, *never} if rank != self._rank])

    def others(self) -> str:
        """What the other processes do, in words."""
        return "; ".join(
            f"rank {rank} is in {operation}"
            for rank, (_, operation, _) in sorted(self._beats.items())
        )

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(_EVERY):
            count += 1
            try:
                self._exchange(count)
            except Exception:  # the store is gone: torchrun or the process that kept it has ended
                if self._overdue(_PATIENCE):
                    self._leave(f"the store of the run is gone in {self.operation}")
                continue
            self._judge()

    def _exchange(self, count: int) -> None:
        with self._lock:
            self._store.set(f"life/{self._rank}", f"{count}|{self.operation}")
            now = time.monotonic()
            for rank in range(self._size):
                key = f"life/{rank}"
                if rank == self._rank or not self._store.check([key]):
                    continue
                beat, _, operation = self._store.get(key).decode().partition("|")
                if rank not in self._beats or self._beats[rank][0] != beat:
                    self._beats[rank] = (beat, operation, now)
            if self._failed_at is None and self._store.check([FAILED]):
                self._failed_at = now

    def _judge(self) -> None:
        now = time.monotonic()
        if self._failed_at is not None and now - self._failed_at > _PATIENCE:
            os._exit(1)  # the one that failed has reported why
        silent = {rank: now - at for rank, (_, _, at) in self._beats.items()}
        dead = [rank for rank, seconds in silent.items() if seconds > self._timeout]
        if dead:
            self._leave(
                f"{_names(dead)} gave no sign of life for {self._timeout:g} s in {self.operation}"
            )
        gone = [rank for rank, seconds in silent.items() if seconds > _STANDS_STILL]
        if gone and self.terminated() and self._overdue(_PATIENCE):
            self._leave(f"{_names(gone)} was lost in {self.operation}")
        if self._overdue(self._timeout + _PATIENCE):
            self._leave(f"{self.operation} did not end within {self._timeout:g} s; {self.others()}")

    def _overdue(self, limit: float) -> bool:
        return self._since is not None and time.monotonic() - self._since > limit

    def _leave(self, reason: str) -> None:
        """End the process: its main thread waits for something that never comes."""
        try:
            first = self._store.add("failures", 1) == 1
            if first:
                self._store.set(FAILED, reason)
        except Exception:  # without a store nobody can be asked
            first = True
        if first:
            print(f"nomatmul: error: rank {self._rank}: {reason}{INTACT}", file=sys.stderr)
            sys.stderr.flush()
        os._exit(1)


INTACT = "; the last checkpoint is intact, the same command continues from it"


def _names(ranks: list[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in sorted(ranks))
