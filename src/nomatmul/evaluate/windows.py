"""Windows in which a model with a limit of positions reads a text that is longer."""

from __future__ import annotations

from collections.abc import Iterator


def windows(targets: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first) for `targets` tokens that are predicted, `size` positions.

    The ids [start, end) are read from an empty state, and the predictions behind [first, end) are
    taken. Windows overlap by half, so that a token is scored where it has more before it.
    """
    done = 0
    for start in range(0, targets, max(1, size // 2)):
        end = min(start + size, targets)
        yield start, end, done
        done = end
        if done == targets:
            return
