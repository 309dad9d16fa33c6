"""How many CPUs this process may use; a container or a job often gets fewer than there are."""

from __future__ import annotations

import os
from pathlib import Path

_OWN = Path("/proc/self")


def usable_cpus(proc: Path = _OWN) -> int:
    """CPUs of the affinity mask, or fewer where the control group has a quota; at least 1.

    A quota of 2.5 CPUs counts as 2. proc: where to read the process's group and mounts.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _quota(proc)
    return max(1, count if quota is None else min(count, int(quota)))


def _quota(proc: Path) -> float | None:
    """The smallest CPU quota of the process's control group and the groups above it, in CPUs."""
    try:
        groups = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        for root, mount in _mounts(mounts, version=1 if controllers else 2):
            read = _quota_v1 if controllers else _quota_v2
            found += [read(group) for group in _groups(path, root, mount)]
    return min((quota for quota in found if quota is not None), default=None)


def _mounts(lines: list[str], version: int) -> list[tuple[str, Path]]:
    """(root, mount point) of the file systems that show CPU quotas of groups of this version."""
    found = []
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        shown = kind[:1] == ["cgroup2"]
        if version == 1:
            shown = kind[:1] == ["cgroup"] and "cpu" in kind[-1].split(",")
        if shown:
            found.append((fields[3], Path(fields[4])))
    return found


def _groups(path: str, root: str, mount: Path) -> list[Path]:
    """The directories of a group and of those above it, as far as they are mounted.

    In a container the mount's root may be the group itself, under the host's name for it.
    """
    inner = path.removeprefix(root).strip("/") if path.startswith(root) else ""
    own = mount / inner if inner and (mount / inner).is_dir() else mount
    return [own, *(above for above in own.parents if mount in (above, *above.parents))]


def _quota_v2(group: Path) -> float | None:
    try:
        limit, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):  # the root group has no such file
        return None
    return None if limit == "max" else int(limit) / int(period)


def _quota_v1(group: Path) -> float | None:
    try:
        limit = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return limit / period if limit > 0 and period > 0 else None
