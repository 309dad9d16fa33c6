"""Texts that are read before anybody asks for them, while the engine has nothing else to do.

The next turn of a conversation holds the last answer as the tokenizer cuts it, which need not be
the tokens that the model wrote. What waits here gives way to every request: it is no job, and its
tokens are no client's.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from nomatmul.serve.batch import Batch, report
from nomatmul.serve.cuts import TAIL
from nomatmul.serve.policy import LEAST_CHUNK

if TYPE_CHECKING:
    from nomatmul.engine.session import Session

# A request that comes waits for the end of a step: such a part of what a step reads of prompts.
PART = 8


class Text:
    """A text that is to be read, and how far it is.

    boundaries: as of a `Job`. done: how many of its tokens were computed, once it is over, whether
    it was read to its end or had to make room.
    """

    def __init__(self, batch: Batch, ids: tuple[int, ...], boundaries: tuple[int, ...]) -> None:
        self.batch, self.ids = batch, ids
        self.array = np.array(ids, np.int32)
        self.done: Future[int] = Future()
        self._boundaries = (*boundaries, len(ids) - TAIL)
        self._session: Session | None = None  # while it is read
        self._cuts: list[int] = []
        self._at, self._computed, self._unkept = 0, 0, False

    def begin(self) -> bool:
        """Find what is known of it; False where there is nothing to do, or what was read is gone
        from the cache, which has no room for it then."""
        session, length, _ = self.batch.states.find(self.array)
        if length >= len(self.ids) - TAIL or length < self._at:
            return False
        self._session, self._at = session, length
        self._cuts = self.batch.states.cuts(self.array, length, self._boundaries)
        return True

    def step(self) -> int:
        """Read a little; return how many tokens. Errors are those of `LanguageModel.step`."""
        assert self._session is not None
        limit = max(LEAST_CHUNK, self.batch.pace.chunk(0) // PART)
        feed = self.array[self._at : min(self._at + limit, self._cuts[0])]
        self.batch.lm.step([self._session], [feed], "none")
        self._at += len(feed)
        self._computed += len(feed)
        self._unkept = True
        if self._at == self._cuts[0]:
            self._cuts.pop(0)
            self._keep()
        return len(feed)

    def _keep(self) -> None:
        assert self._session is not None
        self.batch.states.keep(self.array[: self._at], self._session)
        self._unkept = False

    def pause(self) -> None:
        """Keep what was read; `begin` goes on from there."""
        if self._session is not None and self._unkept:
            self._keep()
        self._session = None

    @property
    def begun(self) -> bool:
        """Whether it is being read."""
        return self._session is not None

    @property
    def read(self) -> bool:
        """Whether it has been read to its end."""
        return self.begun and not self._cuts

    def end(self) -> None:
        """It is over."""
        self._session = None
        self.done.set_result(self._computed)


class Again:
    """Texts that wait to be read, at most `limit` of them: the oldest make room.

    `lock` is the scheduler's; all but `add` is of the engine thread. tokens: computed so far.
    """

    def __init__(self, lock: threading.Condition, limit: int) -> None:
        self._lock, self._limit = lock, limit
        self._waiting: deque[Text] = deque()
        self._current: Text | None = None
        self.tokens = 0

    def __bool__(self) -> bool:
        return self._current is not None or bool(self._waiting)

    def add(self, new: Text) -> Text:
        """Put a text behind the others, and return it, or one of the same ids that waits already;
        the lock is held."""
        for text in self._waiting:
            if text.batch is new.batch and text.ids == new.ids:
                return text
        self._waiting.append(new)
        if len(self._waiting) > self._limit:
            self._waiting.popleft().end()
        return new

    def step(self) -> None:
        """Read a little of a text."""
        if self._current is None:
            with self._lock:
                self._current = self._waiting.popleft()
        text = self._current
        try:
            if text.begun or text.begin():
                self.tokens += text.step()  # before who waits for the end is told
                if not text.read:
                    return
        except BaseException as error:  # it costs nobody an answer
            report(error, "a text that was to be read again")
        self._current = None
        text.end()

    def pause(self) -> None:
        """Let go of what is being read, for there is other work; it goes on after that."""
        if self._current is not None:
            self._current.pause()
            with self._lock:
                self._waiting.appendleft(self._current)
            self._current = None

    def clear(self) -> None:
        """End all of it; what was read is kept."""
        self.pause()
        with self._lock:
            while self._waiting:
                self._waiting.popleft().end()
