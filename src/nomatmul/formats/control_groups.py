"""The control groups around this process (Linux, version 1 or 2), which limit what it may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(
    controller: str, proc: Path, default: Path | None = None
) -> Iterator[tuple[int, Path]]:
    """(version, directory) of the process's groups for a controller and of the groups above them.

    controller: "cpu" or "memory". proc: the process's folder below /proc. default: where groups are
    taken to be mounted when `mountinfo` does not say (version 1: a folder a controller in it).
    """
    mounts = _lines(proc / "mountinfo")
    for line in _lines(proc / "cgroup"):
        controllers, _, path = line.partition(":")[2].partition(":")
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        found = list(_mounts(mounts, controller, version))
        if not found and default is not None:
            found = [("/", default / controller if version == 1 else default)]
        for root, mount in found:
            for group in _around(path, root, mount):
                yield version, group


def _mounts(lines: list[str], controller: str, version: int) -> Iterator[tuple[str, Path]]:
    """(root, mount point) of the file systems that show groups of this version."""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        shown = kind[:1] == ["cgroup2"]
        if version == 1:
            shown = kind[:1] == ["cgroup"] and controller in kind[-1].split(",")
        if shown:
            yield fields[3], Path(fields[4])


def _around(path: str, root: str, mount: Path) -> list[Path]:
    """The directories of a group and of those above it, as far as they are mounted.

    In a container the mount's root may be the group itself, under the host's name for it.
    """
    inner = path.removeprefix(root).strip("/") if path.startswith(root) else ""
    own = mount / inner if inner and (mount / inner).is_dir() else mount
    return [own, *(above for above in own.parents if mount in (above, *above.parents))]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").splitlines()
    except OSError:  # not Linux, or not shown to this process
        return []
