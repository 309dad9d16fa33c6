"""Which replica has seen the beginning of a request: chains of hashes and a table of them.

A request is cut where another may have the same beginning: behind each message that a client wrote,
or at growing lengths of a prompt. Each cut is named by a hash of all before it, so equal names mean
equal beginnings, and the table says where the longest one went last.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TABLE_SIZE = 1 << 16  # beginnings that are remembered, the least recently used one goes first
STATES = "/v1/states/"
_FIRST_CUT, _GROWTH = 64, 1.125  # characters or tokens of a prompt


@dataclass(frozen=True)
class Link:
    """A beginning of a request. own: it is more than what many conversations share (a system
    message, a small part of a prompt)."""

    name: bytes
    own: bool


def chain(body: bytes) -> list[Link]:
    """The beginnings of a request, short ones first; [] for a body that is none."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(values, dict):
        return []
    root = hashlib.blake2b(_text(values.get("model")), digest_size=16)
    messages = values.get("messages")
    parts = _said(messages) if isinstance(messages, list) else _pieces(values.get("prompt"))
    links = []
    for piece, own in parts:
        root.update(len(piece).to_bytes(8, "little") + piece)
        links.append(Link(root.digest(), own))
    return links


def state_of(path: str, body: bytes) -> str | None:
    """The name of the named state that a request is about, or goes on from; None for no such."""
    if path.startswith(STATES):
        return path[len(STATES) :] or None
    try:
        values = json.loads(body) if b'"state"' in body else {}
    except (ValueError, RecursionError):
        return None
    name = values.get("state") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def _said(messages: Sequence[Any]) -> Iterator[tuple[bytes, bool]]:
    """What was said to the model; its own answers follow from that, or are sent as they came."""
    for message in messages:
        if isinstance(message, dict) and message.get("role") != "assistant":
            role = _text(message.get("role"))
            content = role + b"\0" + _text(message.get("content"))
            yield content, role not in (b"system", b"developer")


def _pieces(prompt: Any) -> Iterator[tuple[bytes, bool]]:
    """The first prompt of a request in pieces, and its end."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not isinstance(prompt, str | list):
        return
    start, end = 0, float(_FIRST_CUT)
    while start < len(prompt):
        cut = min(int(end), len(prompt))
        yield _text(prompt[start:cut]), 4 * cut >= len(prompt)
        start, end = cut, end * _GROWTH


def _text(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return json.dumps(value, sort_keys=True).encode()


class PrefixTable:
    """Remembers which replica read which beginning; of one thread."""

    def __init__(self, size: int = TABLE_SIZE) -> None:
        self._size = size
        self._replica: OrderedDict[bytes, int] = OrderedDict()

    def choose(
        self, links: Sequence[Link], alive: Collection[int], load: Mapping[int, int], slack: int
    ) -> int:
        """The replica for a request: the one that has read most of it, unless that is little or it
        has `slack` requests more than another; else the one with the fewest.

        Raises ValueError where none is alive.
        """
        if not alive:
            raise ValueError("no replica is alive")
        least = min(load[replica] for replica in alive)
        for link in reversed(links):
            replica = self._replica.get(link.name)
            if replica is not None and replica in alive:
                if load[replica] < least + (slack if link.own else 1):
                    return replica
                break
        return min(alive, key=lambda replica: (load[replica], replica))

    @staticmethod
    def of_state(name: str, replicas: int, alive: Collection[int]) -> int:
        """The replica that keeps the named states of this name, or the next one that is alive.

        Raises ValueError where none is.
        """
        first = zlib.crc32(name.encode("utf-8", "surrogatepass"))
        for step in range(replicas):
            if (replica := (first + step) % replicas) in alive:
                return replica
        raise ValueError("no replica is alive")

    def record(self, links: Sequence[Link], replica: int) -> None:
        """Remember that a replica has read a request."""
        for link in links[-self._size :]:
            self._replica[link.name] = replica
            self._replica.move_to_end(link.name)
        while len(self._replica) > self._size:
            self._replica.popitem(last=False)
