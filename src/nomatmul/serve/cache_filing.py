"""Which entries of the state cache lie in files, are being written, or wait to be listed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nomatmul.formats.errors import FormatError
from nomatmul.serve.cache_entries import Entry
from nomatmul.serve.cache_files import Filed, StateFiles
from nomatmul.serve.radix import Ids

if TYPE_CHECKING:
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float


class Filing:
    """The entries of one directory by their files, and the names of files that are kept.

    files: what reads and writes them. It knows no tree: where a file that went leaves an entry with
    nothing to live on, or one that came makes others superfluous, is for the store to see.
    """

    def __init__(self, files: StateFiles) -> None:
        self.files = files
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, set[str]] = {}  # of files whose entry may not be listed yet
        self._unlisted: Iterator[Filed] | None = files.states()

    @property
    def listing(self) -> bool:
        """Whether files lie in the directory that `listed` has not told yet."""
        return self._unlisted is not None

    def listed(self, seconds: float) -> Iterator[Filed]:
        """What lies in the directory, for so long; those used last come first."""
        end = time.monotonic() + seconds
        for filed in self._unlisted or ():
            yield filed
            if time.monotonic() > end:
                return
        self._unlisted = None

    def take(self, entry: Entry, filed: Filed) -> set[str]:
        """Give an entry the file that was listed; returns the names that pin it."""
        entry.file, entry.file_logits = filed.file, filed.logits
        self._entries[filed.file] = entry
        return self._names.get(filed.file, set())

    def write(self, entry: Entry, delay: float = 0.0) -> None:
        """Have the state of an entry written."""
        if entry.session is None:
            return
        ids = entry.node.ids()
        file = self.files.write(entry.model, ids, entry.session.fork(), entry.logits, delay)
        if file is not None:
            self._entries[file] = entry
            entry.queued, entry.queued_logits = file, entry.logits is not None

    def read(self, entry: Entry) -> tuple[Session, Float | None] | None:
        """The state and logits in an entry's file; None where that is damaged: then it is gone."""
        assert entry.file is not None
        filed = Filed(entry.model, entry.file, entry.node.ids(), entry.file_logits)
        try:
            return self.files.read(filed)
        except FormatError as error:
            self.files.drop(entry.file, error)
            self._lose(entry)
            return None

    def news(self) -> Iterator[tuple[Entry, bool]]:
        """(entry, whether its file lies there now) of what was written, refused or made room."""
        for file, there in self.files.news():
            entry = self._entries.get(file)
            if entry is None:
                if there and not file.endswith(".name"):
                    self.files.remove(file)  # of an entry that went while it was written
                continue
            entry.queued = None
            if there:
                entry.file, entry.file_logits = file, entry.queued_logits
            else:
                self._lose(entry)
            yield entry, there

    def oldest(self) -> Entry | None:
        """The entry without names whose file was used longest ago."""
        entries = (self._entries.get(file) for file in self.files.used())
        return next((e for e in entries if e is not None and e.file and not e.names), None)

    def expect(self, model: str, ids: Ids, name: str) -> None:
        """Pin the file of an entry that may not be listed yet."""
        file = self.files.state_file(model, ids)
        self._names.setdefault(file, set()).add(name)
        self.files.pin(file, True)

    def release(self, model: str, ids: Ids, name: str, entry: Entry | None) -> None:
        """Take one name from a file; entry: that of these ids, None where it is not listed yet."""
        file = self.files.state_file(model, ids)
        names = self._names.get(file, set())
        names.discard(name)
        if not names and (entry is None or entry.names <= {name}):
            self.files.pin(file, False)

    def forget(self, entry: Entry) -> None:
        """Remove the file of an entry, or do not write it."""
        for file in {entry.file, entry.queued} - {None}:
            assert file is not None
            self._entries.pop(file, None)
            self.files.cancel(file)
            if entry.file is not None:
                self.files.remove(file)
        entry.file = entry.queued = None

    def _lose(self, entry: Entry) -> None:
        """An entry's file is gone."""
        for file in (entry.file, entry.queued):
            if file is not None:
                self._entries.pop(file, None)
        entry.file = None
