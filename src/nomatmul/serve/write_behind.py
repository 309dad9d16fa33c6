"""Files of one directory, written and removed by a thread of their own."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.safetensors import Buffer

Content = Callable[[], Iterable[Buffer]]

_log = logging.getLogger("nomatmul.serve")


@dataclass
class _Job:
    due: float
    content: Content | None  # None: the file is to go
    droppable: bool = False


class WriteBehind:
    """Writes files whole or not at all, and never lets its caller wait for the disk.

    At most `limit` files wait to be written: the newest push out the oldest. A disk that refuses is
    reported once, in the log; all outcomes are told by `news`.
    """

    def __init__(self, directory: Path, limit: int = 64) -> None:
        self._directory, self._limit = directory, limit
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._news: list[tuple[str, bool]] = []
        self._wake = threading.Condition()
        self._busy: str | None = None
        self._hurry = self._closing = self._warned = False
        self._thread = threading.Thread(target=self._run, name="state-files", daemon=True)
        self._thread.start()

    def write(
        self, name: str, content: Content, delay: float = 0.0, *, needed: bool = False
    ) -> None:
        """Write a file in `delay` seconds or later; `content` is called on the other thread.

        A file of that name that still waits is replaced. needed: nothing pushes it out.
        """
        with self._wake:
            self._put(name, _Job(time.monotonic() + delay, content, not needed))
            waiting = self._waiting()
            if len(waiting) > self._limit:
                del self._jobs[waiting[0]]
                self._news.append((waiting[0], False))

    def remove(self, name: str) -> None:
        """Remove a file, before anything else is written: it makes room."""
        with self._wake:
            self._put(name, _Job(0.0, None))
            self._jobs.move_to_end(name, last=False)

    def cancel(self, name: str) -> bool:
        """Whether a file waited to be written; then it will not be."""
        with self._wake:
            job = self._jobs.get(name)
            if job is None or job.content is None:
                return False
            del self._jobs[name]
            return True

    def news(self) -> list[tuple[str, bool]]:
        """(name, whether it lies there) of each file that was to be written, since last time."""
        if not self._news:  # the usual case costs no lock
            return []
        with self._wake:
            news, self._news = self._news, []
            return news

    def full(self) -> bool:
        """Whether the next file would push one out."""
        with self._wake:
            return len(self._waiting()) >= self._limit

    def _waiting(self) -> list[str]:
        return [name for name, job in self._jobs.items() if job.droppable]

    def wait(self) -> None:
        """Return when everything that was asked for has happened; delays end at once."""
        with self._wake:
            self._hurry = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._jobs and self._busy is None)
            self._hurry = False

    def close(self) -> None:
        """End the thread; what has not begun is not written."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def _put(self, name: str, job: _Job) -> None:
        self._jobs.pop(name, None)
        self._jobs[name] = job
        self._wake.notify_all()

    def _run(self) -> None:
        while (found := self._take()) is not None:
            name, job = found
            there = self._do(name, job)
            with self._wake:
                self._busy = None
                if job.content is not None:
                    self._news.append((name, there))
                job.content = None  # let the state go
                self._wake.notify_all()

    def _take(self) -> tuple[str, _Job] | None:
        """The next job that is due; None when the thread is to end."""
        with self._wake:
            while not self._closing:
                now = time.monotonic()
                for name, job in self._jobs.items():
                    if self._hurry or job.due <= now:
                        del self._jobs[name]
                        self._busy = name
                        return name, job
                soonest = min((job.due for job in self._jobs.values()), default=None)
                self._wake.wait(None if soonest is None else max(soonest - now, 0.001))
            return None

    def _do(self, name: str, job: _Job) -> bool:
        path = self._directory / name
        try:
            if job.content is None:
                path.unlink(missing_ok=True)
                return False
            # no waiting for the disk: whatever the machine's end left is found by its checksum
            write_file(path, job.content(), sync=False)
            return True
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "state directory: cannot write %s: %s; states that are not written stay in"
                    " memory only (said once)", path, error.strerror or error,
                )  # fmt: skip
        except Exception:  # the thread must live: one state is lost, and the log says why
            _log.exception("state directory: cannot write %s", path)
        return False
