"""Memory that a process may use: the machine's, its control groups', its own limits'."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nomatmul.formats.host_memory import available_memory

GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in {"proc/meminfo": "MemAvailable: 8388608 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)


def test_a_machine_without_limits_gives_what_is_available(tmp_path: Path) -> None:
    assert available_memory(write(tmp_path, {})) == 8 * GIB


@pytest.mark.parametrize("inner", ["pod", "pod/job"])
def test_the_narrowest_group_of_version_2_counts(tmp_path: Path, inner: str) -> None:
    group = f"sys/fs/cgroup/{inner}"
    files = {
        "proc/self/cgroup": "0::/pod/job",
        "sys/fs/cgroup/pod/job/memory.max": "max",
        f"{group}/memory.max": 3 * GIB,
        f"{group}/memory.current": 2 * GIB,
        f"{group}/memory.stat": f"anon 5\ninactive_file {GIB // 2}",
    }
    assert available_memory(write(tmp_path, files)) == GIB * 3 // 2


@pytest.mark.parametrize("seen", ["docker/ab", ""])
def test_a_group_of_version_1_counts_also_from_inside_a_container(
    tmp_path: Path, seen: str
) -> None:
    group = f"sys/fs/cgroup/memory/{seen}"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab",
        f"{group}/memory.limit_in_bytes": 4 * GIB,
        f"{group}/memory.usage_in_bytes": GIB,
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
    }
    assert available_memory(write(tmp_path, files)) == 4 * GIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": GIB,
        "sys/fs/cgroup/memory.current": 2 * GIB,
    }
    assert available_memory(write(tmp_path, files)) == 0


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts(name: str) -> None:
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.{name}, (1 << 30, resource.RLIM_INFINITY))\n"
        "from nomatmul.formats.host_memory import available_memory\n"
        "assert 0 < available_memory() < 1 << 30\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
