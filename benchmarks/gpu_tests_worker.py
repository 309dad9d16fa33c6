"""One of the processes that run the tests of gpu_tests.py: a library, started by that script.

All of them collect the same cases in the same order and take the next one from a counter that they
share, so that compiles run side by side and no list has to be cut beforehand.
"""

from __future__ import annotations

import fcntl
import re
from pathlib import Path
from typing import Any

import pytest

from nomatmul.evaluate.rows import append_row

STOPPED = 3  # exit status: more may be left, but this process is not to be trusted with it


def claim(counter: Path) -> int:
    """The next number, each given out once."""
    with open(counter, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = int(file.read() or 0)
        file.truncate(0)
        file.write(str(number + 1))
    return number


def taken(counter: Path) -> int:
    """How many numbers were given out."""
    return int(counter.read_text() or 0) if counter.exists() else 0


class Worker:
    """A pytest plugin that runs what it claims and writes a row when a case begins and ends.

    half: 0 all cases, 1 or 2 every other one.
    """

    def __init__(self, number: int, rows: Path, counter: Path, half: int) -> None:
        self.number, self.rows, self.counter, self.half = number, rows, counter, half
        self.row: dict[str, Any] = {}
        self.failed = False

    def write(self, **row: Any) -> None:
        append_row(self.rows, {**row, "worker": self.number})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Of other rooms' files only what is about devices; then our half."""
        kept = [
            item
            for item in items
            if item.path.parent.name == "gpu" or re.search("gpu|cuda|device", item.name)
        ]
        if self.half:
            kept = kept[self.half - 1 :: 2]
        if left := [item for item in items if item not in kept]:
            config.hook.pytest_deselected(items=left)
        items[:] = kept

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = True
            reason = str(report.longrepr).strip().splitlines()[-1]
            self.write(case=report.nodeid, outcome="failed", reason=reason)
        elif report.skipped:
            self.write(case=report.nodeid, outcome="skipped", reason=_reason(report))

    def pytest_collection_finish(self, session: Any) -> None:
        if self.number == 0:
            self.write(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        """Files that could not be collected do not keep the others from running."""
        while (number := claim(self.counter)) < len(session.items):
            item = session.items[number]
            self.write(begun=item.nodeid)
            self.row = {"case": item.nodeid, "outcome": "passed", "seconds": 0.0}
            # No next item: what a case made is torn down with it, for another process may have
            # the next one.
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self.row["seconds"] = round(self.row["seconds"], 3)
            self.write(**self.row)
            if self.row["outcome"] == "failed":  # an error of CUDA stays with its process
                session.shouldstop = "a case failed; another process goes on"
                break
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.row["seconds"] += report.duration
        if report.outcome == "passed" or self.row["outcome"] == "failed":
            return
        self.row |= {"outcome": report.outcome, "reason": _reason(report)}


def _reason(report: Any) -> str:
    """An error in a line, the reason of a skip."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    if crash := getattr(report.longrepr, "reprcrash", None):
        return f"{crash.message.splitlines()[0]} ({Path(crash.path).name}:{crash.lineno})"
    text = str(report.longrepr).strip()
    return text.splitlines()[-1] if text else "no reason given"


def run(worker: Worker, paths: list[str], options: list[str]) -> int:
    """0: nothing is left to claim; STOPPED: ended early, or nothing could be collected."""
    code = pytest.main([*paths, "-p", "no:cacheprovider", *options], plugins=[worker])
    done = worker.row.get("outcome") != "failed"
    return 0 if done and int(code) in (0, 1, 5) else STOPPED
