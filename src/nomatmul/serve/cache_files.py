"""The state cache's directory: a file a state, written behind, read when it is first needed.

    nomatmul.lock                      held by the server that uses the directory
    nomatmul-1-MODEL-DIGEST.state      a session's state with its ids, and logits where known
    nomatmul-1-MODEL-DIGEST.name       a named state: its name, ids and the request it was made of

1 is the version of this form, MODEL says whose states (fingerprint and form of the pieces), DIGEST
is of the ids or the name. Other files are left alone; those of other models and versions count
against the limit, and go when they are the oldest.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.state_file import checked_position, read_state, state_chunks
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.lock import lock_directory
from nomatmul.formats.files.safetensors import Buffer, read_one
from nomatmul.serve.cache_naming import Naming, naming_file, read_naming
from nomatmul.serve.radix import Ids
from nomatmul.serve.write_behind import WriteBehind

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float

_PREFIX, _STATE, _NAME = "nomatmul-", ".state", ".name"
_HEADER_BYTES = 1 << 16  # more than any model's header takes: no file is larger than planned

_log = logging.getLogger("nomatmul.serve")


@dataclass(frozen=True)
class Filed:
    """A state in a file, as its header tells."""

    model: str
    file: str
    ids: Ids
    logits: bool


class StateFiles:
    """States of several models in one directory of at most `limit` bytes.

    The files used longest ago go first, pinned ones never. nbytes: of all of them, those that wait
    to be written included. Raises ValueError where another server uses the directory or it is a
    file, and OSError where it cannot be used at all.
    """

    def __init__(self, directory: Path, limit: int, models: Mapping[str, LanguageModel]) -> None:
        self.directory, self.limit = directory, limit
        self.nbytes = self.dropped = 0
        self._models = models
        self._tags = {name: _tag(lm) for name, lm in models.items()}
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"the state directory {directory} is a file")
        directory.mkdir(0o700, parents=True, exist_ok=True)  # of people's words
        self._lock = lock_directory(directory, "the state directory", "server")
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the file used longest ago comes first
        self._pinned: set[str] = set()
        self._removed: list[str] = []
        try:
            self._list()
        except OSError:
            os.close(self._lock)
            raise
        self._writer = WriteBehind(directory)

    def states(self) -> Iterator[Filed]:
        """The states of these models, pinned ones and then those used last come first; damaged
        files are dropped. It may be read bit by bit, while others are written and removed."""
        models = {tag: name for name, tag in self._tags.items()}
        newest = list(reversed(self._sizes))
        for file in sorted(newest, key=lambda file: file not in self._pinned):
            model = models.get(_tag_of(file))
            if model is not None and file in self._sizes:
                try:
                    yield self._filed(model, file)
                except (FormatError, OSError) as error:
                    self.drop(file, error)

    def namings(self, model: str) -> dict[str, Naming]:
        """The named states of a model; damaged files are dropped."""
        found = {}
        for path in sorted(self.directory.glob(f"{self._tags[model]}-*{_NAME}")):
            try:
                name, naming = read_naming(path)
                if path.name != self.name_file(model, name):
                    raise FormatError(f"{path} is of another name")
                found[name] = naming
            except (FormatError, OSError) as error:
                self.drop(path.name, error)
        return found

    def state_file(self, model: str, ids: Ids) -> str:
        """The name of the file for the state behind these ids."""
        return f"{self._tags[model]}-{_digest(ids.astype('<i4').tobytes())}{_STATE}"

    def name_file(self, model: str, name: str) -> str:
        """The name of the file for a named state."""
        return f"{self._tags[model]}-{_digest(name.encode())}{_NAME}"

    def write(
        self, model: str, ids: Ids, session: Session, logits: Float | None, delay: float = 0.0
    ) -> str | None:
        """Have a state written, and others removed where it needs their room.

        session: a fork that nobody feeds. Returns the file's name, None where it finds no room.
        """
        lm, file = self._models[model], self.state_file(model, ids)
        beside: dict[str, NDArray[Any]] = {"ids": ids}
        if logits is not None:
            beside["logits"] = logits
        data = lm.backend.layout.nbytes(len(ids)) + sum(a.nbytes for a in beside.values())
        if not self._make_room(file, data + _HEADER_BYTES):
            return None

        def content() -> Iterator[Buffer]:
            return state_chunks(session.arrays(), len(ids), lm.fingerprint, beside)

        self._writer.write(file, content, delay)
        return file

    def write_naming(self, model: str, name: str, naming: Naming) -> None:
        """Have a named state's file written."""
        whole = memoryview(naming_file(name, naming))
        self._writer.write(self.name_file(model, name), lambda: [whole], needed=True)

    def read(self, filed: Filed) -> tuple[Session, Float | None]:
        """Return a state and its logits; raises FormatError for a file that is not what it was."""
        from nomatmul.engine.session import Session

        lm, path = self._models[filed.model], self.directory / filed.file
        arrays, position = read_state(
            path, lm.backend.layout, lm.fingerprint, beside=("ids", "logits")
        )
        logits = arrays.pop("logits", None)
        ids = arrays.pop("ids", np.zeros(0, np.int32))  # a file without them is of another state
        if not np.array_equal(ids, filed.ids):
            raise FormatError(f"{path} is of other ids")
        if logits is not None and logits.shape != (lm.config.vocab_size,):
            raise FormatError(f"{path} has logits of another vocabulary")
        self.touch(filed.file)
        return Session(lm, lm.backend.load_state(arrays, position)), logits

    def used(self) -> Iterable[str]:
        """The names of all states' files, those used longest ago first."""
        return self._sizes

    def touch(self, file: str) -> None:
        """Note that a file was of use."""
        if file in self._sizes:
            self._sizes.move_to_end(file)
            try:
                os.utime(self.directory / file)
            except OSError:
                return  # not written yet, or gone: reading it will tell

    def pin(self, file: str, pinned: bool) -> None:
        """Keep a file whatever room others need, or no longer."""
        (self._pinned.add if pinned else self._pinned.discard)(file)

    def cancel(self, file: str) -> None:
        """Do not write a file that waits to be written."""
        if self._writer.cancel(file):
            self._resize(file, None)

    def remove(self, file: str) -> None:
        """Have a file removed."""
        self._resize(file, None)
        self._writer.remove(file)

    def drop(self, file: str, reason: Exception) -> None:
        """Remove a file that is no good, and say so in the log."""
        self.dropped += 1
        _log.warning("state directory: %s is dropped: %s", file, reason)
        self._resize(file, None)
        try:
            (self.directory / file).unlink(missing_ok=True)
        except OSError:
            return  # it will be found again, and dropped again, at the next start

    def news(self) -> list[tuple[str, bool]]:
        """(file, whether it lies there now) of what was written, refused or had to make room."""
        news = [(file, False) for file in self._removed]
        self._removed = []
        for file, written in self._writer.news():
            size = None
            if written and file in self._sizes:  # else it had to go in the meantime
                with contextlib.suppress(OSError):  # somebody else has removed it
                    size = (self.directory / file).stat().st_size
            self._resize(file, size)
            news.append((file, size is not None))
        return news

    def wait(self) -> None:
        """Return when everything is written."""
        self._writer.wait()

    def full(self) -> bool:
        """Whether the next state to be written would push one out that waits."""
        return self._writer.full()

    def close(self) -> None:
        """Stop writing and let the directory go."""
        self._writer.close()
        os.close(self._lock)

    def _make_room(self, file: str, size: int) -> bool:
        excess = self.nbytes - self._sizes.get(file, 0) + size - self.limit
        going: list[str] = []
        for name, freed in self._sizes.items():
            if excess <= 0:
                break
            if name not in self._pinned and name != file:
                going.append(name)
                excess -= freed
        if excess > 0:
            return False
        for name in going:
            self.remove(name)
        self._removed += going
        self._resize(file, size)
        self._sizes.move_to_end(file)
        return True

    def _resize(self, file: str, size: int | None) -> None:
        """Note the bytes of a file, None for one that is gone."""
        self.nbytes += (size or 0) - self._sizes.get(file, 0)
        if size is None:
            self._sizes.pop(file, None)
        else:
            self._sizes[file] = size

    def _list(self) -> None:
        """Find the states that lie here, and clear away what a killed server left half written."""
        found = []
        with os.scandir(self.directory) as places:
            for place in places:
                with contextlib.suppress(FileNotFoundError):  # somebody removed it meanwhile
                    if place.name.startswith(f".{_PREFIX}") and place.name.endswith(".tmp"):
                        os.unlink(place.path)
                    elif place.name.startswith(_PREFIX) and place.name.endswith(_STATE):
                        stat = place.stat()
                        found.append((stat.st_mtime_ns, place.name, stat.st_size))
        for _, name, size in sorted(found):
            self._resize(name, size)

    def _filed(self, model: str, file: str) -> Filed:
        path = self.directory / file
        metadata, names, ids = read_one(path, "ids")
        position = checked_position(path, metadata, self._models[model].fingerprint)
        if ids.dtype != np.int32 or ids.shape != (position,) or not position:
            raise FormatError("its ids are not those of its state")
        if file != self.state_file(model, ids):
            raise FormatError("its ids are not those of its name")
        return Filed(model, file, ids.astype(np.int32), "logits" in names)


def _tag(lm: LanguageModel) -> str:
    """What the names of a model's files begin with."""
    forms = [
        f"{name} {piece.dtype} {piece.shape}" for name, piece in lm.backend.layout.pieces.items()
    ]
    return f"{_PREFIX}1-{_digest('|'.join([lm.fingerprint, *forms]).encode(), 8)}"


def _tag_of(file: str) -> str:
    return file.rsplit("-", 1)[0]


def _digest(data: bytes, size: int = 16) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()
