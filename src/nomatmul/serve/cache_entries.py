"""What the state cache keeps for a sequence, and the bytes of all of it together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nomatmul.serve.radix import Node

if TYPE_CHECKING:
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float

ID_BYTES = np.dtype(np.int32).itemsize


@dataclass(eq=False)
class Entry:
    """A prefix that is kept: its state in memory, in a file, or both, and the logits behind it.

    Where states only grow, a state serves all that lies above it in the tree: entries there may
    hold nothing but logits. file: the name that it has in the directory, file_logits: whether
    logits are in it. queued, queued_logits: likewise while it is being written. names: those under
    which it is pinned. shared: whether several sequences have gone on from it. charged: what the
    ledger has of it.
    """

    model: str
    node: Node[Entry]
    session: Session | None = None
    logits: Float | None = None
    file: str | None = None
    file_logits: bool = False
    queued: str | None = None
    queued_logits: bool = False
    names: set[str] = field(default_factory=set)
    shared: bool = False
    charged: dict[int, int] = field(default_factory=dict)

    @property
    def serves(self) -> bool:
        """Whether there is a state to go on from."""
        return self.session is not None or self.file is not None

    @property
    def knows_logits(self) -> bool:
        """Whether there are logits, in memory or in the file."""
        return self.logits is not None or (self.file is not None and self.file_logits)

    @property
    def in_memory(self) -> bool:
        """Whether something would be gained by evicting it."""
        return self.session is not None or self.logits is not None


def memory_of(session: Session | None, logits: Float | None) -> dict[int, int]:
    """{address: bytes} of a state and its logits; what several share has the same address."""
    found = {} if session is None else session.memory()
    if logits is not None:
        found = found | {id(logits): logits.nbytes}
    return found


def holder_below(node: Node[Entry], but: Entry | None = None) -> Entry | None:
    """An entry at or below a node that has a state, one in memory if possible; None without any."""
    filed = None
    for place in node.below():
        entry = place.value
        if entry is None or entry is but:
            continue
        if entry.session is not None:
            return entry
        if entry.file is not None and filed is None:
            filed = entry
    return filed


class Ledger:
    """Bytes of memory that several owners share: each address counts once. total: their sum."""

    def __init__(self) -> None:
        self.total = 0
        self._owners: dict[int, int] = {}

    def add(self, memory: Mapping[int, int]) -> None:
        """Count what one more owner holds."""
        for address, size in memory.items():
            owners = self._owners.get(address, 0)
            self._owners[address] = owners + 1
            if not owners:
                self.total += size

    def remove(self, memory: Mapping[int, int]) -> None:
        """Count what an owner held no longer, as it was given to `add`."""
        for address, size in memory.items():
            self._owners[address] -= 1
            if not self._owners[address]:
                del self._owners[address]
                self.total -= size
