"""The study of FFF layers: its plan, its squeezed models, the tables of its page."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu_common import ROOT
from benchmarks.tables import filled
from studies.compare.plan import identity
from studies.compare.summary import Entry
from studies.fff import page, plan
from studies.fff.ship import choose, is_ternary


def _args(tmp_path: Path, **values) -> argparse.Namespace:
    given = {
        "sections": list(plan.FIRST), "probes": list(plan.CHECKED),
        "tiny": False, "length": 512, "batch": 64, "warmup": 80, "tokens": 26e6,
        "encoder_tokens": 16e6, "ternary_tokens": 13e6, "cells": None, "parts": [],
        "rate_tokens": 7e6, "eval_tokens": 1e6, "points": 8, "seeds": 2,
        "more_seeds": 1, "first_only": False, "probe_first": False, "work": tmp_path,
        "out": tmp_path, "compile": "auto", "implementation": "masked", "commit": "c", **values,
    }  # fmt: skip
    return argparse.Namespace(**given)


def test_cells_come_in_turn_and_no_run_is_planned_twice(tmp_path):
    cells = plan.plan(_args(tmp_path))
    sections = list(plan.FIRST)
    assert [cell.section for cell in cells[: len(sections)]] == sections
    runs = [(c.section, c.variant, c.stage, identity(c), seed) for c in cells for seed in c.seeds]
    assert len(runs) == len(set(runs))


def test_named_cells_are_those_alone_in_their_order(tmp_path):
    named = ["union:fff-64x4:2", "causal:dense:1,3"]
    cells = plan.plan(_args(tmp_path, cells=named))
    found = [(cell.section, cell.variant, cell.seeds) for cell in cells]
    assert found == [("union", "fff-64x4", (2,)), ("causal", "dense", (1, 3))]
    # They are the cells of the whole plan: a row of one counts for the other.
    whole = {(c.section, c.variant): identity(c) for c in plan.plan(_args(tmp_path))}
    assert all(identity(cell) == whole[cell.section, cell.variant] for cell in cells)
    for text in ("causal:dense", "sonnet:dense:1", "causal:dense:one"):
        with pytest.raises(ValueError, match="use SECTION:VARIANT:SEED"):
            plan.plan(_args(tmp_path, cells=[text]))


def test_sections_differ_in_the_channel_mixer_only(tmp_path):
    cells = [c for c in plan.plan(_args(tmp_path)) if c.stage == "final"]
    for section in plan.FIRST:
        configs = [cell.train_config for cell in cells if cell.section == section]
        for field in ("learning_rate", "steps", "batch_size", "sequence_length", "warmup_steps"):
            assert len({getattr(config, field) for config in configs}) == 1
        for field in ("hidden_size", "num_layers", "token_mixer", "linear", "positions", "norm"):
            assert len({getattr(config.model, field) for config in configs}) == 1


def test_encoders_are_kept_for_fine_tuning_and_their_trees_have_a_bias(tmp_path):
    cells = plan.plan(_args(tmp_path, sections=["encoder"], probes=[]))
    kept = {cell.variant for cell in cells if cell.keep}
    assert kept == set(plan.FINE_TUNED)
    for cell in cells:
        model = cell.train_config.model
        assert model.fff_bias == (model.channel_mixer == "fff")


def _entry(variant: str, score: float, active: int, section: str = "union", **values) -> Entry:
    given = {
        "section": section, "variant": variant, "label": page.name_of(variant), "metric": "bpb",
        "score": score, "error": 0.001, "values": (score, score), "tokens": 1, "parameters": 1,
        "neurons": 2032 if active else 0, "active": active, "flops_per_token": 1.0,
        "flops_masked_per_token": 1.0, "tokens_per_second": 1.0, "learning_rate": 1e-3, **values,
    }  # fmt: skip
    return Entry(**given)


def test_the_model_to_ship_has_the_fewest_active_neurons_near_the_best():
    entries = [
        _entry("fff-64x4", 1.600, 320), _entry("fff-16x6", 1.615, 112),
        _entry("fff-1x10", 1.70, 11), _entry("dense", 1.5, 2040),
        _entry("fff-16x8", 1.58, 144, neurons=8176),
    ]  # fmt: skip
    assert choose(entries, 2040) == "fff-16x6"
    assert choose([_entry("dense", 1.5, 2040)], 2040) is None


def test_the_page_has_the_tables_of_its_rows():
    text = page.PAGE.read_text("utf-8")
    made = page.all_tables(ROOT / "benchmarks/results/2026-11-22-h200")
    assert filled(text, made) == text
    assert set(made) - set(re.findall(r"<!-- table: (.*?) -->", text)) == {"trained longer"}
    with pytest.raises(ValueError, match="0 blocks for the table 'other'"):
        filled(text, {"other": ["| a |"]})


def test_names_of_command_lines_stand_in_tables():
    assert page.name_of("fff-16x6-balanced") == "FFF 16x6, balanced"
    assert page.name_of("gated-90x3-master64") == "gated FFF 90x3 + 64"
    assert page.name_of("dense-112") == "dense 112"


def test_differences_have_the_error_of_the_seeds():
    tree, control = _entry("fff-16x6", 1.61, 112), _entry("dense-112", 1.64, 112)
    none = _entry("none", 1.70, 0, error=None)
    line = page.score_table([tree, control, none])[2]
    assert "| - | -0.030 ± 0.001 | -0.090 | - | - |" in line


def test_squeezed_models_keep_ternary_values_and_scales(tmp_path):
    import torch
    from model_files import write_tokenizer
    from safetensors.numpy import load_file

    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.quantise import quantise_weight
    from nomatmul.models import CausalLM, CausalLMConfig
    from studies.fff.ship import expand, squeeze

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40, hidden_size=32, num_layers=2, channel_mixer="fff", fff_trees=2, fff_depth=2,
        activation="silu",
    )  # fmt: skip
    CausalLM(CausalLMConfig.from_model_config(config)).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    squeeze(tmp_path / "model", tmp_path / "small.safetensors")
    expand(tmp_path / "small.safetensors", tmp_path / "again")
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert set(before) == set(after)
    ternary = [name for name in before if is_ternary(name, config)]
    assert any(name.endswith("w_in") for name in ternary)
    for name in ternary:
        ours, scale = quantise_weight(before[name])
        again, scale_again = quantise_weight(after[name])
        np.testing.assert_array_equal(ours, again)
        assert abs(scale_again / scale - 1) < 1e-6
    assert not is_ternary("layers.0.channel.w_in", dataclasses.replace(config, linear="dense"))
