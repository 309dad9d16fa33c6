"""The arithmetic of the scaling study: curves, gaps, and what is said of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import report_gpu
import scaling
import scaling_fit
from plot_gpu import latest


def rows(
    sizes: dict[str, float], gap_at: dict[str, float], spread: float = 0.001
) -> list[dict[str, Any]]:
    """Final runs, two seeds each, on loss = 1 + 0.5 (N / 1e7)^-0.4, plus the gap for MLGRU."""
    out = []
    for size, count in sizes.items():
        for arch in ("mlgru", "transformer"):
            for seed, sign in ((1, 1), (2, -1)):
                loss = 1 + 0.5 * (count / 1e7) ** -0.4 + sign * spread
                loss += gap_at[size] if arch == "mlgru" else 0.0
                out.append(
                    {
                        "arch": arch, "size": size, "stage": "final", "status": "ok", "seed": seed,
                        "non_embedding": count, "parameters": count, "flops": 6 * count * 1e6,
                        "tokens": 1_000_000, "learning_rate": 1e-3, "bpb": loss,
                    }
                )  # fmt: skip
    return out


SIZES = {"S": 3e6, "M": 1e7, "L": 3e7, "XL": 1e8}


def test_a_known_curve_is_found_again() -> None:
    pytest.importorskip("scipy")
    entries = scaling_fit.summarise(rows(SIZES, dict.fromkeys(SIZES, 0.0)))
    twin = [entry for entry in entries if entry["arch"] == "transformer"]
    found = scaling_fit.fit_curve(twin, "non_embedding")
    assert found["freedom_of_sizes"] == 1
    assert found["E"] == pytest.approx(1, abs=0.02)
    assert found["A"] == pytest.approx(0.5, abs=0.02)
    assert found["alpha"] == pytest.approx(0.4, abs=0.02)
    assert not found["at_bound"]


def test_two_sizes_give_no_curve() -> None:
    entries = scaling_fit.summarise(rows({"S": 3e6, "M": 1e7}, {"S": 0.0, "M": 0.0}))
    found = scaling_fit.fit_curve(entries[:2], "non_embedding")
    assert "fewer than three sizes" in found["note"]


@pytest.mark.parametrize(
    ("gap_at", "verdict"),
    [
        ({"S": 0.05, "M": 0.04, "L": 0.03, "XL": 0.02}, "narrows"),
        ({"S": 0.02, "M": 0.03, "L": 0.04, "XL": 0.05}, "widens"),
        ({"S": 0.03, "M": 0.0301, "L": 0.0299, "XL": 0.03}, "shows no trend"),
    ],
)
def test_the_sentence_says_what_the_numbers_say(gap_at: dict[str, float], verdict: str) -> None:
    found = scaling_fit.gaps(scaling_fit.summarise(rows(SIZES, gap_at)))
    assert [gap["gap"] for gap in found["sizes"]] == pytest.approx(list(gap_at.values()))
    assert found["seed_freedom"] == 8
    assert verdict in scaling_fit.sentence(found, 1e6)


def test_a_run_that_was_cut_does_not_count() -> None:
    made = rows({"S": 3e6}, {"S": 0.1})
    made[0] |= {"status": "cut", "bpb": 9.0}
    ours = scaling_fit.summarise(made)[0]
    assert (ours["arch"], ours["runs"]) == ("mlgru", 1)


def test_no_pair_no_claim() -> None:
    only = [row for row in rows({"S": 3e6}, {"S": 0.0}) if row["arch"] == "mlgru"]
    found = scaling_fit.gaps(scaling_fit.summarise(only))
    assert scaling_fit.sentence(found, 1e6).startswith("No size has final runs of both")


def test_both_architectures_get_equal_effort() -> None:
    for size in scaling.SIZES.values():
        tried = {arch: scaling.rates(arch, size[1]) for arch in scaling.CENTRE}
        assert {len(rates) for rates in tried.values()} == {3}
        for rates in tried.values():
            assert rates[2] / rates[0] == pytest.approx(4, rel=0.05)


def test_an_error_does_not_hide_an_earlier_figure() -> None:
    good, error = {"size": "a", "variant": "b", "x": 1}, {"size": "a", "variant": "b", "error": ""}
    assert latest([good, error], "size", "variant") == {("a", "b"): good}
    assert latest([error, good], "size", "variant") == {("a", "b"): good}


def test_the_page_has_all_markers_and_is_filled_between_them() -> None:
    text = report_gpu.PAGE.read_text("utf-8")
    for name in report_gpu.PARTS:
        text = report_gpu.fill(text, name, [f"new {name}"])
    assert all(f"new {name}" in text for name in report_gpu.PARTS)
    with pytest.raises(ValueError, match="lacks the markers of 'nothing'"):
        report_gpu.fill(text, "nothing", [])
