"""Programs that the room runs end with it, and what a killed one has left is cleared away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nomatmul.hardware import tools
from nomatmul.hardware.simulate import build

_NEST = """
import signal
import sys
from nomatmul.cli.signals import clean_up_when_terminated
from nomatmul.hardware import tools
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has us ignore it, and what we start
clean_up_when_terminated()
tools.run(["sh", "-c", f"sleep 1000 & echo $! > {sys.argv[1]}; wait"])
"""


def _ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"  # whoever adopted it has not looked yet


def _wait(condition) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it takes more than 20 seconds")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_program_and_its_children_end_with_us(tmp_path, number):
    note = tmp_path / "grandchild"
    with subprocess.Popen([sys.executable, "-c", _NEST, str(note)], stderr=subprocess.PIPE) as us:
        _wait(lambda: note.exists() and note.read_text().strip())
        grandchild = int(note.read_text())
        os.kill(grandchild, 0)
        us.send_signal(number)
        try:
            us.communicate(timeout=60)
        finally:
            us.kill()
    _wait(lambda: _ended(grandchild))


def test_what_a_program_printed_is_returned_and_its_failure_told():
    assert tools.run(["sh", "-c", "echo one; echo two >&2"]) == "one\ntwo\n"
    with pytest.raises(RuntimeError, match=r"sh failed \(3\): why"):
        tools.run(["sh", "-c", "echo why; exit 3"])


def test_a_killed_builds_directory_goes_after_a_day(tmp_path):
    old, new, done = (tmp_path / name for name in ("build.old", "build.new", "0123"))
    for directory in (old, new, done):
        directory.mkdir()
        (directory / "file").touch()
    for directory in (old, done):
        os.utime(directory, (time.time() - 30 * 3600,) * 2)
    build._drop_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [done, new]
