"""The arithmetic of the scaling study: curves, gaps, and the tables of its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report_gpu
from plot_gpu import latest
from tables import filled

from studies.scaling import fit, page, plan, run


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
    entries = fit.summarise(rows(SIZES, dict.fromkeys(SIZES, 0.0)))
    twin = [entry for entry in entries if entry["arch"] == "transformer"]
    found = fit.fit_curve(twin, "non_embedding")
    assert found["freedom_of_sizes"] == 1
    assert found["E"] == pytest.approx(1, abs=0.02)
    assert found["A"] == pytest.approx(0.5, abs=0.02)
    assert found["alpha"] == pytest.approx(0.4, abs=0.02)
    assert found["determined"]


def test_a_curve_that_is_not_determined_is_said_to_be_so() -> None:
    made = rows(SIZES, dict.fromkeys(SIZES, 0.0))
    # What was measured at first: nearly a power law without a floor.
    losses = {"S": 1.657, "M": 1.627, "L": 1.599, "XL": 1.562}
    for row in made:
        row["bpb"] = losses[row["size"]] + 0.005 * (-1) ** row["seed"]
    twin = [e for e in fit.summarise(made) if e["arch"] == "transformer"]
    floor = fit.fit_curve(twin, "non_embedding")
    assert not floor["determined"]
    assert "E" not in floor
    power = fit.fit_power(twin, "non_embedding")
    line = page.curve_table({"transformer": {"non_embedding": {"power": power, "floor": floor}}})[2]
    assert line.endswith("% | - | - | - |")


def test_a_power_law_is_found_again() -> None:
    made = rows(SIZES, dict.fromkeys(SIZES, 0.0), spread=0.0)
    for row in made:
        row["bpb"] = 1.6 * (row["non_embedding"] / 1e7) ** -0.05
    found = fit.fit_power(fit.summarise(made)[:4], "non_embedding")
    assert found["A"] == pytest.approx(1.6)
    assert found["alpha"] == pytest.approx(0.05)
    assert found["largest_miss"] == pytest.approx(0, abs=1e-9)


def test_two_sizes_give_no_curve() -> None:
    entries = fit.summarise(rows({"S": 3e6, "M": 1e7}, {"S": 0.0, "M": 0.0}))
    found = fit.fit_curve(entries[:2], "non_embedding")
    assert "2 sizes" in found["note"]


@pytest.mark.parametrize(
    ("gap_at", "side"),
    [
        ({"S": 0.05, "M": 0.04, "L": 0.03, "XL": 0.02}, -1),
        ({"S": 0.02, "M": 0.03, "L": 0.04, "XL": 0.05}, 1),
        ({"S": 0.03, "M": 0.0301, "L": 0.0299, "XL": 0.03}, 0),
    ],
)
def test_gaps_have_a_slope_over_size(gap_at: dict[str, float], side: int) -> None:
    found = fit.gaps(fit.summarise(rows(SIZES, gap_at)))
    assert [gap["gap"] for gap in found["sizes"]] == pytest.approx(list(gap_at.values()))
    assert found["seed_freedom"] == 8
    slope, error = found["slope_per_tenfold"], found["slope_error_seeds"]
    assert (slope > 2 * error) - (slope < -2 * error) == side
    line = page.gap_table({"gaps": found, "gaps_of_texts": {}})[-1]
    assert line.startswith(f"| ten times the size | - | {slope:+.4f} ± ")


def test_a_run_that_was_cut_does_not_count() -> None:
    made = rows({"S": 3e6}, {"S": 0.1})
    made[0] |= {"status": "cut", "bpb": 9.0}
    ours = fit.summarise(made)[0]
    assert (ours["arch"], ours["runs"]) == ("mlgru", 1)


def test_no_pair_no_gap() -> None:
    only = [row for row in rows({"S": 3e6}, {"S": 0.0}) if row["arch"] == "mlgru"]
    found = fit.gaps(fit.summarise(only))
    assert page.gap_table({"gaps": found, "gaps_of_texts": {}}) == []


CELL = {
    "arch": "mlgru", "size": "M", "rates": [0.001, 0.002, 0.004], "seeds": [1, 2], "batch_size": 4,
    "sequence_length": 10, "tune_tokens": 400, "final_tokens": 1000,
    "model": {"num_layers": 2, "hidden_size": 8},
}  # fmt: skip


def ended(stage: str, rate: float, seed: int, bpb: float, status: str = "ok") -> dict[str, Any]:
    steps = 10 if stage == "tune" else 25
    return {
        "arch": "mlgru", "size": "M", "stage": stage, "learning_rate": rate, "seed": seed,
        "steps": steps if status == "ok" else 3, "bpb": bpb, "status": status,
    }  # fmt: skip


def test_only_runs_without_an_earlier_row_are_left() -> None:
    def left(rows: list[dict[str, Any]]) -> list[str]:
        return plan.missing(rows, CELL, 100_000)

    assert left([]) == ["rate 0.001", "rate 0.002", "rate 0.004", "seed 1", "seed 2"]
    tuned = [ended("tune", rate, 0, bpb) for rate, bpb in ((0.001, 2.0), (0.002, 1.9))]
    cut = ended("tune", 0.004, 0, 1.0, "cut")
    assert left([*tuned, cut]) == ["rate 0.004", "seed 1", "seed 2"]
    tuned.append(ended("tune", 0.004, 0, 2.1, "diverged"))
    assert left(tuned) == ["seed 1", "seed 2"]
    assert left([*tuned, ended("final", 0.002, 1, 1.5)]) == ["seed 2"]
    # A final run at a rate that is no longer the best, or with fewer tokens, does not count.
    assert left([*tuned, ended("final", 0.001, 1, 1.5)]) == ["seed 1", "seed 2"]
    assert left([*tuned, {**ended("final", 0.002, 1, 1.5), "steps": 24}]) == ["seed 1", "seed 2"]


def test_a_best_rate_at_the_edge_asks_for_one_more() -> None:
    tuned = [ended("tune", rate, 0, bpb) for rate, bpb in ((0.001, 1), (0.002, 2), (0.004, 3))]
    assert plan.missing(tuned, CELL, 100_000) == ["rate 0.0005", "seed 1", "seed 2"]
    tuned.append(ended("tune", 0.0005, 0, 1.5))
    assert plan.missing(tuned, CELL, 100_000) == ["seed 1", "seed 2"]


def test_a_run_made_twice_is_compared_and_does_not_count() -> None:
    made = [
        {**ended("final", 0.002, 1, 1.5), "ops": "naive", "commit": "old"},
        {**ended("check", 0.002, 1, 1.6), "steps": 25, "fused": True, "commit": "new"},
    ]
    lines = page.again_table(page.again(made))[2:]
    assert "| plain PyTorch old | 1.5000 |" in lines[0]
    assert "| fused new | 1.6000 |" in lines[1]


def test_cells_without_a_final_run_come_first() -> None:
    work = [
        {**CELL, "arch": arch, "size": size, "model": {"num_layers": 1, "hidden_size": width}}
        for size, width in (("S", 1), ("M", 2), ("L", 3), ("XL", 4))
        for arch in ("transformer", "mlgru")
    ]
    have = [
        {**ended("final", 0.001, 1, 1.5), "arch": arch, "size": size}
        for arch, sizes in (("mlgru", "S XL"), ("transformer", "S M L XL"))
        for size in sizes.split()
    ]
    names = [f"{c['arch']} {c['size']}" for c in plan.order(have, work)]
    assert names[:4] == ["mlgru M", "mlgru L", "mlgru S", "mlgru XL"]


def test_earlier_rows_are_told_their_commit_once(tmp_path: Path) -> None:
    (tmp_path / "scaling-rows.jsonl").write_text('{"arch": "mlgru"}\n')
    (tmp_path / "scaling-machine.json").write_text('{"commit": "old"}')
    for new in ("newer", "newest"):
        assert run.adopt(tmp_path, {"commit": new}) == [{"commit": "old", "arch": "mlgru"}]
    machines = json.loads((tmp_path / "scaling-machine.json").read_text())
    assert machines == {"commit": "newest", "earlier": [{"commit": "old"}, {"commit": "newer"}]}


def test_both_architectures_get_equal_effort() -> None:
    for size in plan.SIZES.values():
        tried = {arch: plan.rates(arch, size[1]) for arch in plan.CENTRE}
        assert {len(rates) for rates in tried.values()} == {3}
        for rates in tried.values():
            assert rates[2] / rates[0] == pytest.approx(4, rel=0.05)


def test_an_error_does_not_hide_an_earlier_figure() -> None:
    good, error = {"size": "a", "variant": "b", "x": 1}, {"size": "a", "variant": "b", "error": ""}
    assert latest([good, error], "size", "variant") == {("a", "b"): good}
    assert latest([error, good], "size", "variant") == {("a", "b"): good}


def test_the_page_has_the_tables_of_its_rows(tmp_path: Path) -> None:
    results = ROOT / "benchmarks/results/2026-11-30-h200"
    for name in ("scaling-rows.jsonl", "scaling-machine.json"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    made = page.all_tables(page.report(tmp_path))
    text = page.PAGE.read_text("utf-8")
    assert all(made.values())
    assert filled(text, made) == text


@pytest.mark.parametrize("name", report_gpu.PARTS)
def test_the_pages_of_gpus_have_the_tables_of_their_rows(name: str) -> None:
    results = ROOT / "benchmarks/results/2026-11-30-h200"
    made = {part: make(results) for part, make in report_gpu.PARTS[name].items()}
    text = (report_gpu.PAGES / name).read_text("utf-8")
    assert all(made.values())
    assert filled(text, made) == text
