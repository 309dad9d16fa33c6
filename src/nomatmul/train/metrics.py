"""What a run reports: metrics.jsonl, TensorBoard event files, a progress bar or plain lines.

metrics.jsonl has one JSON object a line, each with "step" (optimiser steps taken so far). Training
rows: loss (nats a token), grad_norm, learning_rate; the last of a log interval also has
tokens_per_second, tokens and elapsed. Held-out rows: valid_loss, valid_bits_per_byte,
valid_tokens, valid_bytes. Diagnostic rows: see diagnostics.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nomatmul.formats.files.atomic import named, write_file


class MetricsLog:
    """Appends rows to metrics.jsonl and to TensorBoard, from step `first_step` on.

    Rows and text samples of later steps, which a killed run may have left, are removed first, so
    that the files are one history without doublets.
    """

    def __init__(self, out: Path, first_step: int) -> None:
        self.path = out / "metrics.jsonl"
        _drop_rows_after(self.path, first_step)
        self._samples = out / "samples.txt"
        _drop_samples_after(self._samples, first_step)
        self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (see close)
        self._board = _tensorboard(out / "tensorboard", first_step)

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def write(self, row: dict[str, Any], group: str) -> None:
        """Add one row; its numbers appear in TensorBoard as group/name."""
        with _naming(self.path):
            self._file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{group}/{name}", value, row["step"])

    def write_text(self, text: str, step: int) -> None:
        """Add a sample of text to samples.txt and TensorBoard."""
        with _naming(self._samples), open(self._samples, "a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text}\n")
        if self._board is not None:
            self._board.add_text("sample", text, step)

    def flush(self) -> None:
        """Let readers see the rows so far. Raises OSError naming the file when the disk is full."""
        with _naming(self.path):
            self._file.flush()

    def sync(self) -> None:
        """Make the rows so far survive a crash of the machine."""
        self.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write all of it."""
        self.sync()
        self._file.close()
        if self._board is not None:
            self._board.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of a full disk get the file's name."""
    try:
        yield
    except OSError as error:
        raise named(error, path) from None


class NoMetrics:
    """Takes what `MetricsLog` takes and writes nothing: for all ranks but the first."""

    has_tensorboard = True

    def write(self, row: dict[str, Any], group: str) -> None: ...

    def write_text(self, text: str, step: int) -> None: ...

    def flush(self) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl; a half-written last line is left out."""
    rows = []
    for line in (Path(out) / "metrics.jsonl").read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = [row for row in read_metrics(path.parent) if row.get("step", 0) <= step]
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))


def _drop_samples_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    text = path.read_bytes()
    for heading in re.finditer(rb"^--- step (\d+) ---$", text, re.MULTILINE):
        if int(heading[1]) > step:
            write_file(path, text[: heading.start()])
            return


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=first_step + 1)


class Console:
    """Progress on stderr: a bar where that is a terminal and rich is installed, else plain lines.

    quiet: only warnings are shown; silent: not even those.
    """

    def __init__(self, quiet: bool = False, *, silent: bool = False) -> None:
        self.quiet = quiet or silent
        self.silent = silent
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0

    def log(self, text: str) -> None:
        """Show a line, unless quiet."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Show a warning, unless silent."""
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        if self.silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self, title: str) -> None:
        """Begin showing progress."""
        if self.quiet or not sys.stderr.isatty():
            return
        try:
            from rich import progress
            from rich.console import Console as RichConsole
        except ImportError:
            return
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=RichConsole(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(
            title, total=1.0, completed=0.0, text="preparing the first step"
        )

    def progress(self, share: float, text: str) -> None:
        """Show how far the work is. share: of it that is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, text=text)
        elif not self.quiet and time.monotonic() - self._last_line >= 5:
            self._last_line = time.monotonic()
            print(f"{100 * share:5.1f}%  {text}", file=sys.stderr, flush=True)

    def moving(self, share: float, text: str) -> None:
        """Progress between reports: on a bar only."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, text=text)

    def preparing(self, what: str, done: int, of: int) -> None:
        """Progress of the token shards."""
        due = not done or time.monotonic() - self._last_line >= 5  # a beginning is always shown
        if not self.quiet and due:
            self._last_line = time.monotonic()
            print(preparing_words(what, done, of), file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def preparing_words(what: str, done: int, of: int) -> str:
    """Progress of preparing the data: a count where there is one, else that it goes on."""
    if not done:
        return f"{what} ..."
    return f"{what}: {done:,}" + (f" of {of:,}" if of else "")


def duration(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    seconds = max(int(seconds), 0)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}"
