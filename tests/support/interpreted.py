"""Triton's kernels on a CPU: programs that run in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys


def run_interpreted(program: str, *arguments: object) -> None:
    """Run a program that must succeed, in a process of its own: triton reads TRITON_INTERPRET when
    it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
