"""Which model of the Hub is meant, what is known of its files, and whether they are sound."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomatmul._hub_names import PREFIX
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.atomic import write_file

_PART = re.compile(r"[A-Za-z0-9][\w.-]*")
_BLOCK = 1 << 22

Listing = dict[str, dict[str, Any]]  # {file: {"size": bytes, "sha256" or "sha1": hexadecimal}}


@dataclass(frozen=True)
class HubName:
    """`hf:owner/name[/file.gguf][@revision]`, taken apart."""

    repository: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Raises ValueError for what is no such name."""
        where, at, revision = text.removeprefix(PREFIX).partition("@")
        parts = where.split("/")
        sound = len(parts) >= 2 and all(_PART.fullmatch(part) for part in parts)
        if not sound or (at and not re.fullmatch(r"[\w./-]+", revision)):
            raise ValueError(f"{text!r} is no name of a model; write hf:owner/name[@revision]")
        file = "/".join(parts[2:]) or None
        if file is not None and not file.endswith(".gguf"):
            raise ValueError(f"{text!r} names a file that is no .gguf; write hf:owner/name")
        return cls("/".join(parts[:2]), file, revision or None)

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{PREFIX}{self.repository}{file}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True)
class Snapshot:
    """A model that lies here: `path` is its directory, or its GGUF file; `commit` says which."""

    path: Path
    commit: str


def cache_directory() -> Path:
    """Where the package keeps what it made of the Hub's models: $NOMATMUL_CACHE."""
    if given := os.environ.get("NOMATMUL_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nomatmul"


def model_path(directory: Path, files: list[str]) -> Path:
    """What is opened of these files: a GGUF file, which is the first then, or the directory."""
    return directory / files[0] if files[0].endswith(".gguf") else directory


class Record:
    """What is known of a revision's files: {"commit", "files": {name: digest and time}}.

    A file whose size and time are those of the record was compared with its checksum before.
    """

    def __init__(self, name: HubName) -> None:
        self._name = name
        words = str(name).removeprefix(PREFIX).replace("/", "--")
        self._path = cache_directory() / "hub" / f"{words}.json"
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # without it files are compared again
            known = json.loads(self._path.read_bytes())
            if isinstance(known, dict) and isinstance(known.get("files"), dict):
                self._known = known

    def covers(self, commit: str, listing: Listing) -> bool:
        """Whether these files were downloaded and compared before."""
        return self._known.get("commit") == commit and set(listing) <= set(self._known["files"])

    def snapshot(self, hub: Any) -> Snapshot | None:
        """The model as it was downloaded before; None where something is missing."""
        files = self._known.get("files", {})
        found = [
            hub.try_to_load_from_cache(self._name.repository, file, revision=self._known["commit"])
            for file in files
        ]
        if not found or not all(isinstance(path, str) for path in found):
            return None
        path, depth = Path(found[0]), next(iter(files)).count("/")
        return Snapshot(model_path(path.parents[depth], list(files)), str(self._known["commit"]))

    def check(self, directory: Path, commit: str, listing: Listing) -> None:
        """Compare files with their checksums and write the record.

        Raises FormatError, and deletes the file, where they differ.
        """
        old = self._known.get("files", {})
        new = {}
        for file, digest in listing.items():
            path = (directory / file).resolve()
            stat = path.stat()
            new[file] = {**digest, "time": stat.st_mtime_ns}
            if new[file] != old.get(file):
                self._compare(directory / file, digest)
        if new != old or commit != self._known.get("commit"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = {"commit": commit, "files": new}
            write_file(self._path, (json.dumps(content, indent=1) + "\n").encode())

    def _compare(self, path: Path, digest: dict[str, Any]) -> None:
        kind = "sha256" if digest.get("sha256") else "sha1"
        size, expected = path.stat().st_size, digest.get(kind)
        if digest["size"] is not None and size != digest["size"]:
            found, right = f"{size} bytes", f"{digest['size']}"
        elif expected is not None and (sum_of := _checksum(path, kind)) != expected:
            found, right = f"{kind} {sum_of}", expected
        else:
            return
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise FormatError(
            f"{self._name}: {path.name} was damaged on its way ({found}, the Hub says {right});"
            " it was deleted, so try again"
        )


def _checksum(path: Path, kind: str) -> str:
    """sha256 of a file, or sha1 of it as a blob of git."""
    sum_of = hashlib.new(kind, usedforsecurity=False)
    if kind == "sha1":
        sum_of.update(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            sum_of.update(block)
    return sum_of.hexdigest()
