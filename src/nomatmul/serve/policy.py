"""Whose turn it is, and how much of a prompt fits into a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")

LEAST_CHUNK = 8  # tokens of prompts that a step takes, however slow the model is
FIRST_CHUNK = 32  # before the speed is known; a chunk is at most twice the longest one before
SHARE = 0.8  # of the time of a step that is aimed at, since no two steps take the same
SCORED_CHUNK = 128  # tokens at most whose logits are all in memory


class Turns:
    """Round robin: of those that are asked for, who was served longest ago.

    A newcomer stands behind whoever waits, and before whoever was served since it came.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._served: dict[str, int] = {}

    def served(self, client: str) -> None:
        """Put a client behind all others."""
        self._clock += 1
        self._served[client] = self._clock

    def order(self, clients: Collection[str]) -> list[str]:
        """All clients that wait, the one whose turn it is first; others are forgotten."""
        self._served = {client: self._served.get(client, self._clock) for client in clients}
        return sorted(clients, key=self._served.__getitem__)


class FairQueue(Generic[T]):
    """Things that wait, in order for one client, in turn for several."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._turns = Turns()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, client: str) -> bool:
        """Whether something of a client waits."""
        return client in self._waiting

    def push(self, client: str, item: T) -> None:
        """Add something behind all else of its client."""
        self._waiting.setdefault(client, deque()).append(item)
        self._count += 1

    def first(self, running: Mapping[str, int]) -> tuple[str, T]:
        """(client, its first thing), of the client with the least that runs already; of equal ones
        of that which was served longest ago. It stays in the queue until `remove`."""
        order = self._turns.order(self._waiting)
        client = min(order, key=lambda name: running.get(name, 0))
        self._turns.served(client)
        return client, self._waiting[client][0]

    def remove(self, client: str, item: T) -> bool:
        """Take something out; False where it is not there."""
        queue = self._waiting.get(client)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        self._count -= 1
        if not queue:
            del self._waiting[client]
        return True

    def clear(self) -> list[T]:
        """Take everything out."""
        found = [item for queue in self._waiting.values() for item in queue]
        self._waiting, self._turns, self._count = {}, Turns(), 0
        return found


class Pace:
    """How many tokens of prompts go into a step beside the streams, from the measured speed.

    A step takes `step_seconds`, or, where that is longer, as long as the streams with LEAST_CHUNK
    tokens of prompts take: so long is a stream held up by prompts at most. The first steps of a
    model are short while its speed is being learned.
    """

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._streams: dict[int, float] = {}  # seconds of a step by its streams, without prompts
        self._token: dict[bool, float] = {}  # seconds a prompt's token, whether it is scored
        self._longest = {False: FIRST_CHUNK // 2, True: FIRST_CHUNK // 2}
        self.last = 0.0  # seconds of the last step

    def chunk(self, streams: int, scored: bool = False) -> int:
        """Tokens of prompts for the next step."""
        most = 2 * self._longest[scored]
        if scored:
            most = min(most, SCORED_CHUNK)
        if scored in self._token:
            room = SHARE * self._step_seconds - self._of_streams(streams)
            most = min(most, int(room / self._token[scored]))
        return max(LEAST_CHUNK, most)

    def measured(self, streams: int, tokens: int, scored: bool, seconds: float) -> None:
        """Note how long a step took."""
        self.last = seconds
        if not tokens:
            self._streams[streams] = _mean(self._streams.get(streams), seconds)
            return
        # the layers' weights are read once for all: streams beside prompts cost less than alone
        spent = max(seconds - self._of_streams(streams), seconds / (1 + streams))
        self._token[scored] = _mean(self._token.get(scored), spent / tokens)
        self._longest[scored] = max(self._longest[scored], tokens)

    def _of_streams(self, streams: int) -> float:
        """Seconds of a step of so many streams, or of the nearest number that is known."""
        if not streams or not self._streams:
            return 0.0
        if streams not in self._streams:
            streams = min(self._streams, key=lambda known: abs(known - streams))
        return self._streams[streams]


def _mean(old: float | None, new: float) -> float:
    """A moving mean that believes bad news sooner than good ones."""
    if old is None:
        return new
    return old + (new - old) * (0.5 if new > old else 0.1)


class Rate:
    """How fast jobs begin, and so when one that finds no place may come again."""

    LEAST, MOST = 1.0, 60.0  # seconds

    def __init__(self) -> None:
        self._last: float | None = None
        self._between: float | None = None

    def note(self, now: float) -> None:
        """A job has left the queue."""
        if self._last is not None:
            self._between = _mean(self._between, min(now - self._last, self.MOST))
        self._last = now

    def wait(self, waiting: int) -> float:
        """Whole seconds until about half of those that wait have begun."""
        guess = (self._between or 0.0) * waiting / 2
        return float(round(min(max(guess, self.LEAST), self.MOST)))
