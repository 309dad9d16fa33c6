"""`chat` at a pseudo-terminal: who speaks, editing, interrupts, history."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from nomatmul.cli.terminal import MODEL, USER

CTRL_D, UP = b"\x04", b"\x1b[A"
PROMPT = USER.encode()


class Terminal:
    """A chat in a terminal of some columns."""

    def __init__(self, model, home, *options, columns=60):
        self.ours, theirs = os.openpty()
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nomatmul", "chat", "--model", str(model), "--seed", "1",
             *map(str, options)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**environment, "XDG_STATE_HOME": str(home), "TERM": "dumb"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def read_until(self, end: bytes) -> str:
        """What is shown up to some bytes that end it."""
        seen = b""
        while not seen.endswith(end):
            assert select.select([self.ours], [], [], 60)[0], seen
            seen += os.read(self.ours, 4096)
        return seen.decode().replace("\r\n", "\n")

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def interrupt(self) -> None:
        """Ctrl-C, as late as a person presses it.

        A signal that comes while readline handles a key is seen by Python at the next key only.
        """
        time.sleep(0.2)
        self.type(b"\x03")

    def close(self) -> int:
        self.process.wait(timeout=60)
        os.close(self.ours)
        return self.process.returncode


@pytest.fixture
def chat(packed, tmp_path):
    started = []

    def start(*options, columns=60):
        started.append(Terminal(packed, tmp_path, *options, columns=columns))
        return started[-1]

    yield start
    for terminal in started:
        terminal.process.kill()
        terminal.process.wait()


def test_speakers_speed_and_help(chat):
    terminal = chat("--max-tokens", 6)
    terminal.read_until(PROMPT)
    terminal.type(b"w1 w2\n")
    answer = terminal.read_until(PROMPT)
    assert re.search(rf"^{MODEL}( ?w\d+)+$", answer, re.MULTILINE), answer
    assert re.search(r"\[6 tokens, [0-9.]+ tokens/s\]", answer), answer
    terminal.type(b"/help\n")
    helped = terminal.read_until(PROMPT)
    assert all(word in helped for word in ("/help", "/reset", "/save FILE", "/load FILE", "/exit"))
    terminal.type(b"/exit\n")
    assert terminal.close() == 0


def test_ctrl_c_drops_a_half_typed_line_and_ctrl_d_ends(chat):
    terminal = chat("--max-tokens", 2)
    terminal.read_until(PROMPT)
    terminal.type(b"half a li")
    terminal.read_until(b"half a li")
    terminal.interrupt()
    assert "/exit" in terminal.read_until(PROMPT)
    terminal.type(b"w1\n")
    assert MODEL in terminal.read_until(PROMPT)
    terminal.type(CTRL_D)
    assert terminal.close() == 0


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(chat):
    terminal = chat("--max-tokens", 10**9)
    terminal.read_until(PROMPT)
    terminal.type(b"w1\n")
    seen = terminal.read_until(b"w1\r\n")
    while "w" not in seen.partition(MODEL)[2]:
        seen += os.read(terminal.ours, 4096).decode()
    terminal.interrupt()
    terminal.read_until(PROMPT)
    terminal.type(b"/exit\n")
    assert terminal.close() == 0


def test_words_end_at_the_edge_of_the_terminal(chat):
    terminal = chat("--max-tokens", 60, columns=23)
    terminal.read_until(PROMPT)
    terminal.type(b"w1\n")
    answer = terminal.read_until(PROMPT)
    lines = answer[answer.index(MODEL) : answer.index("[")].strip().split("\n")
    assert len(lines) > 5
    assert all(len(line) <= 23 for line in lines)
    assert len(" ".join(lines).removeprefix(MODEL).split()) == 60
    terminal.type(b"/exit\n")
    assert terminal.close() == 0


def test_what_was_typed_is_recalled_in_the_next_session(chat, tmp_path):
    if importlib.util.find_spec("readline") is None:
        pytest.skip("this Python was built without readline")
    for keys in (b"w1 w2 w3\n", UP + b"\n"):
        terminal = chat("--max-tokens", 2)
        terminal.read_until(PROMPT)
        terminal.type(keys)
        assert "w1 w2 w3" in terminal.read_until(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.close() == 0
    assert "w1 w2 w3" in (tmp_path / "nomatmul" / "chat_history").read_text()
