"""The state cache's entries: where they stand, what they take, which of them go.

What lies in files is in cache_filing.py.

A model's states either grow only (one serves all prefixes: entries above it drop theirs, and an
entry that is evicted hands what is left of its state up), or they are snapshots.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nomatmul.serve.cache_entries import ID_BYTES, Entry, Ledger, holder_below, memory_of
from nomatmul.serve.cache_files import Filed, StateFiles
from nomatmul.serve.cache_filing import Filing
from nomatmul.serve.radix import Ids, RadixTree

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float

# A growing state is written when its conversation has been quiet for so long: the next turn's
# would take its place.
QUIET_SECONDS = 5.0
# What lies in a directory is listed for so long at the start, the rest in slices beside the work.
LIST_SECONDS = 0.3
_LIST_SLICE = 0.002

_log = logging.getLogger("nomatmul.serve")


class Store:
    """Entries by the ids of their sequences, in memory and in files.

    trees: of each model. naming_bytes: what the names of states take, with their ids and texts.
    recent: what may be evicted, the least recently used comes first. filing: None where there is no
    directory. Counts: entries, evicted, written, read.
    """

    def __init__(
        self, models: Mapping[str, LanguageModel], max_bytes: int, directory: Path | None
    ) -> None:
        self.max_bytes = max_bytes
        self.trees: dict[str, RadixTree[Entry]] = {name: RadixTree() for name in models}
        self.grows = {name: lm.backend.layout.overwritten is None for name, lm in models.items()}
        self.recent: OrderedDict[Entry, None] = OrderedDict()
        self.entries = self.evicted = self.written = self.read = 0
        self.naming_bytes = 0
        self._ledger = Ledger()
        self.filing = None if directory is None else self._open(models, directory)

    @property
    def files(self) -> StateFiles | None:
        """Those of the directory."""
        return None if self.filing is None else self.filing.files

    @property
    def bytes(self) -> int:
        """Bytes in memory: states, logits, names, and the ids of all entries."""
        ids = ID_BYTES * sum(tree.size for tree in self.trees.values())
        return self._ledger.total + self.naming_bytes + ids

    def at(self, model: str, ids: Ids) -> Entry | None:
        """The entry of just these ids."""
        match = self.trees[model].match(ids)
        return match.node.value if match.node.end == len(ids) else None

    def put(
        self, model: str, ids: Ids, session: Session, logits: Float | None, own: bool = False
    ) -> Entry:
        """Return the entry that serves these ids, made or completed from a session behind them.

        own: it is to have a state of its own, even where a longer one would serve.
        """
        tree, grows = self.trees[model], self.grows[model]
        match = tree.match(ids)
        inside = grows and not own and match.common == len(ids)
        holder = holder_below(match.below) if inside else None
        if holder is not None and logits is None:
            return holder
        node = tree.insert(ids)
        if node.value is None:
            node.value = Entry(model, node)
            self.entries += 1
        entry = node.value
        in_file = entry.file is not None and entry.file_logits and logits is None
        if entry.session is None and not in_file and (holder is None or holder.session is None):
            entry.session = session.fork()
        news = entry.file is None
        if logits is not None and entry.logits is None:
            entry.logits = np.array(logits, np.float32)  # a view would keep a whole step's
            news = news or not entry.file_logits
        self.charge(entry)
        if grows and entry.session is not None:
            self._strip_above(entry)
        if news and entry.queued is None and self.filing is not None:
            self.filing.write(entry, QUIET_SECONDS if grows else 0.0)
        return entry

    def charge(self, entry: Entry) -> None:
        """Bring the ledger and the order of eviction up to what an entry holds now."""
        memory = memory_of(entry.session, entry.logits)
        self._ledger.add(memory)
        self._ledger.remove(entry.charged)
        entry.charged = memory
        if not memory or entry.names:
            self.recent.pop(entry, None)
        else:
            self.recent.setdefault(entry)

    def touch(self, entry: Entry) -> None:
        """Note that an entry was of use, and with it those above at which sequences part or have
        parted: what many conversations begin with."""
        forks, used = False, [entry]
        for node in entry.node.above():
            forks = forks or len(node.children) > 1
            if node.value is not None:
                node.value.shared = node.value.shared or forks
                forks = False
                if node.value.shared:
                    used.append(node.value)
        for one in reversed(used):
            if one in self.recent:
                self.recent.move_to_end(one)
            if one.file is not None and self.files is not None:
                self.files.touch(one.file)

    def shrink(self) -> None:
        """Evict until the limit holds."""
        while self.bytes > self.max_bytes:
            victim = next(iter(self.recent), None)
            if victim is None:
                victim = None if self.filing is None else self.filing.oldest()
                if victim is None:
                    return
                self.remove(victim)  # even its ids are too much
            else:
                self._evict(victim)

    def state_of(self, entry: Entry) -> tuple[Session, Float | None] | None:
        """The state and logits of an entry, read from its file if need be; None where that is
        damaged: then the entry is gone."""
        if entry.session is not None:
            return entry.session, entry.logits
        assert self.filing is not None
        state = self.filing.read(entry)
        if state is None:
            self._check_served(entry)
            return None
        session, logits = state
        self.read += 1
        own = sum(memory_of(session, logits).values()) + ID_BYTES * entry.node.end
        if own + (self.pinned_bytes() if entry.names else 0) <= self.max_bytes:
            entry.session = session
            entry.logits = logits if entry.logits is None else entry.logits
            self.charge(entry)
        return session, logits

    def pinned(self) -> list[Entry]:
        """Entries that have names."""
        found = []
        for tree in self.trees.values():
            entries = (node.value for node in tree.root.below())
            found += [entry for entry in entries if entry is not None and entry.names]
        return found

    def pinned_bytes(
        self, but: Entry | None = None, model: str | None = None, name: str | None = None
    ) -> int:
        """What pinned entries and names take on their own; without one of the entries, and without
        what only this name of this model pins."""
        held: dict[int, int] = {}
        ids = 0
        for entry in self.pinned():
            released = entry.model == model and entry.names == {name}
            if entry is not but and not released:
                held |= entry.charged
                ids += entry.node.end
        return sum(held.values()) + ID_BYTES * ids + self.naming_bytes

    def pin(self, entry: Entry, name: str) -> None:
        """Keep an entry until it is unpinned from all its names."""
        entry.names.add(name)
        if self.filing is not None:
            self.filing.expect(entry.model, entry.node.ids(), name)
        self.charge(entry)

    def unpin(self, model: str, ids: Ids, name: str) -> None:
        """Take one name from an entry, listed or not."""
        entry = self.at(model, ids)
        if self.filing is not None:
            self.filing.release(model, ids, name, entry)
        if entry is None or name not in entry.names:
            return
        entry.names.discard(name)
        if not entry.names:
            if self.grows[entry.model] and holder_below(entry.node, but=entry) is not None:
                self._strip(entry)
            else:
                self.charge(entry)

    def remove(self, entry: Entry) -> None:
        """Take an entry away, its file too, and those above that lived on its state."""
        above = [node.value for node in entry.node.above() if node.value is not None]
        self.trees[entry.model].remove(entry.node)
        self.entries -= 1
        entry.session = entry.logits = None
        entry.names.clear()
        self.charge(entry)
        self._forget_files(entry)
        if self.grows[entry.model]:
            for one in above:
                self._check_served(one)

    # -- files

    def list_files(self, seconds: float) -> None:
        """Take up entries that lie in the directory, those used last come first."""
        if (filing := self.filing) is not None:
            for filed in filing.listed(seconds):
                self._list(filing, filed)

    def _list(self, filing: Filing, filed: Filed) -> None:
        node = self.trees[filed.model].insert(filed.ids)
        if node.value is None:
            node.value = Entry(filed.model, node)
            self.entries += 1
        entry = node.value
        if entry.file is None and entry.queued is None:
            for name in filing.take(entry, filed):
                self.pin(entry, name)
            self._supersede(entry)

    def settle(self) -> None:
        """Take note of what became of files."""
        if self.filing is None:
            return
        if self.filing.listing:
            self.list_files(_LIST_SLICE)
            self.shrink()
        for entry, there in self.filing.news():
            if there:
                self.written += 1
                self._supersede(entry)
            else:
                self._check_served(entry)

    def close(self) -> None:
        """Give up the directory; what is not written is lost."""
        if self.filing is not None:
            self.filing.files.close()
            self.filing = None

    def _open(self, models: Mapping[str, LanguageModel], directory: Path) -> Filing | None:
        try:
            return Filing(StateFiles(directory, self.max_bytes, models))
        except OSError as error:
            _log.warning(
                "state directory: cannot use %s: %s; states stay in memory only",
                directory, error.strerror or error,
            )  # fmt: skip
            return None

    def _supersede(self, entry: Entry) -> None:
        """Let go of files that hold less of a growing state than this entry's."""
        if self.grows[entry.model]:
            above = [node.value for node in entry.node.above() if node.value is not None]
            for one in above:
                if not one.names and one.file is not None:
                    self._forget_files(one)
                    if not one.in_memory:
                        self.remove(one)

    def _forget_files(self, entry: Entry) -> None:
        if self.filing is not None:
            self.filing.forget(entry)

    # -- memory

    def _check_served(self, entry: Entry) -> None:
        """Take an entry away that has no state, nor one below it to live on."""
        served = entry.serves or (self.grows[entry.model] and holder_below(entry.node) is not None)
        if not served and entry.node.value is entry:
            self.remove(entry)

    def _strip_above(self, entry: Entry) -> None:
        above = [node.value for node in entry.node.above() if node.value is not None]
        for one in above:
            if one.session is not None and not one.names:
                self._strip(one)

    def _strip(self, entry: Entry) -> None:
        """Let an entry live on the state of one below."""
        entry.session = None
        if entry.queued is not None and entry.file is None:
            self._forget_files(entry)
        if entry.logits is None and entry.file is None:
            self.remove(entry)
        else:
            self.charge(entry)

    def _evict(self, entry: Entry) -> None:
        self.evicted += 1
        if self.grows[entry.model] and entry.file is None and entry.session is not None:
            self._hand_up(entry, entry.session)
        entry.session = entry.logits = None
        if entry.file is None:
            self.remove(entry)
        else:
            self.charge(entry)

    def _hand_up(self, entry: Entry, session: Session) -> None:
        """Give what is left of a growing state to the entry above, if that lives on it."""
        up = next((node.value for node in entry.node.above() if node.value is not None), None)
        if up is None or up.serves or holder_below(up.node, but=entry) is not None:
            return
        session.roll_back(up.node.end)
        up.session = session
        self.charge(up)
