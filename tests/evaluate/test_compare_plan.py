"""Variants, counted products, cells and rows of a comparison: no training."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from nomatmul.cli.compare import tokens
from nomatmul.evaluate.flops import channel_products, mixer_products, training_flops
from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.evaluate.variants import default_names, make_variant, rows_of, tree_shapes
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from studies.compare.plan import (
    Cell,
    find_row,
    identity,
    make_cell,
    missing,
)

BASE = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=4, token_mixer="attention", linear="dense",
    channel_mixer="ffn", intermediate_size=2048, num_heads=2,
)  # fmt: skip
UNION = ModelConfig(vocab_size=64, hidden_size=32, num_layers=4, intermediate_size=1360)


def _channel_weights(model: ModelConfig) -> int:
    """Elements of the channel mixers' matrices, from the list of tensors."""
    return sum(
        shape[0] * shape[1]
        for name, shape in architecture_of(model).tensors().items()
        if ".channel." in name and len(shape) == 2
    )


def test_default_controls_have_equal_parameters_and_equal_active_widths():
    names = default_names(BASE)
    assert names[:2] == ["dense", "none"]
    assert "fff-16x6" in names
    assert "dense-112" in names
    assert "fff-16x6-balanced" in names
    for trees, depth in tree_shapes(2048):
        rows = trees * (2 ** (depth + 1) - 1)
        assert 0.9 * 2048 < rows <= 2048
        assert f"dense-{trees * (depth + 1)}" in names


@pytest.mark.parametrize("rows", [1, 2, 3, 14, 15, 127, 504, 4095, 13824])
def test_tree_shapes_fit_any_size(rows):
    for trees, depth in tree_shapes(rows):
        assert trees >= 1
        assert depth >= 0
        assert trees * (2 ** (depth + 1) - 1) <= rows


@pytest.mark.parametrize("base", [BASE, UNION])
def test_variants_differ_in_the_channel_mixer_only(base):
    for name in [*default_names(base), "fff-4x2-every2", "fff-4x2-master8"]:
        model = make_variant(base, name).model
        for field in ("token_mixer", "linear", "hidden_size", "num_layers", "vocab_size", "norm"):
            assert getattr(model, field) == getattr(base, field)


def test_neurons_and_active_of_the_forms():
    def sizes(name):
        variant = make_variant(BASE, name)
        return variant.neurons, variant.active

    assert sizes("dense") == (2048, 2048)
    assert sizes("dense-112") == (112, 112)
    assert sizes("none") == (0, 0)
    assert sizes("fff-16x6") == (16 * 127, 16 * 7)
    assert sizes("fff-16x6-master64") == (16 * 127 + 64, 16 * 7 + 64)
    assert make_variant(BASE, "fff-16x6-every2").model.fff_layers == (1, 3)
    assert make_variant(BASE, "fff-16x6").model.fff_depth == 6


def test_a_glu_counts_as_the_rows_that_its_weights_would_make():
    whole = make_variant(UNION, "dense")
    assert whole.model.channel_mixer == "glu"
    assert whole.neurons == 2040
    trees = make_variant(UNION, "fff-16x6").model
    assert abs(_channel_weights(trees) / _channel_weights(whole.model) - 1) < 0.01
    # From trees to the whole layer and back: the same size.
    again = make_variant(trees, "dense")
    assert abs(again.neurons / 2032 - 1) < 0.01
    assert trees.activation == "silu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fff-16", "variant 'fff-16' is not known"),
        ("fff-0x6", "trees must be at least 1"),
        ("fff-16x6-every1", "every1 must be at least every2"),
        ("fff-16x6-balance", "is not known"),
        ("gated-16x6", "variant 'gated-16x6' is not known"),
        ("fff-1x5-leaf64", "is not known"),
        ("dense-0", "intermediate_size"),
        ("fff-1x39", "fff_depth"),
    ],
)
def test_bad_names_are_value_errors(name, message):
    with pytest.raises(ValueError, match=message):
        make_variant(BASE, name)


def test_a_recipe_without_channel_mixer_has_nothing_to_compare():
    bare = dataclasses.replace(BASE, channel_mixer="none")
    with pytest.raises(ValueError, match="has no size to compare at"):
        rows_of(bare)


@pytest.mark.parametrize("name", ["dense", "dense-112", "fff-16x6", "fff-16x6-master64"])
@pytest.mark.parametrize("base", [BASE, UNION])
def test_products_of_all_neurons_are_the_weights(base, name):
    model = make_variant(base, name).model
    assert channel_products(model, masked=True) == _channel_weights(model)


def test_products_of_the_path():
    trees = make_variant(BASE, "fff-16x6").model
    assert channel_products(trees) == 4 * 2 * 32 * 112
    assert channel_products(make_variant(BASE, "dense-112").model) == channel_products(trees)
    every = make_variant(BASE, "fff-16x6-every2").model
    assert channel_products(every) == 2 * 2 * 32 * 112 + 2 * 2 * 32 * 2048
    none = make_variant(BASE, "none").model
    assert channel_products(none) == 0
    head = 64 * 32
    assert training_flops(none, 16) == 6 * (mixer_products(none, 16) + head)
    assert training_flops(none, 16, predicted=0.25) == 6 * (mixer_products(none, 16) + head / 4)


