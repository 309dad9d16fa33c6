"""The simulation's process: commands in, answers out, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomatmul.hardware.compile import Compiled
from nomatmul.hardware.disassemble import disassemble
from nomatmul.hardware.registers import FAULTS, Status
from nomatmul.hardware.writing import ALL_LOGITS, LARGEST_LOGIT, NO_LOGITS

__all__ = ["ALL_LOGITS", "LARGEST_LOGIT", "NO_LOGITS", "Harness", "Memory", "Stopped"]


@dataclass(frozen=True)
class Memory:
    """The memory beside the accelerator.

    latency: cycles from a request to its first word. bytes_a_cycle: its bandwidth, 0 for a whole
    word each cycle. gap: idle cycles behind a burst. refresh_every, refresh_cycles: it rests so
    long, so often. outstanding: bursts that it takes in ahead. stalls: the seed of random pauses
    of memory and host, None without.
    Raises ValueError naming the value and its limits.
    """

    latency: int = 30
    bytes_a_cycle: float = 0.0
    gap: int = 0
    refresh_every: int = 0
    refresh_cycles: int = 0
    outstanding: int = 8
    stalls: int | None = None

    def __post_init__(self) -> None:
        least = {"latency": 0, "gap": 0, "refresh_every": 0, "refresh_cycles": 0, "outstanding": 1}
        for name, low in least.items():
            if not low <= getattr(self, name) <= 10**6:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, it must be a whole number {low}..{10**6}"
                )
        if not 0 <= self.bytes_a_cycle <= 10**6:
            raise ValueError(f"bytes_a_cycle is {self.bytes_a_cycle}, it must be 0..{10**6}")
        if self.refresh_every and self.refresh_cycles >= self.refresh_every:
            raise ValueError(
                f"refresh_cycles is {self.refresh_cycles}, refresh_every {self.refresh_every}:"
                " the memory would rest all the time"
            )
        if self.stalls is not None and not 0 <= self.stalls < 1 << 32:
            raise ValueError(f"stalls is {self.stalls}, it must be a seed in 0..{(1 << 32) - 1}")

    def words(self) -> list[str]:
        """The harness's options."""
        found = {
            "--latency": self.latency,
            "--bytes-a-cycle": self.bytes_a_cycle,
            "--gap": self.gap,
            "--refresh-every": self.refresh_every,
            "--refresh-cycles": self.refresh_cycles,
            "--outstanding": self.outstanding,
        }
        words = [text for name, value in found.items() for text in (name, str(value))]
        return words if self.stalls is None else [*words, "--stalls", str(self.stalls)]


class Stopped(RuntimeError):
    """The design stopped before a token was done; `answer` is what the harness knows of it."""

    def __init__(self, text: str, answer: dict[str, Any]) -> None:
        super().__init__(text)
        self.answer = answer


class Harness:
    """A simulation at work. A context manager: its process ends with it."""

    def __init__(
        self, simulator: Path, compiled: Compiled, memory: Memory, options: Sequence[str] = ()
    ) -> None:
        self._compiled = compiled
        files = ["--program", str(compiled.program_path), "--image", str(compiled.image_path)]
        # it ends when its standard input does, or its parent: it cannot outlive us
        self._process = subprocess.Popen(
            [str(simulator), *files, "--parent", str(os.getpid()), *memory.words(), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def token(self, token: int, want: int, *, fresh: bool) -> dict[str, Any]:
        """Run one token. want: NO_LOGITS, LARGEST_LOGIT ("argmax") or ALL_LOGITS ("logits").

        Raises Stopped where the design comes to no end, RuntimeError where its process does.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the next line says how
            self._process.stdin.write(f"{token} {want} {int(fresh)}\n")
            self._process.stdin.flush()
        try:
            line = self._process.stdout.readline()
        except BaseException:  # interrupted: nobody waits for the rest of a long token
            self._process.kill()
            raise
        if not line:
            raise RuntimeError(f"the simulation ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Stopped(self._complaint(answer), answer)
        return answer

    def close(self) -> None:
        """End the process; what waveforms it writes are whole then."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _complaint(self, answer: dict[str, Any]) -> str:
        text = f"the accelerator stopped at cycle {answer.get('cycle', 0)}: {answer['error']}"
        at = answer.get("instruction")
        if at is not None and at < len(self._compiled.program):
            text += f"; instruction {at} ({disassemble(self._compiled.program[at])})"
        flags = status_flags(answer.get("status", 0))
        return text + (f"; status {', '.join(flags)}" if flags else "")


def status_flags(status: int) -> list[str]:
    """The names of the faults that a STATUS holds."""
    return [str(flag.name).lower() for flag in Status if flag < 1 << FAULTS and status & flag]
