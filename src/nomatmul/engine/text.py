"""From tokens to text while they are made: whole characters only, and stop strings cut off.

A character may span several byte-level tokens, and a stop string may span tokens or begin in the
middle of one, so both hold text back until it is certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "�"  # what a tokenizer writes for bytes that are no character (yet)
# No character has more than 4 bytes, so after so many tokens without one it never comes.
_MAX_WAIT = 8
# Tokens of the prompt decoded along with new ones: tokenizers drop a leading space otherwise.
_CONTEXT = 6


class Detokenizer:
    """Turns token ids into text piece by piece; the pieces join to the text of all tokens."""

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])
        self._start = 0  # where decoding starts
        self._read = len(self._ids)  # tokens whose text is out
        self._waits = 0

    def push(self, token: int) -> str:
        """Return the text that this token completes, perhaps none."""
        self._ids.append(token)
        piece = self._pending()
        if piece.endswith(BROKEN) and self._waits < _MAX_WAIT:
            self._waits += 1
            return ""
        self._waits = 0
        if piece:
            self._start, self._read = self._read, len(self._ids)
            if len(self._ids) > 4 * _CONTEXT:
                del self._ids[: self._start]
                self._read -= self._start
                self._start = 0
        return piece

    def finish(self) -> str:
        """Return the rest; a character that was never completed is left out."""
        piece = self._pending().rstrip(BROKEN)
        self._start = self._read = len(self._ids)
        return piece

    def _pending(self) -> str:
        old = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class StopCutter:
    """Passes text on up to the first stop string; keeps back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is certain now; sets `stopped` when a stop string is complete."""
        if self.stopped:
            return ""
        self._held += text
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            result, self._held = self._held[: min(ends)], ""
            return result
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        result, self._held = self._held[:cut], self._held[cut:]
        return result

    def finish(self) -> str:
        """Return what was kept back: no stop string came of it."""
        result, self._held = self._held, ""
        return result

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text with which `stop` begins."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


def checked_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple; raises ValueError for an empty one or another type."""
    if stop is not None and not isinstance(stop, str | Sequence):
        raise ValueError(f"stop must be a text or a list of texts, got {stop!r}")
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in strings:
        if not isinstance(text, str) or not text:
            raise ValueError(f"a stop string must be a non-empty text, got {text!r}")
    return strings
