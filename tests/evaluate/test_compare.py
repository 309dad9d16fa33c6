"""A comparison on tiny models: every variant trains as `nomatmul train` does, and goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from train_jobs import make_text

from nomatmul.evaluate.compare import CompareOptions, compare, make_runs, plan, prepare_data
from nomatmul.evaluate.compare_runs import Run, TotalBar, about, run_costs, sum_of, train
from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from nomatmul.train.memory import OutOfMemoryError

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


def _runs(options: CompareOptions) -> list[Run]:
    return make_runs(options, plan(options), *prepare_data(options, lambda text: None))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (CAUSAL, ("fff-3x2-balanced", "dense-9")),
        (ENCODER, ("fff-3x2-master4", "none")),
        (UNION, ("fff-3x2", "dense-9")),
    ],
)
def test_every_kind_of_variant_trains_and_is_scored(tmp_path, model, names):
    options = _options(tmp_path, model, variants=names, implementation="masked", keep=True)
    for run in _runs(options):
        train(run, "cpu")
        row = read_rows(Path(run.rows))[-1]
        assert row.items() >= run.row.items()
        assert row["status"] == "ok"
        assert (row["steps"], row["tokens"]) == (6, 64 * 6)
        causal = ModelConfig.from_dict(run.config["model"]).causal
        assert ("bpb" in row) == causal
        assert [point[0] for point in row["held_out_curve"]] == [3, 6]
        assert row["held_out_curve"][-1][1] == pytest.approx(row["loss"], abs=1e-5)
        assert row["tokens_per_second"] > 0
        kept = open_checkpoint(run.keep)
        assert kept.config.param_count() == row["parameters"]
        assert not Path(run.directory).exists()


def test_seeds_decide_and_a_run_that_diverges_is_a_row(tmp_path):
    first, second = _runs(_options(tmp_path, variants=("none",), seeds=2))
    train(first, "cpu")
    train(dataclasses.replace(first, row={**first.row, "stage": "again"}), "cpu")
    train(second, "cpu")
    train(dataclasses.replace(second, config={**second.config, "learning_rate": 1e30}), "cpu")
    row, again, other, diverged = read_rows(Path(first.rows))
    assert row["loss"] == again["loss"] != other["loss"]
    assert diverged["status"] == "diverged"
    assert "loss" not in diverged


def test_a_whole_comparison_in_processes_goes_on_where_it_was(tmp_path, capfd):
    options = _options(tmp_path, variants=("fff-3x2",), implementation="masked")
    lines: list[str] = []
    cut = compare(dataclasses.replace(options, time_limit=1e-3), lines.append, quiet=True)
    assert (cut["missing"], cut["failed"], cut["sections"]) == (1, [], {})
    result = compare(options, lines.append, quiet=True)
    assert result["missing"] == 0
    assert {entry["variant"] for entry in result["sections"]["tiny"]} == {"fff-3x2"}
    assert json.dumps(result, allow_nan=False)
    assert (options.out / "report.md").is_file()
    rows = (options.out / "rows.jsonl").read_text()
    again = compare(options, lines.append, quiet=True)
    assert "0 of 1 runs to make" in lines[-1]
    assert (options.out / "rows.jsonl").read_text() == rows
    assert again["sections"] == result["sections"]
    # Rows of a version that named trees by levels are rows of the same runs.
    old = rows.replace("fff-3x2", "fff-3x3").replace("FFF 3x2", "FFF 3 x 3")
    (options.out / "rows.jsonl").write_text(old)
    again = compare(options, lines.append, quiet=True)
    assert lines[-2:] == [
        "rows of an older version named trees by levels, not by depth: fff-3x3 is fff-3x2 now",
        "1 variants x 1 seeds: 0 of 1 runs to make",
    ]
    assert again["sections"] == result["sections"]
    assert f"The {lines[-2]}." in (options.out / "report.md").read_text()
    (options.out / "rows.jsonl").write_text(rows)
    config = dataclasses.replace(options.config, learning_rate=options.config.learning_rate / 2)
    with pytest.raises(ValueError, match="holds runs of 'fff-3x2' with other settings"):
        compare(dataclasses.replace(options, config=config), lines.append, quiet=True)
    assert (options.out / "rows.jsonl").read_text() == rows


def test_what_memory_cannot_hold_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("nomatmul.train.memory.available_memory", lambda: 1 << 27)
    options = _options(tmp_path, variants=("none", "fff-3x2"))
    with pytest.raises(OutOfMemoryError, match=r"^none: too little memory: about 0\.3 GiB .*--f"):
        compare(options)
    assert not options.out.exists()


def test_the_time_of_all_runs_is_reported_and_shown(tmp_path, monkeypatch):
    runs = _runs(_options(tmp_path, variants=("none", "fff-3x2"), seeds=2))
    costs = run_costs(runs, 1)
    assert set(costs) == {"none", "fff-3x2"}
    assert min(costs.values()) > 0
    assert sum_of(runs, {"none": 100.0, "fff-3x2": 400.0}) == pytest.approx(1020)
    assert about(1020) == "about 17 minutes"
    clock, shown = [1000.0], []
    monkeypatch.setattr("nomatmul.evaluate.compare_runs.time.monotonic", lambda: clock[0])
    console = SimpleNamespace(progress=lambda share, text: shown.append((round(share, 3), text)))
    rows = tmp_path / "rows.jsonl"
    bar = TotalBar(console, runs, {"none": 100.0, "fff-3x2": 400.0}, rows)
    clock[0] += 50.5
    bar.tick()
    append_row(rows, {**runs[2].row, "status": "ok"})
    clock[0] += 449.5
    bar.tick()
    bar.tick()  # too soon
    assert shown == [(0.05, "0 of 4 runs, 0:16:09 left"), (0.397, "1 of 4 runs, 0:12:39 left")]


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
