"""The page of the Pareto models: what is joined, which engine counts, the estimate of energy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pareto_page

from nomatmul.evaluate.rows import read_rows


def _row(model: str, form: str, engine: str, rate: float, **values: Any) -> dict[str, Any]:
    rates = {"alone@0": [9e9], "alone@512": [rate, rate, 1.0], "rotated@512": [rate / 2]}
    return {
        "size": "S", "model": model, "form": form, "engine": engine, "prefill": [3.0],
        "read_bytes": 1000, "file_bytes": 3000, "layers": 2, "width": 10,
        "resident_added": 7, **rates, **values,
    }  # fmt: skip


def _score(section: str, variant: str, stage: str, **values: Any) -> dict[str, Any]:
    bits = {"bpb_wikipedia": 1.0, "bpb_novels": 2.0, "bpb_stories": 3.0}
    return {"section": section, "variant": variant, "stage": stage, "status": "ok",
            "label": variant, **bits, **values}  # fmt: skip


def test_a_form_has_the_speed_of_the_faster_engine_and_the_bytes_that_the_study_counted() -> None:
    ways = (("int8", "nomatmul", 50), ("Q8_0", "llama.cpp", 80), ("Q4_0", "llama.cpp", 99))
    rows = [_row("transformer", form, engine, rate) for form, engine, rate in ways]
    score = _score("quantised", "transformer-S", "int8", file_bytes=444)
    (point,) = pareto_page.points(rows, [score])
    assert (point.engine, point.alone, point.rotated) == ("llama.cpp Q8_0", 80, 40)
    assert (point.file, point.bits, point.name) == (444, 2.0, "Transformer++ S")
    assert point.state == 1024 * 4 * 2 * 10


def test_energy_counts_the_bytes_moved_and_the_operations() -> None:
    rows = [_row("mlgru", "2bit", "nomatmul", 50), _row("transformer", "Q4_0", "llama.cpp", 20)]
    scores = [_score("pareto", "mlgru-S", "final"),
              _score("quantised", "transformer-S", "int4 groups of 128", file_bytes=1)]  # fmt: skip
    twin, ours = pareto_page.points(rows, scores)
    assert ours.moved == 1000 + 2 * 80  # its state is read and written
    assert ours.joules == pytest.approx(1e-12 * (1160 * 8 * 30 + 4000 * 0.1))
    assert twin.moved == 1000 + 513 * 80  # keys and values of 512 tokens, and of its own
    attention = 2 * 512 * 2 * 10 * 2.0
    assert twin.joules == pytest.approx(
        1e-12 * (42_040 * 8 * 30 + 1000 / (4.5 / 8) * 0.3 + attention)
    )


def test_a_best_recipe_has_the_speed_of_its_size_and_its_own_bits() -> None:
    score = {**_score("pareto", "mlgru-S-best", "final"), "bpb_wikipedia": 0.7}
    (point,) = pareto_page.points([_row("mlgru", "2bit", "nomatmul", 50)], [score])
    assert (point.name, point.alone) == ("MLGRU S, best recipe", 50)
    assert point.bits == pytest.approx(1.9)


def test_a_run_that_was_cut_and_a_form_that_was_not_measured_are_no_points() -> None:
    cut = _score("pareto", "mlgru-S", "final", status="cut")
    unknown = _score("quantised", "transformer-S", "bf16", file_bytes=1)
    assert pareto_page.points([_row("mlgru", "2bit", "nomatmul", 50)], [cut, unknown]) == []


def test_the_kept_page_is_made_of_the_kept_rows(tmp_path: Path) -> None:
    folder = pareto_page.RESULTS / "2026-11-30-pareto"
    scores = [row for file in pareto_page.SCORES for row in read_rows(file)]
    about = json.loads((folder / "machine.json").read_text())
    text = pareto_page.write(tmp_path, read_rows(folder / "rows.jsonl"), scores, about)
    assert text == (folder / "tables.md").read_text("utf-8")
    for name in ("S", "M", "L"):
        assert f"| MLGRU {name} | packed, 2 bits |" in text
        assert f"| Transformer++ {name} | int4 groups of 128, GPTQ |" in text
    assert (folder / "pareto.svg").stat().st_size < 200_000
