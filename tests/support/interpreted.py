"""Triton's kernels on a CPU: programs that run in its interpreter."""

from __future__ import annotations

import subprocess


def run_interpreted(python: str, program: str, *arguments: object) -> None:
    """Run a program that must succeed; python: the fixture `interpreting_python`."""
    done = subprocess.run(
        [python, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
