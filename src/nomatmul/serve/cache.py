"""States of sequences that were read, by their token ids, so that they are not computed again.

Where the state of a model only grows (keys and values), one entry serves every prefix of what it
has seen, and entries above it in the tree hold logits at most. Where each token overwrites it
(MLGRU), every snapshot stands for itself: `cuts` says where they are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.serve.cache_entries import ID_BYTES, Entry, holder_below, memory_of
from nomatmul.serve.cache_naming import Naming
from nomatmul.serve.cache_store import LIST_SECONDS, Store
from nomatmul.serve.cuts import cuts_of
from nomatmul.serve.radix import Ids, Match

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float

Tokens = Sequence[int] | NDArray[Any]

# A growing state is read from its file for a prefix of no less than this share of it.
_WORTH_READING = 1 / 16


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
    files. dropped: files that were damaged or foreign. file_bytes: of the states in files.
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
    file_bytes: int = 0


class StateCache:
    """Snapshots of sessions, the least recently used of which go first.

    max_bytes: of what is in memory, and once more of what is in files; 0 turns the cache off.
    directory: where snapshots are kept from one start to the next; one that cannot be used is
    reported in the log, and nothing is kept there. All methods are called on the engine's thread,
    but where they say otherwise. Raises ValueError for a directory that another server uses.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        max_bytes: int,
        directory: Path | None = None,
    ) -> None:
        self.models, self.max_bytes, self._directory = dict(models), max_bytes, directory
        self._store = Store(self.models, max_bytes, directory if max_bytes else None)
        self._hits = self._misses = 0
        self._namings: dict[str, dict[str, Naming]] = {name: {} for name in models}
        self._read_namings()
        self._store.list_files(LIST_SECONDS)
        self._store.shrink()

    @property
    def directory(self) -> Path | None:
        """Where states are kept; None where nowhere, a directory that cannot be used included."""
        return None if self._store.files is None else self._store.files.directory

    # -- what the scheduler asks

    def find(self, model: str, ids: Tokens) -> Found:
        """Return the longest prefix of a sequence that need not be computed."""
        store, array = self._store, _checked(ids)
        store.settle()
        state = None
        while state is None:  # a damaged file's entry is gone, and another one may serve
            match = store.trees[model].match(array)
            choose = _longest_growing if store.grows[model] else _longest_snapshot
            found, length = choose(match, len(array))
            if found is None:
                self._misses += 1
                return Found(self.models[model].session(), 0)
            entry, state = found, store.state_of(found)
        session, logits = state[0].fork(), None
        if session.position > length:
            session.roll_back(length)
        if length == len(array):
            exact = match.node.value
            assert exact is not None
            logits = state[1] if exact is entry else exact.logits
            assert logits is not None
            logits = logits.copy()
            store.touch(exact)
        self._hits += 1
        store.touch(entry)
        store.shrink()
        return Found(session, length, logits)

    def cuts(
        self, model: str, ids: Tokens, start: int, boundaries: Sequence[int] = ()
    ) -> list[int]:
        """Return the positions behind `start`, ascending, at which `keep` is to be called.

        The last one is the whole sequence. See cuts.py for the rule.
        """
        if not self.max_bytes or self._store.grows[model]:
            return [len(ids)]
        return cuts_of(len(ids), start, boundaries)

    def keep(
        self,
        model: str,
        ids: Tokens,
        session: Session,
        logits: Float | None = None,
        name: str | None = None,
        document: str = "",
    ) -> None:
        """Keep a copy of a session that has seen these ids, and the logits behind them.

        A state that is larger than the limit is not kept. name: the state stays until `forget`; one
        of that name before is let go. document: the request that a named state was made of, which
        is kept with it. Raises ValueError, and changes nothing, where a named state has no room.
        """
        array = _checked(ids)
        assert session.position == len(array), (session.position, len(array))
        if not self.max_bytes:
            if name is not None:
                raise ValueError("a state cannot be kept by name: the state cache is turned off")
            return
        store = self._store
        store.settle()
        own = sum(memory_of(session, logits).values()) + ID_BYTES * len(array)
        if name is not None:
            naming = Naming(tuple(array.tolist()), document)
            self._check_room(model, array, own, name, naming)
            entry = store.put(model, array, session, logits, own=True)
            if self.named(model, name) != naming.ids:
                self._release(model, name)
            store.pin(entry, name)
            self._set_naming(model, name, naming)
        elif own > self.max_bytes:
            return
        else:
            entry = store.put(model, array, session, logits)
        store.touch(entry)
        store.shrink()

    # -- named states

    def _check_room(self, model: str, ids: Ids, own: int, name: str, naming: Naming) -> None:
        """Raise ValueError where a named state, `own` bytes without its name, has no room."""
        old = self._namings[model].get(name)
        held = self._store.pinned_bytes(self._store.at(model, ids), model, name)
        held -= 0 if old is None else old.nbytes
        own += naming.nbytes
        if held + own > self.max_bytes:
            raise ValueError(
                f"the state {name!r} takes {own} bytes beside {held} of other named states:"
                f" more than the state cache's {self.max_bytes}"
            )

    def _read_namings(self) -> None:
        filing = self._store.filing
        if filing is not None:
            for model in self.models:
                self._namings[model] = filing.files.namings(model)
                for name, naming in self._namings[model].items():
                    filing.expect(model, np.array(naming.ids, np.int32), name)
        self._count_namings()

    def _count_namings(self) -> None:
        self._store.naming_bytes = sum(
            naming.nbytes for named in self._namings.values() for naming in named.values()
        )

    def named(self, model: str, name: str) -> tuple[int, ...] | None:
        """Return the ids of a named state, None where there is none. From any thread."""
        naming = self._namings[model].get(name)
        return None if naming is None else naming.ids

    def names(self, model: str) -> list[str]:
        """Return the names of a model's named states, sorted. From any thread."""
        return sorted(self._namings[model])

    def description(self, model: str, name: str) -> str | None:
        """Return the document of a state; None where there is no such state. From any thread."""
        naming = self._namings[model].get(name)
        return None if naming is None else naming.document

    def forget(self, model: str, name: str) -> bool:
        """Let a named state go; False where there is none."""
        naming = self._namings[model].get(name)
        if naming is None:
            return False
        self._release(model, name)
        self._set_naming(model, name, None)
        self._store.shrink()
        return True

    def _release(self, model: str, name: str) -> None:
        """Let the entry of a name go its way."""
        naming = self._namings[model].get(name)
        if naming is not None:
            self._store.unpin(model, np.array(naming.ids, np.int32), name)

    def _set_naming(self, model: str, name: str, naming: Naming | None) -> None:
        # a new dict each time: other threads may be reading the old one
        others = {key: one for key, one in self._namings[model].items() if key != name}
        self._namings[model] = others if naming is None else {**others, name: naming}
        self._count_namings()
        files = self._store.files
        if files is not None and naming is not None:
            files.write_naming(model, name, naming)
        elif files is not None:
            files.remove(files.name_file(model, name))

    # -- the directory

    def flush(self) -> None:
        """Write to the directory what is in memory only, and wait for it."""
        store, filing = self._store, self._store.filing
        if filing is None:
            return
        files = filing.files
        store.settle()
        for entry in [*store.pinned(), *store.recent]:
            if entry.session is not None and entry.file is None and entry.queued is None:
                if files.full():
                    files.wait()
                filing.write(entry)
        files.wait()
        store.settle()
        files.wait()  # for files that the new ones have taken the place of

    def close(self) -> None:
        """Give up the directory; what was not flushed is lost."""
        self._store.close()

    def stats(self) -> CacheStats:
        """Return the figures so far. From any thread."""
        store, files = self._store, self._store.files
        return CacheStats(
            entries=store.entries,
            bytes=store.bytes,
            max_bytes=self.max_bytes,
            hits=self._hits,
            misses=self._misses,
            evicted=store.evicted,
            written=store.written,
            read=store.read,
            dropped=0 if files is None else files.dropped,
            file_bytes=0 if files is None else files.nbytes,
        )


def _longest_snapshot(match: Match[Entry], total: int) -> tuple[Entry | None, int]:
    """The entry that is nearest to the end of a sequence of so many ids."""
    for node in (match.node, *match.node.above()):
        entry = node.value
        if entry is not None and entry.serves and (node.end < total or entry.knows_logits):
            return entry, node.end
    return None, 0


def _longest_growing(match: Match[Entry], total: int) -> tuple[Entry | None, int]:
    """An entry whose state serves a sequence of so many ids, and how many of them it may serve."""
    exact = match.node.value if match.node.end == total else None
    if exact is not None and exact.knows_logits:
        return (exact if exact.logits is None else holder_below(match.node)), total
    length = min(match.common, total - 1)
    if length <= 0:
        return None, 0
    entry = holder_below(match.below)
    if entry is not None and _worth_reading(entry, length):
        return entry, length
    for node in match.node.above():
        if node.value is not None and node.value.serves:
            return node.value, node.end
    return None, 0


def _worth_reading(entry: Entry, length: int) -> bool:
    return entry.session is not None or length >= _WORTH_READING * entry.node.end


def _checked(ids: Tokens) -> Ids:
    array: Ids = np.ascontiguousarray(ids, np.int32)
    return array
