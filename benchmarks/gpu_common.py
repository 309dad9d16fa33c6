"""What the GPU benchmarks share: the machine in words, rows on disk, timing, tables.

Every script writes one JSON object a line as soon as a figure is measured, so that a run that is
cut keeps what it has.

A library.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def python_path() -> str:
    """PYTHONPATH of a child process: the package that this process runs, scripts and studies."""
    import nomatmul

    package = Path(nomatmul.__file__).resolve().parents[1]
    return os.pathsep.join([str(package), str(ROOT), str(ROOT / "benchmarks")])


def environment(commit: str | None = None) -> dict[str, Any]:
    """Date, devices, versions and commit: what every table must carry.

    commit: where there is no .git directory (a copied tree), its name must be given.
    """
    import torch

    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "device": ", ".join(sorted(set(devices))) or "CPU",
        "device_count": len(devices),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        if devices
        else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit or git_commit(),
    }


def describe(about: dict[str, Any]) -> str:
    """The environment as one line under a table's title."""
    count = f"{about['device_count']} x " if about.get("device_count", 0) > 1 else ""
    return (
        f"{about['date']}, {count}{about['device']}, torch {about['torch']}, "
        f"triton {about['triton']}, Python {about['python']}, commit {about['commit']}"
    )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def git_commit() -> str:
    """Short name of the checked-out commit, "+changes" if files differ, or $NOMATMUL_COMMIT."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NOMATMUL_COMMIT", "unknown")


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_each(
    work: Callable[[], Any], device: str, *, repeats: int, seconds: float = 60.0
) -> list[float]:
    """Seconds of each call, the device idle before and after; at least 3, stops after `seconds`."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - began < seconds):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def copy_bandwidth(device: str, gigabytes: float = 4.0) -> float:
    """Bytes a second of a device-to-device copy, read and written bytes counted: the ceiling."""
    import torch

    count = int(gigabytes * 1e9 / 8)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(time_each(lambda: target.copy_(source), device, repeats=8))
    return 2 * source.numel() * 4 / best


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters in all, and without embedding and head."""
    total = sum(p.numel() for p in model.parameters())
    outer = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("embed", "head")))
    return {"parameters": total, "non_embedding": total - outer}


def peak_memory(device: str) -> dict[str, float]:
    """Peak bytes that tensors held, and that the allocator took from the device."""
    import torch

    if not device.startswith("cuda"):
        return {"peak_bytes": 0, "reserved_bytes": 0}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }
