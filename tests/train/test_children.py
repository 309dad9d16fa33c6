"""No process that we start outlives us, whatever ends us."""

from __future__ import annotations

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

SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")

SLEEPER = """
import subprocess
from nomatmul.train import children
print(flush=True)
subprocess.run(children.command("sleeper"), start_new_session={session})
"""

# A pool of two that tokenises for ever, as `build_shards` makes it.
TOKENISER = """
import nomatmul.train.shards as shards
from nomatmul.train.documents import find_sources
from nomatmul.train.tokenizer import train_tokenizer
if __name__ == "__main__":
    shards.CHUNK_CHARACTERS = 2000
    sources = find_sources(["text.txt"])
    shards.build_shards(sources, train_tokenizer(sources, 300), "shards", workers=2)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(tmp_path)
    yield family
    family.end()


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_child_ends_with_its_parent(family: Family, name: str, session: bool) -> None:
    (family.directory / "sleeper.py").write_text("import time\nopen('up', 'w')\ntime.sleep(600)\n")
    (family.directory / "parent.py").write_text(SLEEPER.format(session=session))
    parent = family.start("parent.py", stderr=subprocess.DEVNULL)
    while not (family.directory / "up").exists() and parent.poll() is None:
        time.sleep(0.02)
    assert len(family.alive()) == 2
    parent.send_signal(getattr(signal, name))
    parent.wait(60)
    assert family.wait_for(0, 10) == 0


def test_a_child_that_finds_its_parent_gone_ends(family: Family) -> None:
    (family.directory / "sleeper.py").write_text("import time\ntime.sleep(600)\n")
    orphan = family.start("-m", "nomatmul.train.children", "1", "sleeper")
    assert orphan.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("kernel", [True, False])
def test_a_thread_watches_where_the_kernel_does_not(family: Family, kernel: bool) -> None:
    child = f"""
import os, time
from nomatmul.train import children
if not {kernel}:
    children._ask_kernel = lambda number: False
children.tie_to(os.getppid())
open("up", "w")
time.sleep(600)
"""
    (family.directory / "child.py").write_text(child)
    (family.directory / "parent.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, 'child.py'])\n"
    )
    parent = family.start("parent.py")
    while not (family.directory / "up").exists() and parent.poll() is None:
        time.sleep(0.02)
    parent.kill()
    parent.wait(60)
    assert family.wait_for(0, 10) == 0


@pytest.mark.parametrize("name", SIGNALS)
def test_workers_that_tokenise_end_with_their_parent(family: Family, name: str) -> None:
    (family.directory / "text.txt").write_text("an otter swam under the pier\n" * 200_000)
    (family.directory / "parent.py").write_text(TOKENISER)
    parent = family.start("parent.py", stderr=subprocess.DEVNULL)
    while not list((family.directory / "shards").glob("*-00003.json")) and parent.poll() is None:
        time.sleep(0.02)
    assert len(family.alive()) >= 3
    parent.send_signal(getattr(signal, name))
    parent.wait(60)
    assert family.wait_for(0, 10) == 0
