"""Which kernels run: what the CPU offers, in order, unless NOMATMUL_ISA says otherwise."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from parity_backends import native


def cpu_flags() -> set[str]:
    """Return the CPU's feature names as Linux reports them; skips the test elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    for line in path.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    pytest.skip("/proc/cpuinfo lists no features")


def test_what_linux_reports_is_what_runs() -> None:
    """Else every parity test could be skipped, and nobody would notice."""
    flags = cpu_flags()
    expected = ["scalar"]
    if platform.machine() == "x86_64":
        if {"avx2", "fma", "f16c", "bmi2"} <= flags:
            expected.insert(0, "avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
            expected.insert(0, "avx512vnni")
        if {"amx_tile", "amx_int8"} <= flags and "amx" in native().isas():  # may be refused
            expected.insert(0, "amx")
    elif "asimddp" in flags:
        expected.insert(0, "neon")
    assert native().isas() == expected


def test_the_best_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOMATMUL_ISA", raising=False)
    assert native().best() == native().isas()[0]


def test_environment_forces_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in native().isas():
        monkeypatch.setenv("NOMATMUL_ISA", isa)
        assert native().best() == isa


def test_environment_names_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMATMUL_ISA", "avx1024")
    listed = " ".join(native().isas())
    with pytest.raises(ValueError, match=f"NOMATMUL_ISA=avx1024 is not available.*: {listed}$"):
        native().best()
