"""Prompts while they are read, each once for all answers that continue it.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nomatmul.serve.job import Token
from nomatmul.serve.sequence import Choice, States, TokenNames

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float


class Reading:
    """A prompt while it is read, for all choices at once that continue it.

    scored: alternatives with each of its own tokens, None where nobody asks for logprobs of them;
    then all of it is computed, whatever the cache holds. at: how much the session has seen.
    computed: how much of that was not in the cache. waiting: choices that begin at its end.
    session: None until `begin`. logits_V: behind the whole prompt. error: why it ended early.
    """

    def __init__(
        self,
        ids: tuple[int, ...],
        scored: int | None,
        boundaries: tuple[int, ...],
        states: States,
        names: TokenNames,
    ) -> None:
        self.ids, self.scored, self.states, self._names = ids, scored, states, names
        self.array = np.array(ids, np.int32)
        self._boundaries = boundaries
        self.at, self.computed = 0, 0
        self.cuts: list[int] = [len(ids)]
        self.waiting: list[Choice] = []
        self.tokens: list[Token] = []
        self.session: Session | None = None
        self.logits_V: Float | None = None
        self.error: str | None = None
        self._behind: tuple[Reading, int] | None = None

    @property
    def over(self) -> bool:
        """Whether the prompt has been read, or will not be."""
        return self.logits_V is not None or self.error is not None

    @property
    def left(self) -> int:
        """How much of the prompt is yet to be read."""
        return len(self.ids) - self.at

    @property
    def client(self) -> str:
        """Whose turn it is when this is read on."""
        return self.waiting[0].ticket.job.client

    def begin(self, lm: LanguageModel, others: Sequence[Reading] = ()) -> None:
        """Find what is known of the prompt; wait for one of `others` that will know more."""
        if self.scored is not None:
            self.session = lm.session()
            self.tokens = [Token(self.ids[0], self._names.of(self.ids[0]), None, ())]
        else:
            session, length, logits_V = self.states.find(self.array)
            better = [(other.gives(self), other) for other in others]
            use, other = max(better, key=lambda one: one[0], default=(0, None))
            if other is not None and use > length:
                self._behind = (other, use)
                return
            self.session, self.at, self.logits_V = session, length, logits_V
        self.cuts = self.states.cuts(self.array, self.at, self._boundaries)

    def gives(self, later: Reading) -> int:
        """How much of a later prompt will be known, once this one is so far."""
        if self.over or not self.states:
            return 0
        size = min(len(self.array), len(later.array))
        differ = np.flatnonzero(self.array[:size] != later.array[:size])
        common = int(differ[0]) if len(differ) else size
        if self.states.only_grows:  # one state serves every shorter prefix
            return min(common, len(later.ids) - 1)
        return max((cut for cut in self.cuts if cut <= common), default=0)

    def ready(self, lm: LanguageModel) -> bool:
        """Whether it can be read on; begins what has waited for another prompt."""
        if self._behind is not None:
            other, use = self._behind
            if not other.over and other.waiting and other.at < use:
                return False
            self._behind = None
            other.share()
            self.begin(lm)
        return not self.over

    def share(self) -> None:
        """Let others go on from what was read so far, where a state serves whatever is before it:
        who shares the beginning of a long prompt does not wait for its end."""
        if self.states.only_grows and self.at and not self.over and self.session is not None:
            self.states.keep(self.array[: self.at], self.session)

    def chunk(self, limit: int) -> Chunk:
        """Up to so many ids to feed next, no further than the next position to keep."""
        return Chunk(self, self.array[self.at : min(self.at + limit, self.cuts[0])])

    def advance(self, count: int, logits: Float) -> None:
        """Go on by a chunk; logits: float32 [V] behind it, of scored prompts [T, V]."""
        assert self.session is not None
        if self.scored is not None:
            for row_V, token in zip(
                logits, self.ids[self.at + 1 : self.at + count + 1], strict=False
            ):
                self.tokens.append(self._names.scored(row_V, token, self.scored))
            logits = logits[-1]
        self.at += count
        self.computed += count
        if self.at < self.cuts[0]:
            return
        self.cuts.pop(0)
        if self.at == len(self.ids):
            self.logits_V = logits.copy()  # not the whole step's with it
        self.states.keep(self.array[: self.at], self.session, self.logits_V)

    def give_up(self) -> None:
        """Nobody waits for it any more: keep what was read."""
        if self.session is not None and self.computed and not self.over:
            self.states.keep(self.array[: self.at], self.session)


class Chunk:
    """A part of a prompt in one step."""

    def __init__(self, reading: Reading, feed: NDArray[np.int32]) -> None:
        assert reading.session is not None
        assert len(feed)
        self.reading, self.session, self.feed = reading, reading.session, feed
        self.wants_logits = reading.at + len(feed) == len(reading.ids)

    def took(self, logits: Float) -> None:
        """See `Reading.advance`."""
        self.reading.advance(len(self.feed), logits)
