"""Processes that train cells: on each GPU some train while the next ones start and compile.

A cell has a process of its own (`studies.compare.cell`), so that what one leaves behind,
or its crash, touches no other.

A library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_common import python_path
from nomatmul.train import children
from studies.compare.plan import Cell

_GRACE = 15.0  # seconds after the deadline that cut runs have to write their rows


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """devices: "cpu", "cuda:0", ...; lanes: cells that train at once on a GPU; ahead: further ones
    that start and compile meanwhile. deadline: seconds since the epoch, 0 for none. program: the
    module that trains a cell."""

    devices: tuple[str, ...]
    lanes: int = 2
    ahead: int = 2
    deadline: float = 0.0
    cache: Path | None = None
    threads: int = 1
    program: str = "studies.compare.cell"


def run_pool(
    cells: Sequence[Cell],
    options: PoolOptions,
    output: IO[bytes] | None = None,
    log: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
) -> list[str]:
    """Train all cells, in order; the reasons of those that failed.

    Every device takes the next cell as soon as it has room. output: where the processes write, the
    own stderr if None. tick: called now and then by the main thread. Ctrl-C ends them, and what
    they have written as rows stays.
    """
    waiting: deque[Cell] = deque(cells)
    lock, failed = threading.Lock(), list[str]()
    devices = [_Device(options, d, waiting, lock, output, log, failed) for d in options.devices]
    threads = [threading.Thread(target=device.guarded, daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            _raise_errors(devices)
            tick()
        _raise_errors(devices)
    except BaseException:  # also a second Ctrl-C: what is left then dies with this process
        for device in devices:
            device.interrupt()
        raise
    return failed


def _raise_errors(devices: Sequence[_Device]) -> None:
    for device in devices:
        if device.error is not None:
            raise device.error


class _Device:
    """The processes of one device."""

    def __init__(
        self,
        options: PoolOptions,
        device: str,
        waiting: deque[Cell],
        lock: threading.Lock,
        output: IO[bytes] | None,
        log: Callable[[str], None],
        failed: list[str],
    ) -> None:
        self.options, self.device, self.output, self.log = options, device, output, log
        self.waiting, self.lock, self.failed = waiting, lock, failed
        self.ready: deque[tuple[Cell, subprocess.Popen[bytes]]] = deque()
        self.running: list[tuple[Cell, subprocess.Popen[bytes]]] = []
        self.interrupted = False
        self.error: BaseException | None = None

    def guarded(self) -> None:
        """`run`, with no process left behind it; its error is kept for the main thread."""
        try:
            self.run()
        except BaseException as error:  # raised again by `run_pool`
            self.error = error
        finally:
            self._kill()

    def interrupt(self) -> None:
        """End all processes now: their finished runs are rows already."""
        self.interrupted = True
        self._kill()

    def _kill(self) -> None:
        for _, process in [*self.ready, *self.running]:
            process.kill()
            process.wait()

    def run(self) -> None:
        """Until all is done, or some seconds after the deadline."""
        gpu = self.device != "cpu"
        lanes, ahead = (self.options.lanes, self.options.ahead) if gpu else (1, 0)
        deadline = self.options.deadline
        while True:
            self.running = [pair for pair in self.running if not self._ended(*pair)]
            if self.interrupted:
                return
            if deadline and time.time() > deadline:
                self._stop()
                return
            while len(self.ready) + len(self.running) < lanes + ahead and (cell := self._next()):
                self.ready.append((cell, self._start(cell)))
            while self.ready and len(self.running) < lanes:
                pair = self.ready.popleft()
                _send(pair[1], b"go\n", close=True)
                self.running.append(pair)
            if not self.running and not self.ready:
                return
            time.sleep(0.1)

    def _next(self) -> Cell | None:
        with self.lock:
            return self.waiting.popleft() if self.waiting else None

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        device, lanes = ("cpu", 1) if self.device == "cpu" else ("cuda", self.options.lanes)
        deadline = self.options.deadline
        cell = dataclasses.replace(cell, device=device, deadline=deadline, lanes=lanes)
        self.log(f"{self.device}: {cell.section} {cell.variant}, seeds {list(cell.seeds)}")
        process = subprocess.Popen(
            children.command(self.options.program),
            env=self._environment(cell),
            stdin=subprocess.PIPE,
            stdout=self.output if self.output is not None else subprocess.DEVNULL,
            stderr=self.output,
            start_new_session=True,  # Ctrl-C reaches us alone
        )
        _send(process, cell.to_json().encode() + b"\n")
        return process

    def _environment(self, cell: Cell) -> dict[str, str]:
        values: dict[str, Any] = {**os.environ, "PYTHONUNBUFFERED": "1"}
        values["PYTHONPATH"] = python_path()
        if cell.ops:
            values["NOMATMUL_OPS"] = cell.ops
        if self.device == "cpu":
            values["OMP_NUM_THREADS"] = str(self.options.threads)
            return values
        values["CUDA_VISIBLE_DEVICES"] = self.device.removeprefix("cuda:").replace("cuda", "0")
        values["OMP_NUM_THREADS"] = values["TORCHINDUCTOR_COMPILE_THREADS"] = "6"
        if self.options.cache is not None:
            values["TORCHINDUCTOR_CACHE_DIR"] = str(self.options.cache / "inductor")
            values["TRITON_CACHE_DIR"] = str(self.options.cache / "triton")
        return values

    def _ended(self, cell: Cell, process: subprocess.Popen[bytes]) -> bool:
        code = process.poll()
        if code and not self.interrupted:
            text = f"{cell.section} {cell.variant} ended with exit status {code}"
            self.failed.append(text)
            self.log(text)
        return code is not None

    def _stop(self) -> None:
        """Cut runs have some seconds to write their rows; what has not begun ends at once."""
        for _, process in self.ready:
            process.kill()
        end = time.time() + _GRACE
        for _, process in [*self.running, *self.ready]:
            try:
                process.wait(timeout=max(end - time.time(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _send(process: subprocess.Popen[bytes], words: bytes, close: bool = False) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it failed already: its exit status says so
        process.stdin.write(words)
        process.stdin.flush()
        if close:
            process.stdin.close()
