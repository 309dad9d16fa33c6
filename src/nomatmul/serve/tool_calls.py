"""Calls in the text of an answer, read while it is made.

The grammar fixes how a call is written, up to the white space inside its arguments, so what is
read here needs no guessing: a header with the name, a JSON object, a footer.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

Form = Literal["hermes", "llama3", "own"]


@dataclass(frozen=True)
class Syntax:
    """How a form writes calls: opened, a name, between, arguments, closed; joined by a text.

    opened begins with `trigger`, the text from which on the grammar binds a free answer. several:
    whether an answer may hold more than one call. inside: calls may follow other text.
    """

    trigger: str
    opened: str
    between: str
    closed: str
    joined: str
    several: bool
    inside: bool


_TAGGED = Syntax(
    trigger="<tool_call>",
    opened='<tool_call>\n{"name": "',
    between='", "arguments": ',
    closed="}\n</tool_call>",
    joined="\n",
    several=True,
    inside=True,
)
_LLAMA3 = Syntax(
    trigger="{",
    opened='{"name": "',
    between='", "parameters": ',
    closed="}",
    joined="",
    several=False,
    inside=False,
)
SYNTAX: dict[Form, Syntax] = {"hermes": _TAGGED, "own": _TAGGED, "llama3": _LLAMA3}


@dataclass(frozen=True)
class CallDelta:
    """News of one call: `id` and `name` are there in its first delta only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class ToolParser:
    """Reads the text of one choice as it comes. calls: how many calls have begun.

    syntax: None where the answer holds no calls, whatever it says. key: what the ids of calls are
    derived from.
    """

    def __init__(self, syntax: Syntax | None, key: str) -> None:
        self.calls = 0
        self._syntax, self._key = syntax, key
        self._held = ""  # text of which it is not certain yet what it is
        self._begun = False  # whether anything was read
        self._arguments: _Object | None = None  # while a call's arguments are read
        self._footer = ""  # what must follow before anything else counts
        if syntax is not None:
            name = r"([A-Za-z0-9_-]+)"
            parts = map(re.escape, (syntax.opened, syntax.between))
            self._header = re.compile(name.join(parts))

    def push(self, text: str) -> list[str | CallDelta]:
        """What is certain after more text: pieces of content (str), and of calls."""
        if self._syntax is None:
            return [text] if text else []
        self._held += text
        found: list[str | CallDelta] = []
        while (piece := self._next()) is not None:
            if piece != "":
                found.append(piece)
        return found

    def finish(self) -> list[str | CallDelta]:
        """What was held back: content that no call came of. The beginning of a call that was cut
        off before its name was complete says nothing, and is left out."""
        rest, self._held = self._held, ""
        syntax = self._syntax
        if syntax is None or not rest or self.calls or rest.startswith(syntax.trigger):
            return []
        return [rest]

    def _next(self) -> str | CallDelta | None:
        """The next certain piece of what is held, "" for a step without news, None for no more."""
        assert self._syntax is not None
        if not self._held:
            return None
        if self._arguments is not None:
            return self._of_arguments(self._arguments)
        if self._footer:
            count = len(self._footer)
            if len(self._held) < count:
                return None
            self._held, self._footer = self._held[count:], ""
            return ""
        return self._of_text(self._syntax)

    def _of_arguments(self, arguments: _Object) -> CallDelta:
        assert self._syntax is not None
        count = arguments.read(self._held)
        piece, self._held = self._held[:count], self._held[count:]
        if arguments.over:
            self._arguments, self._footer = None, self._syntax.closed
        return CallDelta(self.calls - 1, piece)

    def _of_text(self, syntax: Syntax) -> str | CallDelta | None:
        at = self._held.find(syntax.trigger)
        if not syntax.inside and (at > 0 or (self._begun and at >= 0)):
            at = -1  # no call, which would have been first
        if at < 0:
            return self._content(syntax)
        if at > 0 and not self.calls:
            piece, self._held = self._held[:at], self._held[at:]
            self._begun = True
            return piece
        header = self._header.match(self._held, at)
        if header is None:
            return None
        self._held = self._held[header.end() :]
        self._arguments, self._begun = _Object(), True
        self.calls += 1
        digest = hashlib.sha256(f"{self._key}/{self.calls}".encode()).hexdigest()
        return CallDelta(self.calls - 1, "", "call_" + digest[:24], header[1])

    def _content(self, syntax: Syntax) -> str | None:
        """Text that no trigger begins in; between calls there is none that counts."""
        if self.calls:
            return None
        keep = 0
        if syntax.inside:
            longest = min(len(syntax.trigger) - 1, len(self._held))
            ends = (n for n in range(longest, 0, -1) if self._held.endswith(syntax.trigger[:n]))
            keep = next(ends, 0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        self._begun = self._begun or bool(piece)
        return piece or None


class _Object:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.over = False
        self._depth, self._in_text, self._escaped = 0, False, False

    def read(self, text: str) -> int:
        """How many characters of a piece belong to the object."""
        for at, letter in enumerate(text):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_text = False
            elif letter == '"':
                self._in_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    self.over = True
                    return at + 1
        return len(text)
