"""Run all tests that need a GPU and write what they found as a table.

    PYTHONPATH=src python benchmarks/gpu_tests.py --out benchmarks/results/DATE-gpu

Runs tests/gpu and the few tests of other rooms that use CUDA where it is there. Writes
gpu-tests.md (one line a test: its cases and their fate), gpu-tests.json and gpu-tests.xml (JUnit)
to --out. Ends with 1 if a case failed, if none ran, or if the time ran out.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_common import ROOT, describe, environment, table

TESTS = ("tests/gpu", "tests/ops/test_mlgru.py", "tests/train/test_batches.py")


@dataclasses.dataclass
class Test:
    """All cases of one test function."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cases: list[str] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)


class Recorder:
    """A pytest plugin that keeps the fate of every case."""

    def __init__(self) -> None:
        self.tests: dict[str, Test] = collections.defaultdict(Test)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name, _, case = report.nodeid.partition("[")
        case = case.rstrip("]")
        test = self.tests[name]
        test.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":
            setattr(test, report.outcome, getattr(test, report.outcome) + 1)
            if case:
                test.cases.append(case)
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                test.reasons.append(str(report.longrepr[2]).removeprefix("Skipped: "))
            elif report.outcome == "failed":
                test.reasons.append(f"{case}: {report.longreprtext.strip().splitlines()[-1]}")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Of other rooms' files only what is about devices."""
        kept, left = [], []
        for item in items:
            ours = item.path.parent.name == "gpu" or re.search("gpu|cuda|device", item.name)
            (kept if ours else left).append(item)
        if kept and left:
            config.hook.pytest_deselected(items=left)
            items[:] = kept

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.tests[report.nodeid].failed += 1
            self.tests[report.nodeid].reasons.append(str(report.longrepr).splitlines()[-1])


def run(paths: list[str], out: Path, seconds: int, options: list[str]) -> tuple[Recorder, int]:
    """pytest in this process; an alarm ends it like Ctrl-C, with what ran so far kept."""
    recorder = Recorder()

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(f"{seconds} s are over")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    junit = f"--junitxml={out / 'gpu-tests.xml'}"
    try:
        code = pytest.main([*paths, junit, "-p", "no:cacheprovider", *options], plugins=[recorder])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return recorder, int(code)


def shorten(texts: list[str], length: int = 90) -> str:
    text = ", ".join(dict.fromkeys(texts)).replace("|", "/")
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= length else text[: length - 1] + "…"


def page(recorder: Recorder, about: dict[str, Any], code: int) -> str:
    rows = []
    for name, test in sorted(recorder.tests.items()):
        cases = test.passed + test.failed + test.skipped
        rows.append(
            [
                f"`{name.removeprefix('tests/')}`", cases, shorten(test.cases) or None,
                test.passed, test.failed, test.skipped, f"{test.seconds:.1f}",
            ]
        )  # fmt: skip
    total = [sum(getattr(t, key) for t in recorder.tests.values()) for key in FATES]
    rows.append(["**all**", sum(total), None, *total, f"{seconds_of(recorder):.1f}"])
    header = ["test", "cases", "shapes and dials", "passed", "failed", "skipped", "seconds"]
    lines = ["# GPU tests", "", describe(about) + f"; pytest ended with {code}.", ""]
    lines += table(header, rows)
    notes = [(name, t.reasons) for name, t in sorted(recorder.tests.items()) if t.reasons]
    if notes:
        lines += ["", "Failures and reasons of skips:", ""]
        lines += [f"- `{name}`: {shorten(reasons, 400)}" for name, reasons in notes]
    return "\n".join(lines) + "\n"


FATES = ("passed", "failed", "skipped")


def seconds_of(recorder: Recorder) -> float:
    return sum(test.seconds for test in recorder.tests.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=400, help="stop after so long")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    parser.add_argument("--tests", nargs="+", default=[str(ROOT / path) for path in TESTS])
    parser.add_argument("--allow-skips", action="store_true", help="success without any GPU too")
    parser.add_argument("options", nargs="*", help="more options of pytest, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    about = environment(args.commit)
    recorder, code = run(args.tests, args.out, args.seconds, args.options)
    text = page(recorder, about, code)
    (args.out / "gpu-tests.md").write_text(text)
    tests = {name: dataclasses.asdict(test) for name, test in sorted(recorder.tests.items())}
    document = {"machine": about, "pytest": code, "tests": tests}
    (args.out / "gpu-tests.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)
    if code == 0 and not args.allow_skips and not any(t.passed for t in recorder.tests.values()):
        print("no test ran: is there a GPU?", file=sys.stderr)
        return 1
    return int(code != 0)


if __name__ == "__main__":
    raise SystemExit(main())
