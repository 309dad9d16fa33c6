"""The config: round trips, defaults, and every refusal by name."""

from __future__ import annotations

import pytest

from nomatmul.formats.config import ModelConfig, default_intermediate_size

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_layers": 2}


def test_round_trip_through_dict_and_file(tmp_path):
    config = ModelConfig(**SIZES, linear="dense", token_mixer="attention", num_heads=4)
    assert ModelConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path / "c.json")
    assert ModelConfig.load(tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("hidden", "expected"), [(1024, 2816), (2048, 5632), (2560, 6912), (128, 512), (96, 256)]
)
def test_intermediate_size_is_the_published_rule(hidden, expected):
    assert default_intermediate_size(hidden) == expected
    assert ModelConfig(100, hidden, 1).intermediate_size == expected


def test_param_count_of_the_published_sizes():
    # 24 layers of 4 D^2 + 3 D M weights, two tables of V D, lower bounds and norms.
    size, inner, layers, vocab = 1024, 2816, 24, 32000
    norms = layers * (2 * size + size + 4 * size + size + inner) + size + size
    expected = layers * (4 * size**2 + 3 * size * inner + size) + 2 * vocab * size + norms
    assert ModelConfig(vocab, size, layers).param_count() == expected


def test_a_tied_head_is_counted_once():
    free = ModelConfig(**SIZES).param_count()
    assert ModelConfig(**SIZES, tie_embeddings=True).param_count() == free - 100 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown config key 'colour'"),
        ({"token_mixer": "lstm"}, "token_mixer 'lstm' is unknown; legal values are 'mlgru', 'att"),
        ({"channel_mixer": None}, "channel_mixer None is unknown"),
        ({"linear": "Ternary"}, "legal values are 'ternary', 'dense'"),
        ({"hidden_size": 0}, r"hidden_size 0 is out of range; it must lie in 1\.\.131072"),
        ({"hidden_size": 131_073}, "hidden_size 131073 is out of range"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ({"num_layers": True}, "num_layers must be a whole number, got True"),
        ({"num_heads": 7}, "num_heads 7 does not divide hidden_size 64"),
        ({"norm_eps": 0}, "norm_eps 0 must be finite and above 0"),
        ({"norm_eps": float("nan")}, "norm_eps nan must be finite"),
        ({"causal": 1}, "causal must be true or false, got 1"),
        ({"eos_token_id": 100}, r"eos_token_id 100 is out of range; it must lie in 0\.\.99"),
        ({"fff_trees": 2}, 'fff_trees and fff_depth belong to channel_mixer "fff"'),
        ({"channel_mixer": "fff"}, "fff_trees must be a whole number, got None"),
        ({"token_mixer": "attention", "num_heads": 64}, "rotary positions need an even head"),
    ],
)
def test_refusals_name_value_and_limit(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**SIZES, **change})


def test_missing_size_is_named():
    with pytest.raises(ValueError, match="the config lacks 'num_layers'"):
        ModelConfig.from_dict({"vocab_size": 1, "hidden_size": 1})


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a":1,"a":2}', "\xff", "[" * 100_000, '{"vocab_size": 1e999}']
)
def test_damaged_files_are_one_clear_line(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.json") as caught:
        ModelConfig.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.json: No such file"):
        ModelConfig.load(tmp_path / "none.json")
