"""A comparison that ends before its runs do leaves no process behind."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import Family

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds processes in /proc"
)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(tmp_path)
    yield family
    family.end()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    choose = random.Random(2)
    words = ["lamp", "moss", "cask", "the", "by", "rope"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{' '.join(choose.choices(words, k=9))}.\n" for _ in range(500)))
    return path


def start(family: Family, text: Path) -> subprocess.Popen[bytes]:
    """A comparison whose first run is training and would do so for long."""
    process = family.start(
        "-m", "nomatmul", "compare", "cpu_minute", "--data", str(text), "--valid", str(text),
        "--out", "cmp", "--budget", "90M", "--variant", "none", "--seeds", "1", "--threads", "1",
        "--set", "model.vocab_size=300", "--set", "model.num_layers=1", "--set", "batch_size=2",
        "--set", "micro_batch_size=2", "--points", "1", stderr=subprocess.PIPE,
    )  # fmt: skip
    log, end = family.directory / "cmp/runs.log", time.monotonic() + 120
    while not (log.exists() and "step" in log.read_text()) and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    assert len(family.alive()) >= 2
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_no_training_outlives_its_comparison(family: Family, text: Path, name: str) -> None:
    process = start(family, text)
    process.send_signal(getattr(signal, name))
    if name == "SIGINT":  # some programs send it to the process and again to its group
        process.send_signal(signal.SIGINT)
    said = process.stderr.read().decode()  # ends, since nobody holds the pipe open
    process.wait(30)
    assert family.wait_for(0, 10) == 0
    if name == "SIGINT":
        assert process.returncode == 130
        assert "1 variants x 1 seeds: 1 of 1 runs to make, about" in said
        assert said.endswith("nomatmul: interrupted; the same command makes the missing runs\n")


def test_a_closed_pipe_ends_a_comparison(family: Family, text: Path) -> None:
    process = start(family, text)
    process.stderr.close()
    assert process.wait(60) != 0
    assert family.wait_for(0, 10) == 0
