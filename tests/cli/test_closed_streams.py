"""Started with a stream closed, as some daemons and scripts do: no traceback, no internal error."""

from __future__ import annotations

import subprocess
import sys

import pytest

GENERATE = [sys.executable, "-m", "nomatmul", "generate", "--max-tokens", "2"]


def _run(redirect, *arguments):
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *GENERATE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_no_standard_input(packed):
    status, out, err = _run("<&-", "--model", packed, "--prompt", "-")
    assert (status, out) == (1, "")
    assert err.startswith("nomatmul: error: the prompt is empty; give --prompt TEXT")
    assert err.count("\n") == 1


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_standard_output(packed, redirect):
    assert _run(redirect, "--model", packed, "--prompt", "w1") == (0, "", "")
    assert _run(redirect, "--model", packed, "--prompt", "")[0] == 1
