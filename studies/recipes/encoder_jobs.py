"""Commands of the package as child processes that end with their parent, with logs.

A library of encoder.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_common import python_path
from benchmarks.with_parent import kill_group, with_parent


def start(
    args: argparse.Namespace, name: str, words: list[Any], values: dict[str, str]
) -> subprocess.Popen[bytes]:
    """`python -m nomatmul WORDS`; its output goes to WORK/logs/NAME.log."""
    logs = args.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environ = {"OMP_NUM_THREADS": "4", **os.environ, "PYTHONPATH": python_path(), **values}
    environ |= {"TORCHINDUCTOR_CACHE_DIR": str((args.work / "inductor").resolve())}
    with open(logs / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nomatmul", *map(str, words)], env=environ, stdout=log,
            stderr=log, preexec_fn=with_parent(),
        )  # fmt: skip


def wait(jobs: dict[str, subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended. SystemExit names what failed or was too late (deadline 0: never)."""
    try:
        for name, job in jobs.items():
            job.wait(max(deadline - time.time(), 0.1) if deadline else None)
            if job.returncode:
                raise SystemExit(f"{name} ended with exit status {job.returncode}: see the logs")
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{', '.join(jobs)}: not finished in time") from None
    finally:
        for job in jobs.values():
            if job.poll() is None:
                kill_group(job)


def tails(args: argparse.Namespace) -> Iterator[str]:
    for log in sorted((args.work / "logs").glob("*.log")):
        if lines := log.read_text("utf-8", "replace").strip().splitlines()[-4:]:
            yield "\n".join([f"-- {log.name}", *lines])
