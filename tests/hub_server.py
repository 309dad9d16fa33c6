"""A small Hugging Face Hub on the loopback address, whose connections can break."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^?]+)")
_MAIN_INFO = re.compile(r"/api/models/([^/?]+/[^/?]+)")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """What is served. Files that are larger than `large` bytes are stored as large ones."""

    url: str = ""
    large: int = 1000
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)  # {file: bytes after which it breaks once}
    lies: dict[str, str] = field(default_factory=dict)  # {file: its checksum, as it is said to be}
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, name: str, directory: Path) -> None:
        """Serve the files of a directory."""
        files = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        self.repositories[name] = files

    def commit(self, name: str) -> str:
        """The commit of a repository's only branch, main."""
        content = sorted((path, _sha1(data)) for path, data in self.repositories[name].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def sums(self, name: str, file: str) -> tuple[str, str | None]:
        """(blob id, sha256 of a large file, else None)"""
        data = self.repositories[name][file]
        if len(data) <= self.large:
            return self.lies.get(file, _sha1(data)), None
        return _sha1(data), self.lies.get(file, hashlib.sha256(data).hexdigest())

    def downloads(self, file: str) -> list[str | None]:
        """The Range of each request for the content of a file."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(file)]


def _sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := _INFO.fullmatch(path):
            self._describe(match[1], match[2], match[3])
        elif match := _MAIN_INFO.fullmatch(path):
            self._describe(match[1], "revision", "main")
        elif match := _FILE.fullmatch(path):
            self._send_file(match[1], match[2], match[3])
        else:
            self._refuse(404, "RepoNotFound")

    def _found(self, name: str, revision: str) -> bool:
        if name not in self.hub.repositories:
            self._refuse(404, "RepoNotFound")
        elif name in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif revision not in ("main", self.hub.commit(name)):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _describe(self, name: str, what: str, revision: str) -> None:
        if not self._found(name, revision):
            return
        listing: list[dict[str, Any]] = []
        for file, data in self.hub.repositories[name].items():
            blob, sha256 = self.hub.sums(name, file)
            size = {"size": len(data)}
            if what == "tree":
                lfs = {"lfs": {"oid": sha256, **size, "pointerSize": 130}} if sha256 else {}
                listing.append({"type": "file", "path": file, "oid": blob, **size, **lfs})
            else:
                lfs = {"lfs": {"sha256": sha256, **size, "pointerSize": 130}} if sha256 else {}
                listing.append({"rfilename": file, "blobId": blob, **size, **lfs})
        info = {"id": name, "sha": self.hub.commit(name), "siblings": listing}
        self._send(200, json.dumps(listing if what == "tree" else info).encode(), {})

    def _send_file(self, name: str, revision: str, file: str) -> None:
        if not self._found(name, revision):
            return
        if file not in self.hub.repositories[name]:
            self._refuse(404, "EntryNotFound")
            return
        data = self.hub.repositories[name][file]
        blob, sha256 = self.hub.sums(name, file)
        headers = {
            "ETag": f'"{sha256 or blob}"',
            "X-Repo-Commit": self.hub.commit(name),
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and file in self.hub.broken:
            self._send(status, data[start:], headers, self.hub.broken.pop(file))
        else:
            self._send(status, data[start:], headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], breaks: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:breaks])
        if breaks is not None:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
