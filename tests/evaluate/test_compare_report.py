"""Means and errors over seeds, the table, the files: from rows that are made up."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from compare_rows import ROWS, make_row

from nomatmul.evaluate.compare_report import summarise, write_report
from nomatmul.evaluate.rows import append_row


def test_means_and_errors_over_seeds():
    entries = {e.variant: e for e in summarise(ROWS, "s")}
    tree = entries["fff-16x6"]
    assert tree.score == pytest.approx(1.62)
    pairs = ([1.50, 1.52], [1.70, 1.71], [1.80, 1.80], [1.60, 1.64])
    pooled = math.sqrt(statistics.fmean(statistics.variance(pair) for pair in pairs))
    assert tree.error == pytest.approx(pooled / math.sqrt(2))


def test_a_single_seed_has_the_spread_of_the_others():
    entries = {e.variant: e for e in summarise([*ROWS, make_row("fff-1x1", 1, 1.7, active=2)], "s")}
    single, pair = entries["fff-1x1"], entries["none"]
    assert single.error == pytest.approx(pair.error * math.sqrt(2))
    assert all(e.error is None for e in summarise([ROWS[0], ROWS[4]], "s"))


def test_the_same_seed_twice_is_one_seed():
    tree = next(e for e in summarise([*ROWS, make_row("none", 2, 1.9)], "s") if e.variant == "none")
    assert len(tree.values) == 2


def test_cut_runs_other_stages_and_other_lengths_do_not_mix():
    others = [
        make_row("none", 3, 9.0, status="cut"),
        make_row("none", 3, 9.0, stage="rate"),
        make_row("none", 3, 9.0, steps=10, steps_planned=10),
    ]
    assert summarise(ROWS + others, "s") == summarise(ROWS, "s")
    diverged = summarise([*ROWS, make_row("none", 3, math.nan, status="diverged")], "s")
    assert next(e for e in diverged if e.variant == "none").diverged == 1


def test_the_report_is_files_that_others_can_read(tmp_path):
    for row in [*ROWS, make_row("fff-1x1", 1, 1.75, active=2, section="t/u")]:
        append_row(tmp_path / "rows.jsonl", row)
    write_report(tmp_path, "Title", "About.")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["sections"]) == {"s", "t/u"}
    assert summary["sections"]["t/u"][0]["error"] is None
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title")
    assert "| fff-16x6 | 2032 | 112 |" in text
    assert "| 1.6200 ± 0.01" in text
    assert "nan" not in text
    assert (tmp_path / "compare-s.png").stat().st_size > 1000
    assert (tmp_path / "compare-t-u.png").exists()


def test_no_rows_is_a_report_too(tmp_path):
    assert write_report(tmp_path) == {"sections": {}}
