"""States of sequences that were read, by their token ids, so that they are not computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float

Tokens = Sequence[int] | NDArray[Any]


@dataclass(frozen=True)
class Found:
    """What is known of a sequence: a session of the caller's own behind the first `length` ids.

    logits: float32 [V] behind them, given where length is the whole sequence, else None.
    """

    session: Session
    length: int
    logits: Float | None = None


@dataclass(frozen=True)
class CacheStats:
    """Figures since the start. bytes: of states, logits and ids in memory, what entries share once.

    entries: prefixes that are kept, in memory or in files. hits, misses: calls of `find` that found
    a prefix, or none. evicted: entries that had to leave memory. written, read: states to and from
    files. dropped: files that were damaged or foreign.
    """

    entries: int = 0
    bytes: int = 0
    max_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    written: int = 0
    read: int = 0
    dropped: int = 0


class StateCache:
    """Snapshots of sessions, the least recently used of which go first.

    max_bytes: of what is in memory; 0 turns the cache off. directory: where snapshots are kept
    from one start to the next. All methods are called on the engine's thread, but for `stats`.
    Raises ValueError for a directory that another server uses.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        max_bytes: int,
        directory: Path | None = None,
    ) -> None:
        self.models, self.max_bytes, self.directory = models, max_bytes, directory

    def find(self, model: str, ids: Tokens) -> Found:
        """Return the longest prefix of a sequence that need not be computed."""
        return Found(self.models[model].session(), 0)

    def cuts(
        self, model: str, ids: Tokens, start: int, boundaries: Sequence[int] = ()
    ) -> list[int]:
        """Return the positions behind `start`, ascending, at which `keep` is to be called."""
        return [len(ids)]

    def keep(
        self,
        model: str,
        ids: Tokens,
        session: Session,
        logits: Float | None = None,
        name: str | None = None,
    ) -> None:
        """Keep a copy of a session that has seen these ids, and the logits behind them.

        name: the state stays until `forget`. Raises ValueError where it has no room.
        """

    def named(self, model: str, name: str) -> tuple[int, ...] | None:
        """Return the ids of a named state, None where there is none. From any thread."""
        return None

    def names(self, model: str) -> list[str]:
        """Return the names of a model's named states, sorted. From any thread."""
        return []

    def describe(self, model: str, name: str, document: str) -> None:
        """Store a text with a named state: the request that it was made of."""

    def description(self, model: str, name: str) -> str | None:
        """Return that text; None where there is no such state. From any thread."""
        return None

    def forget(self, model: str, name: str) -> bool:
        """Let a named state go; False where there is none."""
        return False

    def flush(self) -> None:
        """Write to the directory what is in memory only, and wait for it."""

    def close(self) -> None:
        """Give up the directory; what was not flushed is lost."""

    def stats(self) -> CacheStats:
        """Return the figures so far. From any thread."""
        return CacheStats(max_bytes=self.max_bytes)
