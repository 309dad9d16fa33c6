"""From tokens to text while they are made: whole characters only, and stop strings cut off.

A character may span several tokens, and a stop string may span tokens or begin in the middle of
one, so both hold text back until it is certain.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

BROKEN = "�"  # what a tokenizer writes for bytes that are no character (yet)
_LONG = 4096  # characters that are tokenised in some milliseconds
_UNFINISHED = 3  # bytes of a character that lacks its last one, at most
_CONTEXT = 16  # tokens of a context that new ones are decoded with, where no character is cut
_BYTE_NAME = re.compile(
    r"<0x([0-9A-Fa-f]{2})>"
)  # a token of one byte in vocabularies with fallback


def encoding_of(tokenizer: Tokenizer, text: str, *, special: bool = False) -> Encoding:
    """The tokens of a text. special: with those that the tokenizer puts around one.

    Other threads of Python go on meanwhile where the text is long: `Tokenizer.encode` alone would
    hold them up, for seconds with a text of megabytes.
    """
    if len(text) <= _LONG:
        return tokenizer.encode(text, add_special_tokens=special)
    return tokenizer.encode_batch([text], add_special_tokens=special)[0]


def named_ids(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.bool_]:
    """Return which of a model's ids the tokenizer has a token for, bool [V].

    A model's vocabulary is often rounded up, so its last ids have no token.
    """
    ids = np.array(list(tokenizer.get_vocab(with_added_tokens=True).values()), np.int64)
    named = np.zeros(vocab_size, bool)
    named[ids[ids < vocab_size]] = True
    return named


class Detokenizer:
    """Turns token ids into text piece by piece.

    The pieces join to the text of context and tokens together, less that of the context alone. A
    context that ends inside a character gives that character to the first piece. Bytes that are no
    character come out as U+FFFD; a byte-fallback vocabulary's own decoder would reject the
    characters next to them as well, here they are kept.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # New tokens are decoded along with some before them, because decoders drop a leading
        # space. Neither the first token that is held nor `_read` lies inside a character.
        self._ids = self._end_of(context)
        self._read = 0  # how many tokens' text is out
        self._read = len(self._ids) - self._open(self._decode(self._ids))

    def push(self, token: int) -> str:
        """Return the text that this token completes, perhaps none."""
        self._ids.append(token)
        piece = self._piece(len(self._ids))
        held = self._open(piece)
        end = len(self._ids) - held
        if held:
            piece = self._piece(end)
        if piece:
            # the tokens of this piece are the context of the next one
            del self._ids[: self._read]
            self._read = end - self._read
        elif not held and self._is_skipped(token):
            self._ids.pop()  # it is no part of any text; many in a row must not pile up
        return piece

    def finish(self) -> str:
        """Return the rest; a character that was never completed is left out."""
        end = len(self._ids)
        piece = self._piece(end)
        held = self._open(piece)
        if held and _BYTE_NAME.fullmatch(self._name(self._ids[-1])):
            piece = self._piece(end - held)
        elif held:
            piece = piece[:-1]
        self._read = end
        return piece

    def _end_of(self, context: Sequence[int]) -> list[int]:
        """The last tokens of a context, from one on that is a text by itself."""
        for start in range(len(context) - _CONTEXT, 0, -1):
            text = self._decode([context[start]])
            if text and BROKEN not in text and not _BYTE_NAME.fullmatch(self._name(context[start])):
                return list(context[start:])
        return list(context)

    def _is_skipped(self, token: int) -> bool:
        """Whether it is a special token, which decoders leave out."""
        name = self._tokenizer.decode([token], skip_special_tokens=False)
        return bool(name) and not self._decode([token])

    def _piece(self, end: int) -> str:
        """The text of the tokens from `_read` to `end`."""
        old = self._decode(self._ids[: self._read])
        new = self._decode(self._ids[:end])
        piece = new[len(old) :]
        if BROKEN in piece or not new.startswith(old):
            # Byte fallback judges a run of bytes as a whole: broken ones spoil what is out already.
            alone = self._decode(self._ids[self._read : end])
            if not new.startswith(old) or alone.count(BROKEN) < piece.count(BROKEN):
                return alone
        return piece

    def _open(self, text: str) -> int:
        """How many of the last tokens, whose text is given, belong to an unfinished character."""
        if not text.endswith(BROKEN):
            return 0
        spelt = [spelt_bytes(self._name(i)) for i in self._ids[self._read :][-_UNFINISHED:]]
        for count in range(1, len(spelt) + 1):
            if _is_unfinished(b"".join(spelt[-count:])[-_UNFINISHED:]):
                return count
        return 0

    def _name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


def _is_unfinished(tail: bytes) -> bool:
    """Whether bytes end with the beginning of a UTF-8 character that lacks its rest."""
    for start in range(len(tail)):
        try:
            if not codecs.getincrementaldecoder("utf-8")().decode(tail[start:]):
                return True
        except UnicodeDecodeError:
            continue
    return False


def spelt_bytes(name: str) -> bytes:
    """The bytes that a token stands for in a byte-fallback or a byte-level vocabulary."""
    if fallback := _BYTE_NAME.fullmatch(name):
        return bytes([int(fallback[1], 16)])
    return bytes(byte_alphabet().get(character, 0) for character in name)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + at): byte for at, byte in enumerate(others)}


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
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:  # the first to be complete: how the text was cut into pieces does not count
            self.stopped = True
            result, self._held = self._held[: min(found)[1]], ""
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
        held = self._held
        at = held.find(stop[0], max(0, len(held) - len(stop) + 1))
        while at >= 0 and not stop.startswith(held[at:]):
            at = held.find(stop[0], at + 1)
        return len(held) - at if at >= 0 else 0


def checked_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple; raises ValueError for an empty one or another type."""
    if stop is not None and not isinstance(stop, str | Sequence):
        raise ValueError(f"stop must be a text or a list of texts, got {stop!r}")
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in strings:
        if not isinstance(text, str) or not text:
            raise ValueError(f"a stop string must be a non-empty text, got {text!r}")
    return strings
