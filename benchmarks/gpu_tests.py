"""Run all tests that need a GPU, several side by side, and write what they found as a table.

    PYTHONPATH=src python benchmarks/gpu_tests.py --out benchmarks/results/DATE-gpu
    PYTHONPATH=src python benchmarks/gpu_tests.py --out DIR --half 1     # then --half 2
    PYTHONPATH=src python benchmarks/gpu_tests.py --out DIR --table      # of the rows there are

Runs tests/gpu and the few tests of other rooms that use CUDA where it is there. Nothing is timed,
so the processes share the GPU, and kernels compile side by side. gpu-tests-rows.jsonl in --out has
each result as soon as it is known; gpu-tests.md (one line a test: its cases and their fate) and
gpu-tests.json are made of it at the end, also where the time ran out or the run was terminated.
The processes' own words go to gpu-tests.log. Ends with 0 if all passed (or were skipped, some
of tests/gpu not), 1 if a case failed or none of tests/gpu passed, 3 if none failed and some were
not run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_tests_rows
import gpu_tests_worker
from dry_run import add_tiny, temporary
from gpu_children import terminated
from gpu_common import ROOT, environment
from with_parent import kill_group, with_parent

from nomatmul.evaluate.rows import append_row, read_rows

TESTS = ("tests/gpu", "tests/ops/test_mlgru.py", "tests/train/test_batches.py")
TINY = ("tests/gpu/test_train_graph.py",)
FAILED, INCOMPLETE = 1, 3
_POLL = 0.2  # seconds between two looks at the processes


class Pool:
    """The processes that run the cases; one that failed, crashed or hangs is replaced."""

    def __init__(self, args: argparse.Namespace, scratch: Path, log: Any) -> None:
        self.args, self.log = args, log
        self.rows, self.counter = args.out / "gpu-tests-rows.jsonl", scratch / "counter"
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.started = 0
        self.since: dict[int, tuple[str, float]] = {}  # worker: its case, when it was first seen

    def start(self) -> None:
        args, number = self.args, self.started
        words = [sys.executable, __file__, "--worker", str(number), "--out", str(args.out)]
        words += ["--counter", str(self.counter), "--half", str(args.half)]
        words += ["--tests", *args.tests, "--", *args.options]
        variables = {
            "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self.running[number] = subprocess.Popen(
            words, env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
            stdout=self.log, stderr=self.log, preexec_fn=with_parent(),
        )  # fmt: skip
        self.started += 1

    def look(self) -> None:
        """Replace what ended early and what takes too long over one case."""
        codes = {number: process.poll() for number, process in self.running.items()}
        rows = read_rows(self.rows)  # behind that: what had ended has written all it ever will
        open_cases = _open_cases(rows)
        total = next((len(row["collected"]) for row in rows if "collected" in row), 0)
        for number, process in list(self.running.items()):
            code, case = codes[number], open_cases.get(number)
            if case is not None and self.since.get(number, ("", 0))[0] != case:
                self.since[number] = (case, time.monotonic())
            if code is None and case and self._age(number) > self.args.case_seconds:
                kill_group(process)
                self._end(case, "not_run", f"cut after {self.args.case_seconds:.0f} s")
            elif code is None:
                continue
            elif case is not None:
                self._end(case, "failed", f"its process ended with {code}")
            elif code not in (0, gpu_tests_worker.STOPPED):
                self._end("processes", "failed", f"one ended with {code}, see gpu-tests.log")
            del self.running[number]
            if (case or code == gpu_tests_worker.STOPPED) and self._left(total):
                self.start()

    def _age(self, number: int) -> float:
        return time.monotonic() - self.since[number][1]

    def _left(self, total: int) -> bool:
        return gpu_tests_worker.taken(self.counter) < total

    def _end(self, case: str, outcome: str, reason: str) -> None:
        append_row(self.rows, {"case": case, "outcome": outcome, "reason": reason})
        print(f"{case}: {reason}", flush=True)

    def kill(self) -> None:
        for process in self.running.values():
            kill_group(process)
        self.running.clear()


def _open_cases(rows: list[dict[str, Any]]) -> dict[int, str]:
    """{worker: the case that it began and that has not ended}."""
    found: dict[int, str] = {}
    for row in rows:
        if "begun" in row:
            found[row["worker"]] = row["begun"]
        elif "case" in row:
            found = {worker: case for worker, case in found.items() if case != row["case"]}
    return found


def run(args: argparse.Namespace) -> None:
    """Start the processes and watch them until all is done or the time is over."""
    began, shown, words = time.monotonic(), 0.0, ""
    with (
        tempfile.TemporaryDirectory(prefix="gpu-tests-") as scratch,
        open(args.out / "gpu-tests.log", "ab") as log,
    ):
        pool = Pool(args, Path(scratch), log)
        try:
            for _ in range(args.workers):
                pool.start()
            append_row(pool.rows, {"machine": environment(args.commit), "half": args.half})
            while pool.running and (took := time.monotonic() - began) < args.seconds:
                pool.look()
                text = gpu_tests_rows.line(read_rows(pool.rows))
                if took - shown >= 5 and words != text:
                    shown, words = took, text
                    print(f"[{took:4.0f} s] {text}", flush=True)
                time.sleep(_POLL)
        finally:
            pool.kill()
            append_row(pool.rows, {"took": round(time.monotonic() - began, 1)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of rows, table and log")
    parser.add_argument("--seconds", type=float, default=380, help="stop after so long")
    parser.add_argument("--case-seconds", type=float, default=150, help="cut a case after so long")
    parser.add_argument(
        "--workers", type=int, help="processes side by side (default: 3/4 of cores)"
    )
    parser.add_argument(
        "--half", type=int, default=0, choices=(0, 1, 2),
        help="every other case; rows that are there stay, so that the table holds both halves",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only write the table of the rows")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    parser.add_argument("--tests", nargs="+", help=f"default: {' '.join(TESTS)}")
    parser.add_argument("--allow-skips", action="store_true", help="success without any GPU too")
    add_tiny(parser)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--counter", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="more options of pytest, after --")
    args = parser.parse_args(argv)
    if args.out is None and not args.tiny:
        parser.error("--out is needed")
    args.out = args.out or temporary()
    args.tests = args.tests or [str(ROOT / path) for path in (TINY if args.tiny else TESTS)]
    args.allow_skips |= args.tiny
    args.workers = args.workers or (1 if args.tiny else max(1, min(12, _cores() * 3 // 4)))
    return args


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows = args.out / "gpu-tests-rows.jsonl"
    if args.worker is not None:
        worker = gpu_tests_worker.Worker(args.worker, rows, args.counter, args.half)
        return gpu_tests_worker.run(worker, args.tests, args.options)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        if not args.half:
            rows.unlink(missing_ok=True)
        with terminated():
            try:
                run(args)
            finally:
                count = gpu_tests_rows.write(args.out)
    else:
        count = gpu_tests_rows.write(args.out)
    if count["failed"]:
        return FAILED
    if count["not_run"]:
        print(f"{count['not_run']} cases were not run", file=sys.stderr)
        return INCOMPLETE
    # Of other rooms' tests some pass anywhere.
    tests = gpu_tests_rows.by_test(read_rows(rows))
    needed = [test for name, test in tests.items() if "gpu" in Path(name.split("::")[0]).parts]
    if not any(test.passed for test in needed) and not args.allow_skips:
        print(
            f"no test of tests/gpu passed: is there a GPU? See {args.out}/gpu-tests.log",
            file=sys.stderr,
        )
        return FAILED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
