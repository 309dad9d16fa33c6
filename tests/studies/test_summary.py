"""What only studies read from rows: equal budgets, worth in dense neurons, controls."""

from __future__ import annotations

import math

import pytest
from compare_rows import ROWS, make_row

from nomatmul.evaluate.compare_report import write_report
from nomatmul.evaluate.rows import append_row
from studies.compare.plot import plot
from studies.compare.summary import summarise


def test_worth_lies_between_the_controls_around_it():
    entries = {e.variant: e for e in summarise(ROWS, "s")}
    # 1.62 of 1.705 at 112 and 1.51 at 2048, in the logarithm of the width
    share = (1.705 - 1.62) / (1.705 - 1.51)
    assert entries["fff-16x6"].worth == pytest.approx(112 * (2048 / 112) ** share)
    worse = [make_row("fff-1x1", 1, 1.75, active=2), make_row("fff-1x2", 1, 1.2, active=3)]
    outside = {e.variant: e for e in summarise(ROWS + worse, "s")}
    assert math.isnan(outside["fff-1x1"].worth)
    assert math.isnan(outside["fff-1x2"].worth)


def test_equal_flops_and_equal_time_are_read_from_the_curves():
    cheap = make_row("none", 1, 1.8, flops_per_token=5.0)
    cheap["held_out_curve"] = [[50, 4.6, 3.0], [100, 3.6, 6.0]]
    dear = make_row("dense", 1, 1.5)
    entries = {e.variant: e for e in summarise([cheap, dear], "s")}
    # Half of the steps of the dear one cost as much as all of the cheap one.
    assert entries["dense"].at_flops == pytest.approx(4.0)
    assert entries["none"].at_flops == pytest.approx(3.6)
    assert entries["none"].at_seconds == pytest.approx(3.6)
    assert entries["dense"].at_seconds == pytest.approx(4.0 - 1.0 * 1 / 5)


def test_seconds_of_a_crowded_device_do_not_count(tmp_path):
    crowded = {"timed": False, "tokens_per_second": 1, "seconds": 0.1}
    curve = [[50, 4.0, 0.05], [100, 3.0, 0.1]]
    rows = [*ROWS, make_row("dense", 3, 1.5, active=2048, held_out_curve=curve, **crowded)]
    rows.append(make_row("fff-1x1", 1, 1.5, active=2, held_out_curve=curve, **crowded))
    entries = {e.variant: e for e in summarise(rows, "s")}
    before = {e.variant: e for e in summarise(ROWS, "s")}
    assert entries["dense"].at_seconds == before["dense"].at_seconds
    assert entries["dense"].tokens_per_second == 100
    assert math.isnan(entries["fff-1x1"].at_seconds)
    assert entries["fff-1x1"].score == 1.5
    for row in rows:
        append_row(tmp_path / "rows.jsonl", row)
    write_report(tmp_path)
    assert "nan" not in (tmp_path / "report.md").read_text()
    assert plot(rows, list(entries.values()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_gated_neurons_have_their_own_control():
    pair = [make_row("gated-4x2", 1, 1.6, active=18), make_row("glu-12", 1, 1.7, active=18)]
    entries = {e.variant: e for e in summarise([*ROWS, *pair], "s")}
    assert (entries["gated-4x2"].kind, entries["glu-12"].kind) == ("fff", "dense")
    assert entries["gated-4x2"].control == "glu-12"
