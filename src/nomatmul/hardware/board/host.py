"""The host of a board: loads a compiled model over the serial line, and chats with it.

    python -m nomatmul.hardware.board.host /dev/ttyUSB0 compiled --packed PACKED --prompt "The"

`Board` speaks registers (hardware/registers.py) through anything that reads and writes words.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nomatmul.hardware.board.link import Link, LinkError, SerialPort
from nomatmul.hardware.board.memory_map import MEMORY_WINDOW
from nomatmul.hardware.compile import Compiled, open_compiled
from nomatmul.hardware.design import Design
from nomatmul.hardware.registers import (
    FAULTS,
    VERSION,
    Control,
    Register,
    Status,
    TokenFlag,
    design_words,
)
from nomatmul.hardware.writing import ALL_LOGITS, NO_LOGITS, continued

PATIENCE = 60.0  # seconds that a token may take; a slow memory takes one
_PART = 4080  # words between two reports of progress
_WANT = {0: 0, 1: TokenFlag.WANT_LOGITS | TokenFlag.ARGMAX_ONLY, 2: TokenFlag.WANT_LOGITS}


class Words(Protocol):
    """Reads and writes 32-bit words; `link.Link` is one."""

    def read(self, address: int, count: int, *, same: bool = False) -> list[int]: ...

    def write(self, address: int, words: Sequence[int], *, same: bool = False) -> None: ...


class Board:
    """A board with an accelerator. Raises LinkError for one that is silent, foreign or at fault."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._vocabulary = 0
        (version,) = words.read(Register.VERSION, 1)
        if version != VERSION:
            raise LinkError(f"the board's version is {version:#010x}, this is {VERSION:#010x}")

    def check_design(self, design: Design) -> None:
        """Raises LinkError, naming the parameter, where the board has another design."""
        fields = [field.name for field in dataclasses.fields(Design)]
        found = self._words.read(Register.DESIGN, len(fields))
        for name, there, here in zip(fields, found, design_words(design), strict=True):
            if there != here and name != "probe":
                raise LinkError(f"the board's {name} is {there}, the compiled model's is {here}")

    def load(
        self, compiled: Compiled, progress: Callable[[int, int], None] = lambda done, all: None
    ) -> None:
        """Load program and image, and start. Raises LinkError; ValueError for a damaged image."""
        self.check_design(compiled.design)
        self._words.write(Register.CONTROL, [Control.RESET])
        self._wait(lambda status: not status & Status.RESETTING, "to reset")
        program = _words_of(compiled.program_path)
        self._words.write(Register.PROGRAM_ADDRESS, [0])
        self._words.write(Register.PROGRAM_DATA, program, same=True)
        image = _words_of(compiled.image_path)
        for first in range(0, len(image), _PART):
            self._words.write(MEMORY_WINDOW + first, image[first : first + _PART])
            progress(min(len(image), first + _PART), len(image))
        # what was written first and last must still be there: a smaller memory would wrap
        for at in (0, len(image) - 1):
            if self._words.read(MEMORY_WINDOW + at, 1) != [image[at]]:
                raise LinkError(
                    f"word {at} of the image does not come back: is the memory smaller?"
                )
        self._vocabulary = compiled.vocabulary
        self._words.write(Register.STATUS, [(1 << FAULTS) - 1])
        self._words.write(Register.CONTROL, [Control.RUN])

    def token(self, token: int, want: int, *, fresh: bool = False) -> dict[str, Any]:
        """Run one token; see `writing.continued` for what comes back."""
        self._wait(lambda status: bool(status & Status.TOKEN_ROOM), "for room")
        (before,) = self._words.read(Register.ANSWERS, 1)
        flags = _WANT[want] | (TokenFlag.FRESH if fresh else 0)
        self._words.write(Register.TOKEN, [token | flags])
        if want == NO_LOGITS:
            return {}
        logits = self._logits() if want == ALL_LOGITS else []
        end = time.monotonic() + PATIENCE
        while self._words.read(Register.ANSWERS, 1) == [before]:
            self._check(self._words.read(Register.STATUS, 1)[0])
            if time.monotonic() > end:
                raise LinkError(f"no answer within {PATIENCE:.0f} seconds")
        self._check(self._words.read(Register.STATUS, 1)[0])
        (largest,) = self._words.read(Register.ARGMAX, 1)
        return {"argmax": largest, "logits": logits}

    def _logits(self) -> list[int]:
        logits: list[int] = []
        end = time.monotonic() + PATIENCE
        while len(logits) < self._vocabulary:
            (waiting,) = self._words.read(Register.LOGITS_WAITING, 1)
            if waiting:
                logits += self._words.read(Register.LOGIT, waiting, same=True)
                end = time.monotonic() + PATIENCE
            self._check(self._words.read(Register.STATUS, 1)[0])
            if time.monotonic() > end:
                raise LinkError(f"no logits within {PATIENCE:.0f} seconds")
        return np.array(logits, np.uint32).view(np.int32).tolist()

    def _wait(self, done: Callable[[int], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not done(status := self._words.read(Register.STATUS, 1)[0]):
            self._check(status)
            if time.monotonic() > end:
                raise LinkError(f"the board takes more than {PATIENCE:.0f} seconds {what}")

    def _check(self, status: int) -> None:
        faults = [str(flag.name).lower() for flag in Status if flag < 1 << FAULTS and status & flag]
        if status & Status.HALTED and not status & Status.RESETTING and self._vocabulary:
            raise LinkError(f"the accelerator halted; faults: {', '.join(faults) or 'none'}")
        if faults:
            raise LinkError(f"the accelerator reports {', '.join(faults)}")


def _words_of(path: Path) -> list[int]:
    data = path.read_bytes()
    if not data or len(data) % 4:
        raise ValueError(f"{path} has {len(data)} bytes, not whole words of 32 bits")
    return list(np.frombuffer(data, "<u4").tolist())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="nomatmul.hardware.board.host")
    parser.add_argument("port", help="the serial port, such as /dev/ttyUSB0")
    parser.add_argument("compiled", help="what `nomatmul hardware compile` wrote")
    parser.add_argument("--packed", required=True, help="the model, for its tokenizer")
    parser.add_argument("--prompt", help="one text to continue; without it lines of the terminal")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--baud", type=int, default=2_000_000)
    options = parser.parse_args(arguments)
    try:
        return _chat(options)
    except ValueError as error:  # LinkError too
        print(f"error: {error}", file=sys.stderr)
        return 1


def _chat(options: argparse.Namespace) -> int:
    from nomatmul.engine.language_text import LanguageText
    from nomatmul.engine.sampling import Sampling
    from nomatmul.formats.packed import PackedReader

    reader = PackedReader(options.packed)
    text = LanguageText(reader.tokenizer_path, reader.config)
    text.need_tokenizer()
    compiled = open_compiled(options.compiled)
    scale = 2.0 ** -compiled.summary["fractions"]["logits"]
    sampling = Sampling(temperature=options.temperature, seed=options.seed)
    with SerialPort(options.port, options.baud) as port:
        board = Board(Link(port))
        board.load(
            compiled,
            lambda done, all: print(f"\rloading {done / all:4.0%}", end="", file=sys.stderr),
        )
        print(file=sys.stderr)
        for prompt in [options.prompt] if options.prompt is not None else map(str.strip, sys.stdin):
            ids, fresh = text.prompt_ids(prompt, fresh=True), [True]

            def run(token: int, want: int, fresh: list[bool] = fresh) -> dict[str, Any]:
                answer = board.token(token, want, fresh=fresh[0])
                fresh[0] = False
                return answer

            print(prompt, end="", flush=True)
            ends = reader.config.end_token_ids
            for piece in continued(text, ids, ends, options.max_tokens, sampling, run, scale):
                print(piece, end="", flush=True)
            print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