def _cell(name: str = "fff-4x2-balanced", **values) -> Cell:
    config = TrainConfig(recipe="r", model=BASE, sequence_length=16, batch_size=2,
                         micro_batch_size=2, steps=10, schedule="cosine_halved")  # fmt: skip
    given = {
        "section": "r", "seeds": (1, 2), "train": ("/a/train",), "valid": {"v": "/a/valid"},
        "rows": "rows.jsonl", **values,
    }  # fmt: skip
    return make_cell(config, make_variant(BASE, name), **given)


def test_cells_travel_as_json():
    cell = _cell()
    assert Cell.from_json(cell.to_json()) == cell
    assert cell.train_config.fff_balance > 0


def test_options_of_trees_stay_with_trees():
    trained = TrainConfig(
        recipe="r", model=make_variant(BASE, "fff-4x2").model, sequence_length=16, batch_size=2,
        micro_batch_size=2, steps=10, fff_balance=0.5,
    )  # fmt: skip
    values = {"section": "r", "seeds": (1,), "train": (), "valid": {}, "rows": "x"}
    dense = make_cell(trained, make_variant(trained.model, "dense"), **values)
    assert dense.train_config.fff_balance == 0.0
    assert make_cell(trained, make_variant(trained.model, "fff-4x2"), **values).train_config == (
        trained
    )


def _row(cell: Cell, seed: int, status: str = "ok") -> dict:
    return {
        "section": cell.section, "variant": cell.variant, "stage": cell.stage, "seed": seed,
        "identity": identity(cell), "steps_planned": cell.config["steps"], "status": status,
    }  # fmt: skip


def test_only_what_has_no_row_is_to_do():
    cell = _cell()
    assert missing([], [cell]) == [cell]
    assert missing([_row(cell, 1)], [cell])[0].seeds == (2,)
    assert missing([_row(cell, 1), _row(cell, 2, "diverged")], [cell]) == []
    assert missing([_row(cell, 1, "cut")], [cell])[0].seeds == (1, 2)


def test_what_decides_the_result_makes_another_run():
    cell = _cell()
    rows = [_row(cell, 1)]
    assert find_row(rows, cell, 1) is not None
    assert find_row(rows, _cell(train=("/elsewhere/train",)), 1) is not None
    for name, value in (("learning_rate", 0.5), ("sequence_length", 8), ("clip_norm", 0.5),
                        ("full_precision", 0.5)):  # fmt: skip
        other = dataclasses.replace(cell, config={**cell.config, name: value})
        assert find_row(rows, other, 1) is None
    longer = dataclasses.replace(cell, config={**cell.config, "steps": 11})
    assert find_row(rows, longer, 1) is None
    assert find_row(rows, _cell("fff-4x2"), 1) is None


def test_rows_of_older_versions_are_found():
    """The hash of a cell as nomatmul wrote it when it had more options of trees."""
    assert identity(_cell()) == "4c920865d891"
    assert identity(_cell("dense")) == "e46b03908b01"


def test_a_line_that_was_cut_is_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    append_row(file, {"a": 1})
    with open(file, "a") as stream:
        stream.write('{"a": 2, "b"')
    assert read_rows(file) == [{"a": 1}]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (("fff-16x7", "FFF 16 x 7"), ("fff-16x6", "FFF 16x6")),
        (("fff-1x6-leaf64", "FFF 1 x 6, leaves of 64"),
         ("fff-1x5-leaf64", "FFF 1x5, leaves of 64")),
        (("gated-90x4-master64", "gated FFF 90 x 4 + 64"),
         ("gated-90x3-master64", "gated FFF 90x3 + 64")),
        (("fff-16x6", "FFF 16x6"), ("fff-16x6", "FFF 16x6")),
        (("dense-112", "dense 112"), ("dense-112", "dense 112")),
        (("deep", "9 x 192: deeper"), ("deep", "9 x 192: deeper")),
    ],
)  # fmt: skip
def test_rows_that_named_trees_by_levels_are_read_by_depth(tmp_path, written, read):
    file = tmp_path / "rows.jsonl"
    append_row(file, {"variant": written[0], "label": written[1]})
    (row,) = read_rows(file)
    assert (row["variant"], row["label"]) == read
    assert row.get("renamed_from", read[0]) == written[0]


def test_rows_without_a_label_named_trees_by_levels(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_row(file, {"variant": "fff-16x7", "score": 0.5})
    append_row(file, {"layer": "masked 1 x 12"})
    assert [row.get("variant", row.get("layer")) for row in read_rows(file)] == [
        "fff-16x6", "masked 1x11",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("300k", 300_000), ("26M", 26_000_000), ("1.5e6", 1_500_000), ("2b", 2e9)]
)
def test_budgets_are_read_as_people_write_them(text, value):
    assert tokens(text) == value


@pytest.mark.parametrize("text", ["", "M", "0", "-3", "many", "nan", "1e30"])
def test_budgets_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of tokens"):
        tokens(text)
