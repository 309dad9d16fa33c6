"""benchmarks/gpu_tests.py: every result on disk as it comes, limits that hold, nothing left behind.

The cases are invented and need no GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_tests  # noqa: E402  (found by the line above)
import gpu_tests_rows  # noqa: E402

FINE = "import os, signal, subprocess, sys, time\nimport pytest\n"
MIXED = f"""{FINE}
@pytest.mark.parametrize("number", range(3))
def test_fine(number): pass
@pytest.mark.parametrize("number", [3])
def test_wrong(number): assert number == 7, "not seven"
@pytest.mark.skip(reason="needs two moons")
def test_absent(): pass
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, list(signal.Signals))
    time.sleep(300)
def test_last(): pass
"""
HANGS = f"""{FINE}
def test_first(): pass
def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    open(os.environ["PIDS"], "w").write(f"{{os.getpid()}} {{child.pid}}")
    child.wait()
def test_never(): pass
"""


@pytest.fixture(autouse=True)
def _bare_pytest(monkeypatch):
    """The processes need no plugins, which take a second to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def words(folder: Path, text: str, *more: str) -> list[str]:
    """The arguments of a run over one invented file."""
    (folder / "gpu").mkdir()
    (folder / "gpu/test_invented.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    tests = ["--tests", str(folder / "gpu"), "--", "-c", str(folder / "pytest.ini")]
    return ["--out", str(folder / "out"), *more, *tests]


def fates(folder: Path) -> dict[str, str]:
    rows = gpu_tests_rows.read_rows(folder / "out/gpu-tests-rows.jsonl")
    return {c.partition("::")[2]: row["outcome"] for c, row in gpu_tests_rows.ends(rows).items()}


def wait_for(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """No such process, or one that has ended and that nobody waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_failure_a_crash_and_a_hang_do_not_keep_the_others_from_running(tmp_path, capsys):
    status = gpu_tests.main(words(tmp_path, MIXED, "--workers", "2", "--case-seconds", "2"))
    assert status == gpu_tests.FAILED
    found = fates(tmp_path)
    assert found == {
        **{f"test_fine[{n}]": "passed" for n in range(3)},
        "test_wrong[3]": "failed", "test_absent": "skipped",
        "test_crash": "failed", "test_hangs": "not_run", "test_last": "passed",
    }  # fmt: skip
    text = (tmp_path / "out/gpu-tests.md").read_text()
    assert "| **all** | 8 | - | 4 | 2 | 1 | 1 |" in text
    for reason in ("cut after 2 s", "ended with -11", "3: ", "not seven", "needs two moons"):
        assert reason in text
    document = json.loads((tmp_path / "out/gpu-tests.json").read_text())
    assert sum(test["passed"] for test in document["tests"].values()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_the_limit_ends_what_hangs_and_names_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    began = time.monotonic()
    arguments = words(tmp_path, HANGS, "--workers", "1", "--seconds", "8")
    assert gpu_tests.main(arguments) == gpu_tests.INCOMPLETE
    assert time.monotonic() - began < 40
    found = {"test_first": "passed", "test_hangs": "not_run", "test_never": "not_run"}
    assert fates(tmp_path) == found
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_from_outside_it_leaves_rows_and_no_process(tmp_path, number):
    environment = {
        **os.environ, "PIDS": str(tmp_path / "pids"), "PYTHONPATH": str(ROOT / "src"),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks/gpu_tests.py")]
    arguments = words(tmp_path, HANGS, "--workers", "1")
    log = open(tmp_path / "printed", "wb")  # noqa: SIM115  # closed with the process below
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
        process.send_signal(number)
        status = process.wait(60)
    finally:
        process.kill()
        log.close()
    worker, child = map(int, (tmp_path / "pids").read_text().split())
    wait_for(lambda: gone(worker))
    if number == signal.SIGTERM:
        assert status == 128 + signal.SIGTERM
        assert gone(child)
    else:  # nothing could be written: the table is made of the rows afterwards
        assert not (tmp_path / "out/gpu-tests.md").exists()
        os.kill(child, signal.SIGKILL)
        assert gpu_tests.main(["--out", str(tmp_path / "out"), "--table"]) == gpu_tests.INCOMPLETE
    text = (tmp_path / "out/gpu-tests.md").read_text()
    assert "| **all** | 3 | - | 1 | 0 | 0 | 2 |" in text


def test_two_halves_make_one_table(tmp_path):
    fine = f"{FINE}\n@pytest.mark.parametrize('n', range(5))\ndef test_fine(n): pass\n"
    arguments = words(tmp_path, fine, "--workers", "1")
    for half in ("1", "2"):
        assert gpu_tests.main(["--half", half, *arguments]) == 0
    assert fates(tmp_path) == {f"test_fine[{n}]": "passed" for n in range(5)}


def test_nothing_passed_is_no_success(tmp_path, capsys):
    (tmp_path / "out").mkdir()  # a whole run begins anew: rows of an earlier one do not count
    earlier = {"case": "test_old.py::test_old", "outcome": "passed"}
    (tmp_path / "out/gpu-tests-rows.jsonl").write_text(json.dumps(earlier) + "\n")
    absent = f"{FINE}\n@pytest.mark.skip(reason='no moon')\ndef test_absent(): pass\n"
    assert gpu_tests.main(words(tmp_path, absent, "--workers", "1")) == gpu_tests.FAILED
    # A test of another room that needs no GPU is no sign of one.
    (tmp_path / "test_device_names.py").write_text("def test_device(): pass\n")
    arguments = ["--out", str(tmp_path / "out"), "--workers", "1", "--tests"]
    both = [str(tmp_path / "gpu"), str(tmp_path / "test_device_names.py")]
    more = ["--", "-c", str(tmp_path / "pytest.ini")]
    assert gpu_tests.main([*arguments, *both, *more]) == gpu_tests.FAILED
    assert "| 2 | - | 1 | 0 | 1 | 0 |" in (tmp_path / "out/gpu-tests.md").read_text()
    broken = "import no_such_module\n"
    (tmp_path / "gpu/test_broken.py").write_text(broken)
    arguments.insert(0, "--allow-skips")
    assert gpu_tests.main([*arguments, *both, *more]) == gpu_tests.FAILED
    assert "no_such_module" in (tmp_path / "out/gpu-tests.md").read_text()
