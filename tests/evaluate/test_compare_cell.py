"""Runs of a comparison on tiny models: equal seeds are alike, all variants see the same tokens."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from train_jobs import make_text

from nomatmul.evaluate.compare import CompareOptions, compare, make_cells, plan, prepare_data
from nomatmul.evaluate.compare_cell import run_cell
from nomatmul.evaluate.compare_costs import TotalBar, about, run_costs, sum_of
from nomatmul.evaluate.compare_course import Course
from nomatmul.evaluate.compare_plan import identity
from nomatmul.evaluate.compare_texts import Texts
from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from nomatmul.train.memory import OutOfMemoryError
from nomatmul.train.plan import DevicePlan

CAUSAL = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "max_position_embeddings": 16,
          "token_mixer": "attention", "linear": "dense", "channel_mixer": "ffn",
          "intermediate_size": 30, "num_heads": 2}  # fmt: skip
UNION = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "intermediate_size": 20}
ENCODER = {**CAUSAL, "causal": False, "norm": "layer", "positions": "sinusoidal",
           "tie_embeddings": True}  # fmt: skip


def _options(tmp_path, model=None, **values) -> CompareOptions:
    for name, seed in (("train", 0), ("valid", 1)):
        (tmp_path / f"{name}.txt").write_text(make_text(3000, seed))
    config = TrainConfig(
        recipe="tiny", model=ModelConfig.from_dict(model or CAUSAL), sequence_length=16,
        batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_steps=2,
    )  # fmt: skip
    given = {
        "data": (str(tmp_path / "train.txt"),), "valid": (str(tmp_path / "valid.txt"),),
        "out": tmp_path / "out", "budget": 64 * 6, "seeds": 1, "eval_tokens": 200, "points": 2,
        "devices": "cpu", **values,
    }  # fmt: skip
    return CompareOptions(config=config, **given)


def _cells(options: CompareOptions):
    train, valid = prepare_data(options, lambda text: None)
    return make_cells(options, plan(options), train, valid)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (CAUSAL, ("fff-3x3-balanced", "dense-9")),
        (ENCODER, ("fff-3x3-master4", "none")),
        (UNION, ("dense", "fff-3x3", "dense-9")),
    ],
)
def test_every_kind_of_variant_trains_and_is_scored(tmp_path, model, names):
    options = _options(tmp_path, model, variants=names, implementation="masked")
    for cell in _cells(options):
        (row,) = run_cell(cell)
        assert row["status"] == "ok"
        assert row["steps"] == 6
        assert row["tokens"] == 64 * 6
        assert math.isfinite(row["loss"])
        assert ("bpb" in row) == cell.train_config.model.causal
        assert [point[0] for point in row["held_out_curve"]] == [3, 6]
        assert row["held_out_curve"][-1][1] < row["curve"][0][1] + 1
        expected = cell.train_config.model.param_count()
        assert row["parameters"] == expected
    assert len(read_rows(options.out / "rows.jsonl")) == len(names)


def test_a_finished_run_is_not_made_again_and_equal_seeds_are_equal(tmp_path):
    (cell,) = _cells(_options(tmp_path, variants=("fff-3x3",), implementation="masked"))
    (row,) = run_cell(cell)
    assert run_cell(cell) == []
    (again,) = run_cell(dataclasses.replace(cell, stage="again"))
    assert again["loss"] == row["loss"]
    (other,) = run_cell(dataclasses.replace(cell, seeds=(2,)))
    assert other["loss"] != row["loss"]


def test_masked_and_conditional_trees_learn_alike(tmp_path):
    (cell,) = _cells(_options(tmp_path, variants=("fff-3x3",), implementation="masked"))
    (masked,) = run_cell(cell)
    (walked,) = run_cell(dataclasses.replace(cell, implementation="naive", stage="again"))
    assert walked["loss"] == pytest.approx(masked["loss"], abs=1e-4)


@pytest.mark.parametrize("model", [CAUSAL, ENCODER])
def test_all_variants_see_the_same_tokens(tmp_path, model):
    first, second = _cells(_options(tmp_path, model, variants=("dense", "fff-3x3")))
    streams = []
    for cell in (first, second):
        texts = Texts(cell, cell.train_config, DevicePlan(torch.device("cpu")))
        batches = texts.batches(1)
        streams.append([next(batches) for _ in range(3)] + texts.held_out("valid", 200))
    for ours, theirs in zip(*streams, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_a_run_without_time_is_not_begun_or_cut(tmp_path):
    (cell,) = _cells(_options(tmp_path, variants=("none",)))
    late = dataclasses.replace(cell, deadline=1.0)
    assert run_cell(late) == []
    soon = dataclasses.replace(cell, deadline=time.time() + 600)
    slow = dataclasses.replace(soon, expected_speed=0.1)  # 384 tokens: more than an hour
    assert run_cell(slow) == []
    (row,) = run_cell(soon)
    assert row["status"] == "ok"
    assert row["lanes"] == 1
    course = Course(late, late.train_config)
    course.losses.append(torch.tensor(1.0))
    course.look(1, lambda text: None)
    assert course.status == "cut"
    in_time = Course(cell, cell.train_config)
    in_time.losses.append(torch.tensor(1.0))
    in_time.look(1, lambda text: None)
    assert in_time.status == "ok"
    in_time.losses.append(torch.tensor(math.nan))
    in_time.look(2, lambda text: None)
    assert in_time.status == "diverged"


def test_a_whole_comparison_in_processes_goes_on_where_it_was(tmp_path, capfd):
    options = _options(tmp_path, variants=("fff-3x3",), implementation="masked")
    lines: list[str] = []
    result = compare(options, lines.append, quiet=True)
    assert result["missing"] == 0
    assert {entry["variant"] for entry in result["sections"]["tiny"]} == {"fff-3x3"}
    assert json.dumps(result, allow_nan=False)
    assert (options.out / "report.md").is_file()
    rows = (options.out / "rows.jsonl").read_text()
    again = compare(options, lines.append, quiet=True)
    assert "0 of 1 runs to make" in lines[-1]
    assert (options.out / "rows.jsonl").read_text() == rows
    assert again["sections"] == result["sections"]
    config = dataclasses.replace(options.config, learning_rate=options.config.learning_rate / 2)
    with pytest.raises(ValueError, match="holds runs of 'fff-3x3' with other settings"):
        compare(dataclasses.replace(options, config=config), lines.append, quiet=True)
    assert (options.out / "rows.jsonl").read_text() == rows


def test_what_memory_cannot_hold_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("nomatmul.train.memory.available_memory", lambda: 1 << 27)
    options = _options(tmp_path, variants=("none", "fff-3x3"))
    with pytest.raises(OutOfMemoryError, match=r"too little memory for none: about 0\.3 GiB .*--f"):
        compare(options)
    assert not options.out.exists()


def test_the_time_of_all_runs_is_told_and_shown(tmp_path, monkeypatch):
    cells = _cells(_options(tmp_path, variants=("none", "fff-3x3"), seeds=2))
    costs = run_costs(cells, 1)
    assert set(costs) == {"none", "fff-3x3"}
    assert min(costs.values()) > 0
    assert sum_of(cells, {"none": 100.0, "fff-3x3": 400.0}) == pytest.approx(1010)
    assert about(1010) == "about 17 minutes"
    clock, told = [1000.0], []
    monkeypatch.setattr("nomatmul.evaluate.compare_costs.time.monotonic", lambda: clock[0])
    console = SimpleNamespace(progress=lambda share, text: told.append((round(share, 3), text)))
    rows = tmp_path / "rows.jsonl"
    bar = TotalBar(console, cells, {"none": 100.0, "fff-3x3": 400.0}, rows)
    clock[0] += 50.5
    bar.tick()
    row = {"section": "tiny", "variant": "fff-3x3", "stage": "final", "seed": 1, "status": "ok"}
    row |= {"identity": identity(cells[1]), "steps_planned": cells[1].config["steps"]}
    append_row(rows, row)
    clock[0] += 449.5
    bar.tick()
    bar.tick()  # too soon
    assert told == [(0.05, "0 of 4 runs, 0:15:59 left"), (0.4, "1 of 4 runs, 0:12:30 left")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": 0}, "seeds 0 must be at least 1"),
        ({"budget": 63}, "a budget of 63 tokens is less than one step of 4 x 16 = 64"),
        ({"variants": ("dense", "dense")}, "variant 'dense' is named twice"),
        ({"variants": ("moe",)}, "variant 'moe' is not known"),
        ({"valid": ()}, "no held-out text"),
        ({"devices": "cuda:99"}, "device 'cuda:99' is not here"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        compare(_options(tmp_path, **values))
    assert not (tmp_path / "out" / "rows.jsonl").exists()
