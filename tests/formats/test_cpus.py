"""CPUs by the affinity mask and the control group's quota, of both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nomatmul.formats.cpus import usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def proc(tmp_path: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text(mountinfo.replace("FS", str(tmp_path / "fs")))
    return tmp_path


V2 = "30 24 0:26 / FS rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "33 32 0:29 / FS/memory rw - cgroup cgroup rw,memory\n"
    "34 32 0:30 / FS/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def test_without_a_quota_the_mask_counts(tmp_path):
    assert usable_cpus(tmp_path / "absent") == 8
    assert usable_cpus(proc(tmp_path, "0::/job\n", V2, {"job/cpu.max": "max 100000"})) == 8


@pytest.mark.parametrize(
    ("limit", "count"), [("300000", 3), ("250000", 2), ("50000", 1), ("6400000", 8)]
)
def test_the_quota_of_version_2(tmp_path, limit, count):
    files = {"job/cpu.max": f"{limit} 100000", "other/cpu.max": "100000 100000"}
    assert usable_cpus(proc(tmp_path, "0::/job\n", V2, files)) == count


def test_groups_above_bind_too(tmp_path):
    files = {"slice/job/cpu.max": "max 100000", "slice/cpu.max": "200000 100000"}
    assert usable_cpus(proc(tmp_path, "0::/slice/job\n", V2, files)) == 2


def test_the_quota_of_version_1(tmp_path):
    group = "4:cpu,cpuacct:/job\n3:memory:/job\n0::/\n"
    files = {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
             "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}  # fmt: skip
    assert usable_cpus(proc(tmp_path, group, V1, files)) == 4
    files["cpu,cpuacct/job/cpu.cfs_quota_us"] = "-1"
    assert usable_cpus(proc(tmp_path, group, V1, files)) == 8


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    """The host's name of the group is the mount's root, or there is no such directory at all."""
    mount = V2.replace(" / FS", " /host/box FS")
    for group in ("0::/host/box\n", "0::/../elsewhere\n"):
        assert usable_cpus(proc(tmp_path, group, mount, {"cpu.max": "100000 100000"})) == 1
