"""Processes that warm up together and measure one at a time. A library.

A benchmark starts one process a variant (so that peak memory is its own) with its job as JSON after
--child. The process builds and compiles, prints "ready", waits for "go" on its standard input,
measures while all others wait idle, and prints "done".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_common import python_path
from with_parent import kill_group, with_parent

from nomatmul.evaluate.rows import append_row


@dataclasses.dataclass
class Child:
    """A started process. label: what its lines and its error row are called."""

    label: dict[str, Any]
    process: subprocess.Popen[str]
    lines: queue.Queue[str] = dataclasses.field(default_factory=queue.Queue)
    state: str = ""  # "ready", "gone" (it ended by itself) or "" (still at it)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("gone")

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in self.label.values())

    def answer(self, until: float) -> str:
        """ "ready", "done", "gone", or "" when the time is over; other lines are passed on."""
        while (left := until - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=left)
            except queue.Empty:
                break
            if line.strip() in ("ready", "done", "gone"):
                return line.strip()
            print(f"[{self.name}] {line}", end="", flush=True)
        return ""

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write("go\n")
            self.process.stdin.flush()


def start(script: str, label: dict[str, Any], job: dict[str, Any], **variables: str) -> Child:
    """Start `script` as the process of one job; its errors go to our standard error."""
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
    process = subprocess.Popen(
        [sys.executable, script, "--child", json.dumps(job)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=with_parent(),
    )  # fmt: skip
    return Child(label, process)


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM as an exception: a run that is cut ends its processes and says what it has."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(
    args: argparse.Namespace,
    child: Callable[[dict[str, Any]], None],
    measure_all: Callable[[argparse.Namespace], None],
    table: Callable[[Path], list[str]],
) -> None:
    """A script's main: the child of --child, or all of them and then the table of the rows.

    args: child, table (only print it) and out, the folder of rows.
    """
    if args.child:
        return child(json.loads(args.child))
    with terminated():
        try:
            if not args.table:
                measure_all(args)
        finally:
            print("\n".join(table(args.out) or ["no row"]), flush=True)


def run_wave(
    wave: list[Any],
    launch: Callable[[Any], Child],
    rows: Path,
    *,
    warm_seconds: float,
    measure_seconds: float,
    deadline: float,
) -> list[Any]:
    """All warm up together until `warm_seconds` are over, then each measures in its turn.

    deadline: of time.monotonic(). What goes wrong becomes a row with "error". Returns the jobs
    that ended while they warmed up beside others: they may have found too little memory, and are
    worth another try alone.
    """
    children: list[Child] = []
    try:
        children += [launch(job) for job in wave]
        return _warm_and_measure(children, wave, rows, warm_seconds, measure_seconds, deadline)
    finally:
        for child in children:
            kill_group(child.process)  # with the processes that compile for it


def _warm_and_measure(
    children: list[Child],
    wave: list[Any],
    rows: Path,
    warm_seconds: float,
    measure_seconds: float,
    deadline: float,
) -> list[Any]:
    warm_until = min(time.monotonic() + warm_seconds, deadline - 5)
    again = []
    for child in children:
        child.state = child.answer(warm_until)
    for child, job in zip(children, wave, strict=True):
        limit = min(time.monotonic() + measure_seconds, deadline)
        words = "was not ready in time"
        if child.state == "gone":
            words = "failed while it warmed up"
            if len(wave) > 1:
                again.append(job)
                words = "failed beside others, will be tried alone"
        elif child.state == "ready" and limit > time.monotonic() + 2:
            child.go()
            words = {"done": "", "gone": "failed while it measured"}.get(
                child.answer(limit), "was cut while it measured"
            )
        if words:
            append_row(rows, {**child.label, "error": words})
            print(f"{child.name}: {words}", flush=True)
        kill_group(child.process)
    return again


def wait_for_go() -> bool:
    """The child's side: say that the warm-up is over; True when it is our turn."""
    print("ready", flush=True)
    return sys.stdin.readline().strip() == "go"
