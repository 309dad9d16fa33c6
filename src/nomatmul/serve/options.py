"""What a server is told when it starts, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

LOGS = ("none", "requests")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `nomatmul serve`; sizes in bytes, times in seconds.

    models: directories, names on the Hub, or NAME=one of these; none: the model in the box. port: 0
    takes a free one. threads: of the engine, None for as many as measured best. max_streams:
    answers that are written at once. max_queue: requests that may wait. state_cache: memory for
    states of earlier requests. state_dir: where they are kept on disk, None: nowhere. timeout: the
    longest that a request may take, and a client may leave bytes unread. grace: how long answers
    may go on after a signal. api_keys: with any, requests need one of them. cors: origins whose
    pages may read answers ("*": all). allow_host: names beside localhost that a server on a
    loopback address may be called by.

    Raises ValueError naming the value and its limit.
    """

    models: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    threads: int | None = None
    device: str = "cpu"
    kv: str = "f16"
    max_streams: int = 16
    max_queue: int = 64
    state_cache: int = 1 << 30
    state_dir: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    timeout: float = 600.0
    grace: float = 30.0
    max_body: int = 16 << 20
    max_connections: int = 512
    cors: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    chat_template: str | None = None
    log: str = "none"

    def __post_init__(self) -> None:
        _whole("port", self.port, 0, 65535)
        _whole("max-streams", self.max_streams, 1, 4096)
        _whole("max-queue", self.max_queue, 0, 1 << 20)
        _whole("max-connections", self.max_connections, 1, 1 << 20)
        _whole("state-cache", self.state_cache, 0, 1 << 50)
        _whole("max-body", self.max_body, 1 << 10, 1 << 30)
        _seconds("timeout", self.timeout, 1.0, 7 * 86400.0)
        _seconds("grace", self.grace, 0.0, 86400.0)
        if self.log not in LOGS:
            raise ValueError(f"log is {self.log!r}; it must be {' or '.join(map(repr, LOGS))}")
        for origin in self.cors:
            if origin != "*" and (
                not origin.startswith(("http://", "https://")) or "/" in origin[8:]
            ):
                raise ValueError(f"cors {origin!r} is no origin such as https://chat.example.org")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _seconds(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be from {low:g} to {high:g} seconds, got {value!r}")
