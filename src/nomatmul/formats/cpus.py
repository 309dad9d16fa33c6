"""How many CPUs this process may use; a container or a job often gets fewer than there are."""

from __future__ import annotations

import os
from pathlib import Path

from nomatmul.formats.control_groups import control_groups

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
    groups = control_groups("cpu", proc)
    found = [(_quota_v1 if version == 1 else _quota_v2)(group) for version, group in groups]
    return min((quota for quota in found if quota is not None), default=None)


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
