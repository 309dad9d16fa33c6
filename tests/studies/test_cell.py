"""Runs of a study on tiny models: equal seeds are alike, all variants see the same tokens."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch
from train_jobs import make_text

from nomatmul.evaluate.rows import read_rows
from nomatmul.evaluate.variants import make_variant
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from nomatmul.train.inputs import DataArgs, check_inputs
from nomatmul.train.plan import DevicePlan
from nomatmul.train.prepare import build, open_built, with_token_ids
from studies.compare.cell import run_cell
from studies.compare.curve import Curve
from studies.compare.plan import Cell, make_cell
from studies.compare.texts import Texts

CAUSAL = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "max_position_embeddings": 16,
          "token_mixer": "attention", "linear": "dense", "channel_mixer": "ffn",
          "intermediate_size": 30, "num_heads": 2}  # fmt: skip
UNION = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "intermediate_size": 20}
ENCODER = {**CAUSAL, "causal": False, "norm": "layer", "positions": "sinusoidal",
           "tie_embeddings": True}  # fmt: skip


def _cells(tmp_path, names, model=CAUSAL, implementation="masked") -> list[Cell]:
    """The cells of these variants on the same tokens, 6 steps each."""
    for name, seed in (("train", 0), ("valid", 1)):
        (tmp_path / f"{name}.txt").write_text(make_text(3000, seed))
    config = TrainConfig(
        recipe="tiny", model=ModelConfig.from_dict(model), sequence_length=16, batch_size=4,
        micro_batch_size=4, learning_rate=1e-2, warmup_steps=2, steps=6,
    )  # fmt: skip
    files = [(str(tmp_path / f"{name}.txt"),) for name in ("train", "valid")]
    built = build(config, check_inputs(config, DataArgs(*files)), tmp_path)
    ids = with_token_ids(config.model, open_built(config, built).tokenizer)
    config = dataclasses.replace(config, model=ids)
    return [
        make_cell(
            config, make_variant(ids, name), section="tiny", seeds=(1,), eval_tokens=200,
            train=tuple(built["train"]), valid={"valid": built["valid"][0]}, eval_points=2,
            rows=str(tmp_path / "rows.jsonl"), implementation=implementation,
        )
        for name in names
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (CAUSAL, ("fff-3x2-balanced", "dense-9")),
        (ENCODER, ("fff-3x2-master4", "none")),
        (UNION, ("dense", "fff-3x2", "dense-9")),
    ],
)
def test_every_kind_of_variant_trains_and_is_scored(tmp_path, model, names):
    for cell in _cells(tmp_path, names, model):
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
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(names)


def test_a_finished_run_is_not_made_again_and_equal_seeds_are_equal(tmp_path):
    (cell,) = _cells(tmp_path, ("fff-3x2",))
    (row,) = run_cell(cell)
    assert run_cell(cell) == []
    (again,) = run_cell(dataclasses.replace(cell, stage="again"))
    assert again["loss"] == row["loss"]
    (other,) = run_cell(dataclasses.replace(cell, seeds=(2,)))
    assert other["loss"] != row["loss"]


def test_masked_and_conditional_trees_learn_alike(tmp_path):
    (cell,) = _cells(tmp_path, ("fff-3x2",))
    (masked,) = run_cell(cell)
    (walked,) = run_cell(dataclasses.replace(cell, implementation="naive", stage="again"))
    assert walked["loss"] == pytest.approx(masked["loss"], abs=1e-4)


@pytest.mark.parametrize("model", [CAUSAL, ENCODER])
def test_all_variants_see_the_same_tokens(tmp_path, model):
    first, second = _cells(tmp_path, ("dense", "fff-3x2"), model)
    streams = []
    for cell in (first, second):
        texts = Texts(cell, cell.train_config, DevicePlan(torch.device("cpu")))
        batches = texts.batches(1)
        streams.append([next(batches) for _ in range(3)] + texts.held_out("valid", 200))
    for ours, theirs in zip(*streams, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_a_run_without_time_is_not_begun_or_cut(tmp_path):
    (cell,) = _cells(tmp_path, ("none",))
    late = dataclasses.replace(cell, deadline=1.0)
    assert run_cell(late) == []
    soon = dataclasses.replace(cell, deadline=time.time() + 600)
    slow = dataclasses.replace(soon, expected_speed=0.1)  # 384 tokens: more than an hour
    assert run_cell(slow) == []
    (row,) = run_cell(soon)
    assert row["status"] == "ok"
    assert row["lanes"] == 1
    curve = Curve(late, late.train_config)
    curve.losses.append(torch.tensor(1.0))
    curve.look(1, lambda text: None)
    assert curve.status == "cut"
    in_time = Curve(cell, cell.train_config)
    in_time.losses.append(torch.tensor(1.0))
    in_time.look(1, lambda text: None)
    assert in_time.status == "ok"
    in_time.losses.append(torch.tensor(math.nan))
    in_time.look(2, lambda text: None)
    assert in_time.status == "diverged"
