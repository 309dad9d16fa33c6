"""Reports: what the machine offers, and where the bytes of a model go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_models import CONFIG

from nomatmul import engine
from nomatmul.engine import LanguageModel, doctor, load, random_model
from nomatmul.engine.native import native
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.packing import row_bytes


def test_every_kernel_passes_the_self_test() -> None:
    results = engine.self_test()
    assert {result["isa"] for result in results} == set(native().kernels.isas())
    assert len({result["operation"] for result in results}) >= 8
    assert all(result["ok"] for result in results), results


def test_self_test_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        class kernels:
            @staticmethod
            def isas() -> list[str]:
                return ["other", "scalar"]

    monkeypatch.setattr(doctor, "native", lambda: Core)
    monkeypatch.setattr(
        doctor,
        "_all_operations",
        lambda kernels, isa, seed: {
            "add": [np.ones(3, np.float32) * (2 if isa == "other" else 1)],
            "codes": [np.zeros(1)],
        },
    )
    results = {(r["isa"], r["operation"]): r["ok"] for r in doctor.self_test()}
    assert results == {
        ("other", "add"): False,
        ("other", "codes"): True,
        ("scalar", "add"): True,
        ("scalar", "codes"): True,
    }


def test_cpu_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOMATMUL_ISA", raising=False)
    report = engine.cpu_report()
    assert report["isa"] == report["isas"][0] == load_isa()
    assert report["isas"][-1] == "scalar"
    assert 1 <= report["threads"] <= report["logical_cpus"]
    assert set(report["operations"].values()) <= set(report["isas"])
    monkeypatch.setenv("NOMATMUL_ISA", "scalar")
    assert set(engine.cpu_report()["operations"].values()) == {"scalar"}
    monkeypatch.setenv("NOMATMUL_ISA", "mmx")
    with pytest.raises(ValueError, match="NOMATMUL_ISA=mmx is not available"):
        engine.cpu_report()


def load_isa() -> str:
    return random_model(CONFIG).backend.isa


def test_footprint_counts_every_byte(lm: LanguageModel, packing: str) -> None:
    lm.session().append([1, 2, 3])
    report = lm.footprint()
    linears = architecture_of(CONFIG).linears()
    packed = {name: m.outputs * row_bytes(m.inputs, packing) for name, m in linears.items()}
    assert report["head"] == packed.pop("head")
    assert report["core"] == sum(packed.values())
    assert report["embedding"] == CONFIG.vocab_size * (CONFIG.hidden_size + 4)
    assert report["weights"] == sum(report[p] for p in ("embedding", "core", "head", "norms"))
    assert report["state"] == 4 * CONFIG.num_layers * CONFIG.hidden_size == lm.session().nbytes
    assert report["scratch"] > 0
    assert report["total"] == report["weights"] + report["state"] + report["scratch"]
    assert report["disk"] == 0


def test_footprint_of_a_directory(packed: Path) -> None:
    report = engine.footprint(packed)
    assert report["disk"] == sum(file.stat().st_size for file in packed.iterdir())
    assert 0 <= report["resident"] <= report["peak"]
    with pytest.raises(ValueError, match="numpy backend"):
        load(packed, backend="numpy").footprint()


def test_read_bandwidth_is_a_number() -> None:
    assert engine.read_bandwidth(0.01, 2, passes=1) > 0
    for bad in ({"gib": 0}, {"gib": -1}, {"threads": 0}, {"passes": 0}):
        with pytest.raises(ValueError, match="must be"):
            engine.read_bandwidth(**{"gib": 0.01, **bad})


def test_arena_is_aligned_and_keeps_itself_alive() -> None:
    for size in (1, 1000, (2 << 20) + 5):
        arena = native().Arena(size)
        address = arena.address
        assert address % ((2 << 20) if size >= 2 << 20 else 64) == 0
        view = arena.view()
        del arena
        assert not view.any()
        view[-1] = 7
        assert view[-1] == 7
        assert view.ctypes.data == address


@pytest.mark.parametrize("columns", [1, 4, 5, 127, 128, 129, 160, 161, 999])
def test_random_codes_are_legal_and_balanced(packing: str, columns: int) -> None:
    from nomatmul.formats.packing import unpack_ternary

    packed = np.full((200, row_bytes(columns, packing)), 0xFF, np.uint8)
    native().random_codes(packing, packed, columns, 9)
    t_NK = unpack_ternary(packed, columns, packing)
    assert native().rows_ok(packing, packed, columns)
    if columns >= 127:
        shares = [float(np.mean(t_NK == value)) for value in (-1, 0, 1)]
        assert min(shares) > 0.3
        assert max(shares) < 0.36
    broken = packed.copy()
    broken[7, -1] = broken[7, -1] ^ 0x40 if packing == "2bit" else 0  # the last element
    if columns % (128 if packing == "2bit" else 160):
        assert not native().rows_ok(packing, broken, columns)
