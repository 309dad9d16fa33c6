"""Where reading a prompt stops for a snapshot, in models whose state each token overwrites."""

from __future__ import annotations

from collections.abc import Sequence

# Of the boundaries of messages so many get a snapshot whatever their distance: there a
# conversation goes on, or is edited and branches. Earlier ones only DISTANCE ids apart.
LAST = 8
DISTANCE = 256
# Where there are no boundaries: a long text gets a snapshot as often.
INTERVAL = 2048


def cuts_of(length: int, start: int, boundaries: Sequence[int]) -> list[int]:
    """Return positions start < p <= length, ascending; the last one is `length`."""
    ends = sorted({end for end in boundaries if start < end < length})
    found: list[int] = []
    at = start
    for number, end in enumerate(ends):
        while end - at > INTERVAL:
            at += INTERVAL
            found.append(at)
        if end - at >= DISTANCE or number >= len(ends) - LAST:
            found.append(end)
            at = end
    while length - at > INTERVAL:
        at += INTERVAL
        found.append(at)
    return [*found, length]
