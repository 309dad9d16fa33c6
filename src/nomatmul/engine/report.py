"""What this machine offers and what a model takes: reports for `doctor`, `footprint`, `bench`."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomatmul.engine.native import default_threads, native
from nomatmul.formats.cpus import usable_cpus
from nomatmul.formats.files.directory import directory_bytes

if TYPE_CHECKING:
    from nomatmul.engine.encoder_model import EncoderModel

# CPU features that a kernel of ours asks for, as Linux spells them.
_FEATURES = (
    *("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx_vnni", "avx512_vbmi", "amx_tile", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def cpu_report() -> dict[str, Any]:
    """Return CPU name and features, instruction sets, kernel of each operation, threads, pages.

    Works without the native core too; "native" then says why it is missing.
    """
    report: dict[str, Any] = {
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "logical_cpus": usable_cpus(),
        "features": _cpu_features(),
        "huge_pages": {"enabled": _thp_setting("enabled"), "defrag": _thp_setting("defrag")},
    }
    try:
        core = native()
    except ImportError as error:
        return {**report, "native": str(error), "isas": [], "isa": "numpy", "threads": 1}
    isas = list(core.kernels.isas())
    forced = os.environ.get("NOMATMUL_ISA")
    if forced and forced not in isas:
        available = ", ".join(isas)
        raise ValueError(f"NOMATMUL_ISA={forced} is not available here; available: {available}")
    isa = forced or isas[0]
    report["huge_pages"]["granted"] = huge_pages_granted()
    return {
        **report,
        "native": "present",
        "isas": isas,
        "isa": isa,
        "operations": _chosen(isa),
        "threads": default_threads(),
    }


_OPERATIONS = (
    *("ternary product, one token", "ternary product, many tokens", "norm and quantise"),
    *("MLGRU step", "gate and norm", "GLU", "trees", "check of codes"),
)


def _chosen(isa: str) -> dict[str, str]:
    """The kernel of each operation; tiles do not pay for a single token (kernels/amx)."""
    chosen = dict.fromkeys(_OPERATIONS, isa)
    if isa == "amx":
        chosen["ternary product, one token"] = "avx512vnni"
    return chosen


def huge_pages_granted(nbytes: int = 8 << 20) -> bool:
    """Return whether memory that asks for 2 MiB pages gets them (False where unknown)."""
    arena = native().Arena(nbytes)
    arena.view()[:] = 1
    return huge_bytes(arena) >= nbytes // 2


def huge_bytes(arena: Any) -> int:
    """Return how many bytes of an Arena lie in huge pages, by /proc/self/smaps."""
    total, inside = 0, False
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low < arena.address + arena.nbytes and arena.address < high
        elif inside and head == "AnonHugePages:":
            total += 1024 * int(line.split()[1])
    return min(total, int(arena.nbytes))


def read_bandwidth(gib: float = 1.0, threads: int | None = None, passes: int = 5) -> float:
    """Return GB/s (10^9 bytes) at which `threads` threads read `gib` GiB of huge pages.

    The best of `passes` passes: other processes can only make a pass slower. Raises ValueError
    for a size or a count that is not positive.
    """
    core = native()
    if not gib > 0 or gib > 1024:
        raise ValueError(f"gib must be above 0 and at most 1024, got {gib!r}")
    count = default_threads() if threads is None else threads
    if count < 1 or passes < 1:
        raise ValueError(f"threads and passes must be at least 1, got {count} and {passes}")
    return float(core.read_bandwidth(int(gib * (1 << 30)), count, passes)) / 1e9


def footprint(
    path: str | Path | None = None, tokens: int = 8, device: str = "cpu", kv: str = "f16"
) -> dict[str, int]:
    """Load a packed model (default the one in the box), decode a few tokens, report bytes.

    As `LanguageModel.footprint`, and "resident" and "peak": of this whole process, Python included,
    now and at its worst moment (0 where the system does not tell). With a GPU also "device_peak":
    the most of its memory that was in use. kv: as of `load`. Raises ValueError for a bad path,
    device or kv.
    """
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.loading import load

    lm = load(path, device=device, kv=kv)
    if not isinstance(lm, LanguageModel):
        return _encoder_footprint(lm)
    session = lm.session()
    for token in range(tokens):
        session.append([token % lm.config.vocab_size])
    resident, peak = memory_of_process()
    report = {**lm.footprint(), "resident": resident, "peak": peak}
    if lm.backend.gpu is not None:
        report["device_peak"] = lm.backend.gpu.peak_bytes()
    return report


def _encoder_footprint(model: EncoderModel) -> dict[str, int]:
    """As `footprint`, of an encoder after one pass over its longest sequence.

    Matrices that are kept as bfloat16 count as the float32 that they are computed with.
    """
    length = min(model.config.max_position_embeddings, 512)
    model.hidden(np.zeros((1, length), np.int64))
    parts = model.weight_bytes()
    resident, peak = memory_of_process()
    return {
        **parts,
        "weights": sum(parts.values()),
        "disk": directory_bytes(model.path),
        "dense_bf16": 2 * model.config.param_count(),
        "resident": resident,
        "peak": peak,
    }


def gpu_report(test: bool = True) -> dict[str, Any]:
    """What GPUs there are, and whether the engine's kernels are right on the first one.

    Returns {"available", "why" (when not), "devices": [...], "path", "self_test": [{"operation",
    "ok"}]}; never raises: a machine without a GPU is no fault.
    """
    from nomatmul.engine.backends.cuda.device import describe, torch_device

    try:
        torch_device("cuda")
    except ValueError as error:
        return {"available": False, "why": str(error), "devices": [], "self_test": []}
    try:
        from nomatmul.engine.backends.cuda.selftest import devices, run_self_test

        report: dict[str, Any] = {"available": True, "devices": devices(), "self_test": []}
        if test:
            report["path"], report["self_test"] = run_self_test()
    except Exception as error:  # a driver or a compiler may raise anything
        failed = {"operation": describe(error), "ok": False}
        return {"available": True, "devices": [], "path": "none", "self_test": [failed]}
    return report


def memory_of_process() -> tuple[int, int]:
    """Return (resident, peak resident) bytes of this process; zeros where unknown."""
    values = {"VmRSS:": 0, "VmHWM:": 0}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            key = line.split(maxsplit=1)[0]
            if key in values:
                values[key] = 1024 * int(line.split()[1])
    except OSError:
        pass
    return values["VmRSS:"], values["VmHWM:"]


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.lower().startswith(("model name", "hardware")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            present = set(line.partition(":")[2].split())
            return [name for name in _FEATURES if name in present]
    return []


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _thp_setting(name: str) -> str:
    """The choice in brackets, as in "always [madvise] never"; "unknown" where there is none."""
    try:
        text = (_THP / name).read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"
