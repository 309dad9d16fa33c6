"""A conversation's side of the terminal: lines that are typed, and words that are not broken.

A line can be edited and recalled (readline, where Python has it); what was typed is kept between
sessions in `$XDG_STATE_HOME/nomatmul/chat_history`.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

USER = "you> "
MODEL = "model: "
PASTE_SECONDS = 0.05  # lines that come faster after each other than that were pasted
_HISTORY_LINES = 1000


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Line editing with a history that outlives the session; nothing where stdin is no terminal."""
    readline = _readline() if sys.stdin.isatty() else None
    if readline is None:
        yield
        return
    path = _history_file()
    # A history that cannot be read or written costs comfort only.
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def read_turn() -> str | None:
    """The next block that was typed or pasted, None at the end of input.

    At a terminal, lines that arrive together (a paste) are one turn and Ctrl-C drops what is half
    typed ("" then); in a pipe a line is a turn.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    try:
        lines = [input(USER)]
        while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            try:
                lines.append(input())
            except EOFError:
                break
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\n(Ctrl-D or /exit ends the conversation)", file=sys.stderr)
        return ""
    return "\n".join(lines)


class WordWrap:
    """Passes text on in whole words, with a line's end before a word that would not fit."""

    def __init__(self, write: Callable[[str], Any], width: int, column: int = 0) -> None:
        self._write, self._width, self._column = write, width, column
        self._space = self._word = ""

    def push(self, text: str) -> None:
        """Take text; a word goes out when it is known to have ended."""
        for character in text:
            if character == "\n":
                self.finish()
                self._put("\n")
                self._column = 0
            elif character.isspace():
                self._end_word()
                self._space += " " if character == "\t" else character
            else:
                if _columns(character) == 2:  # scripts without spaces break between any two
                    self._end_word()
                self._word += character

    def finish(self) -> None:
        """Pass on what was kept back."""
        self._end_word()
        self._put(self._space)
        self._space = ""

    def _end_word(self) -> None:
        if not self._word:
            return
        if self._column and self._column + _columns(self._space + self._word) > self._width:
            self._space, self._column = "", 0
            self._write("\n")
        self._put(self._space + self._word)
        self._space = self._word = ""

    def _put(self, text: str) -> None:
        if text:
            self._write(text)
            self._column += _columns(text)


def terminal_writer(column: int) -> WordWrap | None:
    """What wraps words on standard output, of which a line has begun; None if it is no terminal."""
    if not sys.stdout.isatty():
        return None
    return WordWrap(lambda text: print(text, end="", flush=True), _width(), column)


def _width() -> int:
    return max(20, shutil.get_terminal_size().columns)


def _columns(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _history_file() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "nomatmul" / "chat_history"


def _readline() -> Any:
    try:
        import readline
    except ImportError:  # Windows, some builds: lines are then plain
        return None
    return readline
