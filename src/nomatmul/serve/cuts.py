"""Where reading a prompt stops for a snapshot, in models whose state each token overwrites.

A stop costs about as much as three tokens of a prompt: the copy itself a fifth of that, the rest is
a shorter step. So a cold prompt of many short messages does not stop at each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

# Behind the last so many messages there is a snapshot whatever their distance: there conversations
# go on, are edited and branch. Turns that a conversation takes here are all among them.
LAST = 4
# Behind earlier messages only so many ids apart.
DISTANCE = 512
# In a text without messages as often, and further apart the longer it is: at most an EIGHTH of what
# is read has to be read again.
INTERVAL, EIGHTH = 2048, 8
# What follows a text may change its last tokens (a space at its end belongs to the next word): of
# one that others will begin with there is a snapshot so many before the end, too.
TAIL = 4


def cuts_of(length: int, start: int, boundaries: Sequence[int]) -> list[int]:
    """Return positions start < p <= length, ascending; the last one is `length`."""
    ends = sorted({end for end in boundaries if start < end < length})
    found, at = [], start
    for number, end in enumerate([*ends, length]):
        while end - at > (interval := max(INTERVAL, at // EIGHTH)):
            at += interval
            found.append(at)
        if end - at >= DISTANCE or number >= len(ends) - LAST:
            found.append(end)
            at = end
    return found
