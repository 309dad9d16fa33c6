"""Means, equal budgets, worth in dense neurons, tables: from rows that are made up."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from nomatmul.evaluate.compare_report import compared, verdicts, write_report
from nomatmul.evaluate.compare_summary import difference, summarise
from nomatmul.evaluate.rows import append_row


def _row(variant: str, seed: int, score: float, **values) -> dict:
    active = values.pop("active", 0)
    return {
        "section": "s", "variant": variant, "label": variant, "stage": "final", "status": "ok",
        "seed": seed, "steps": 100, "steps_planned": 100, "tokens": 1000, "parameters": 10,
        "neurons": values.pop("neurons", active), "active": active, "flops_per_token": 10.0,
        "flops_masked_per_token": 20.0, "seconds": 10.0, "tokens_per_second": 100,
        "learning_rate": 1e-3, "bpb": score, "loss": score * 2,
        "held_out_curve": [[50, score * 2 + 1, 5.0], [100, score * 2, 10.0]], **values,
    }  # fmt: skip


ROWS = [
    _row("dense", 1, 1.50, active=2048),
    _row("dense", 2, 1.52, active=2048),
    _row("dense-112", 1, 1.70, active=112),
    _row("dense-112", 2, 1.71, active=112),
    _row("none", 1, 1.80),
    _row("none", 2, 1.80),
    _row("fff-16x7", 1, 1.60, active=112, neurons=2032),
    _row("fff-16x7", 2, 1.64, active=112, neurons=2032),
]


def test_means_and_errors_over_seeds():
    entries = {e.variant: e for e in summarise(ROWS, "s")}
    tree = entries["fff-16x7"]
    assert tree.score == pytest.approx(1.62)
    pairs = ([1.50, 1.52], [1.70, 1.71], [1.80, 1.80], [1.60, 1.64])
    pooled = math.sqrt(statistics.fmean(statistics.variance(pair) for pair in pairs))
    assert tree.error == pytest.approx(pooled / math.sqrt(2))
    gap, error = difference(tree, entries["dense"])
    assert gap == pytest.approx(0.11)
    assert error == pytest.approx(math.hypot(tree.error, entries["dense"].error))


def test_a_single_seed_has_the_spread_of_the_others():
    entries = {e.variant: e for e in summarise([*ROWS, _row("fff-1x2", 1, 1.7, active=2)], "s")}
    single, pair = entries["fff-1x2"], entries["none"]
    assert single.error == pytest.approx(pair.error * math.sqrt(2))
    assert all(e.error is None for e in summarise([ROWS[0], ROWS[4]], "s"))


def test_the_same_seed_twice_is_one_seed():
    tree = next(e for e in summarise([*ROWS, _row("none", 2, 1.9)], "s") if e.variant == "none")
    assert len(tree.values) == 2


def test_cut_runs_other_stages_and_other_lengths_do_not_mix():
    others = [
        _row("none", 3, 9.0, status="cut"),
        _row("none", 3, 9.0, stage="rate"),
        _row("none", 3, 9.0, steps=10, steps_planned=10),
    ]
    assert summarise(ROWS + others, "s") == summarise(ROWS, "s")
    diverged = summarise([*ROWS, _row("none", 3, math.nan, status="diverged")], "s")
    assert next(e for e in diverged if e.variant == "none").diverged == 1


def test_worth_lies_between_the_controls_around_it():
    entries = {e.variant: e for e in summarise(ROWS, "s")}
    # 1.62 of 1.705 at 112 and 1.51 at 2048, in the logarithm of the width
    share = (1.705 - 1.62) / (1.705 - 1.51)
    assert entries["fff-16x7"].worth == pytest.approx(112 * (2048 / 112) ** share)
    worse = [_row("fff-1x2", 1, 1.75, active=2), _row("fff-1x3", 1, 1.2, active=3)]
    outside = {e.variant: e for e in summarise(ROWS + worse, "s")}
    assert math.isnan(outside["fff-1x2"].worth)
    assert math.isnan(outside["fff-1x3"].worth)


def test_equal_flops_and_equal_time_are_read_from_the_curves():
    cheap = _row("none", 1, 1.8, flops_per_token=5.0)
    cheap["held_out_curve"] = [[50, 4.6, 3.0], [100, 3.6, 6.0]]
    dear = _row("dense", 1, 1.5)
    entries = {e.variant: e for e in summarise([cheap, dear], "s")}
    # Half of the steps of the dear one cost as much as all of the cheap one.
    assert entries["dense"].at_flops == pytest.approx(4.0)
    assert entries["none"].at_flops == pytest.approx(3.6)
    assert entries["none"].at_seconds == pytest.approx(3.6)
    assert entries["dense"].at_seconds == pytest.approx(4.0 - 1.0 * 1 / 5)


def test_seconds_of_a_crowded_device_do_not_count(tmp_path):
    crowded = {"timed": False, "tokens_per_second": 1, "seconds": 0.1}
    curve = [[50, 4.0, 0.05], [100, 3.0, 0.1]]
    rows = [*ROWS, _row("dense", 3, 1.5, active=2048, held_out_curve=curve, **crowded)]
    rows.append(_row("fff-1x2", 1, 1.5, active=2, held_out_curve=curve, **crowded))
    entries = {e.variant: e for e in summarise(rows, "s")}
    before = {e.variant: e for e in summarise(ROWS, "s")}
    assert entries["dense"].at_seconds == before["dense"].at_seconds
    assert entries["dense"].tokens_per_second == 100
    assert math.isnan(entries["fff-1x2"].at_seconds)
    assert entries["fff-1x2"].score == 1.5
    for row in rows:
        append_row(tmp_path / "rows.jsonl", row)
    write_report(tmp_path)
    assert "nan" not in (tmp_path / "report.md").read_text()


def test_gated_neurons_have_their_own_control():
    pair = [_row("gated-4x3", 1, 1.6, active=18), _row("glu-12", 1, 1.7, active=18)]
    entries = {e.variant: e for e in summarise([*ROWS, *pair], "s")}
    assert (entries["gated-4x3"].kind, entries["glu-12"].kind) == ("fff", "dense")
    assert entries["gated-4x3"].control == "glu-12"
    assert any("active width, 18: 0.1000" in line for line in verdicts(list(entries.values())))


def test_verdicts_say_no_more_than_the_seeds():
    entries = {e.variant: e for e in summarise(ROWS, "s")}
    assert "no difference" not in compared(entries["fff-16x7"], entries["none"])
    close = {
        e.variant: e
        for e in summarise(
            [_row("none", 1, 1.8), _row("none", 2, 1.9), _row("dense", 1, 1.84),
             _row("dense", 2, 1.88)],
            "s",
        )
    }  # fmt: skip
    assert "no difference" in compared(close["dense"], close["none"])
    single = {e.variant: e for e in summarise([ROWS[0], ROWS[4]], "s")}
    assert "no error known" in compared(single["dense"], single["none"])
    lines = verdicts(list(entries.values()))
    assert len(lines) == 3
    assert lines[0].startswith("fff-16x7 against a dense layer of its active width, 112: 0.08")


def test_the_report_is_files_that_others_can_read(tmp_path):
    for row in [*ROWS, _row("fff-1x2", 1, 1.75, active=2, section="t/u")]:
        append_row(tmp_path / "rows.jsonl", row)
    write_report(tmp_path, "Title", "About.")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["sections"]) == {"s", "t/u"}
    assert summary["sections"]["t/u"][0]["worth"] is None
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title")
    assert "| fff-16x7 | 2032 | 112 |" in text
    assert "| 1.6200 ± 0.01" in text
    assert "nan" not in text
    assert "| fff-16x7 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "compare-s.png").stat().st_size > 1000
    assert (tmp_path / "compare-t-u.png").exists()


def test_no_rows_is_a_report_too(tmp_path):
    assert write_report(tmp_path) == {"sections": {}}
