"""The config: round trips, defaults, and every refusal by name."""

from __future__ import annotations

import json

import pytest

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.dials import default_intermediate_size
from nomatmul.formats.rotary import RopeScaling

TREES = {"channel_mixer": "fff", "fff_trees": 2, "fff_depth": 3}
SIZES = {"vocab_size": 100, "hidden_size": 64, "num_layers": 2}


def test_round_trip_through_dict_and_file(tmp_path):
    config = ModelConfig(**SIZES, linear="dense", token_mixer="attention", num_heads=4)
    assert ModelConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path / "c.json")
    assert ModelConfig.load(tmp_path / "c.json") == config


def test_what_older_versions_know_is_written_as_they_wrote_it():
    written = ModelConfig(**SIZES).to_dict()
    assert "norm" not in written
    assert not [name for name in written if name.startswith("fff_") and written[name] is not None]
    config = ModelConfig(**SIZES, **TREES, norm="layer", fff_layers=[1, 0], fff_master_width=3)
    assert config.fff_layers == (0, 1)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["norm"] == "layer"


BITNET = {
    "token_mixer": "attention",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "linear_norm": "sub",
    "rounding": "even",
    "glu_activation": "relu2",
    "split_gate": True,
    "head_linear": "dense",
}
GROUPS = {
    "token_mixer": "attention",
    "linear_norm": "none",
    "scale_group": 64,
    "qk_norm": True,
    "embedding_linear": "ternary",
}
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("dials", [BITNET, GROUPS, {**BITNET, "rope_scaling": YARN}])
def test_dials_of_published_transformers_round_trip(dials, tmp_path):
    config = ModelConfig(**SIZES, **dials)
    assert ModelConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path / "c.json")
    assert ModelConfig.load(tmp_path / "c.json") == config
    assert set(dials) <= set(json.loads((tmp_path / "c.json").read_text()))
    assert not (set(BITNET | GROUPS | {"rope_scaling": 0}) - {"token_mixer", "num_heads"}) & set(
        ModelConfig(**SIZES, token_mixer="attention").to_dict()
    ) - {"glu_activation"}


def test_scaling_is_written_in_the_words_of_transformers():
    config = ModelConfig(**SIZES, **{**BITNET, "rope_scaling": YARN})
    assert config.rope_scaling == RopeScaling("yarn", 4.0, original_max_position_embeddings=64)
    assert config.to_dict()["rope_scaling"] == YARN
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))
    plain = ModelConfig(**SIZES, **{**BITNET, "rope_scaling": {"rope_type": "default"}})
    assert plain.rope_scaling is None


def test_heads_have_a_size_of_their_own():
    config = ModelConfig(**SIZES, token_mixer="attention", num_heads=7, head_dim=10)
    assert (config.head_size, config.kv_heads, config.num_kv_heads) == (10, 7, None)
    assert ModelConfig(**SIZES, **BITNET).kv_heads == 2


def test_dials_that_are_gone_load_where_they_were_off(tmp_path):
    config = ModelConfig(**SIZES, **TREES)
    values = {**config.to_dict(), "fff_gated": False, "fff_leaf_width": None}
    assert ModelConfig.from_dict(values) == config
    (tmp_path / "config.json").write_text(json.dumps({**values, "fff_leaf_width": 4}))
    with pytest.raises(ValueError, match=r"config\.json: fff_leaf_width 4 is no longer part"):
        ModelConfig.load(tmp_path / "config.json")


def test_rows_of_trees_and_the_mixer_of_each_layer():
    config = ModelConfig(**SIZES, **TREES, fff_layers=[1])
    (trees,) = architecture_of(config).trees().values()
    assert (trees.nodes, trees.rows) == (15, 30)
    assert [config.channel_of(layer) for layer in range(2)] == ["ffn", "fff"]
    glu = ModelConfig(**SIZES)
    assert [glu.channel_of(layer) for layer in range(2)] == ["glu", "glu"]


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
        ({"glu_activation": "tanh"}, "glu_activation 'tanh' is unknown"),
        ({"glu_activation": "gelu"}, "glu_activation 'gelu' belongs to channel_mixer \"glu\""),
        ({"norm": "batch"}, "norm 'batch' is unknown; legal values are 'rms', 'layer'"),
        ({"positions": "learned"}, "positions 'learned' is unknown"),
        ({"positions": "sinusoidal"}, "positions 'sinusoidal' belong to token_mixer 'attention'"),
        ({"activation": "tanh"}, "legal values are 'gelu', 'silu', 'relu'"),
        ({"embedding_norm": 1}, "embedding_norm must be true or false, got 1"),
        ({"fff_layers": [0]}, 'fff_layers belongs to channel_mixer "fff"'),
        ({"fff_master_width": 4}, 'fff_master_width belongs to channel_mixer "fff"'),
        ({**TREES, "fff_depth": 25}, r"fff_depth 25 is out of range; it must lie in 0\.\.24"),
        ({**TREES, "fff_depth": -1}, r"fff_depth -1 is out of range; it must lie in 0\.\.24"),
        ({**TREES, "fff_trees": 0}, r"fff_trees 0 is out of range; it must lie in 1\.\."),
        ({**TREES, "fff_trees": 200, "fff_depth": 24}, "have more rows than int32 can number"),
        ({**TREES, "fff_trees": 100_000, "fff_depth": 3}, "400000 is out of range"),
        ({**TREES, "fff_leaf_width": 4}, "fff_leaf_width 4 is no longer part of nomatmul"),
        ({**TREES, "fff_gated": True}, "fff_gated True is no longer part of nomatmul"),
        ({**TREES, "fff_master_width": -1}, "fff_master_width -1 is out of range"),
        ({**TREES, "fff_bias": True}, "fff_bias belongs to linear 'dense'"),
        ({**TREES, "fff_layers": [2]}, r"a layer in fff_layers: 2 is out of range; .* 0\.\.1"),
        ({**TREES, "fff_layers": [1, 1]}, "must name layers, each of them once"),
        ({**TREES, "fff_layers": []}, "must name layers, each of them once"),
        ({**TREES, "fff_layers": 1}, "fff_layers must be a list of layers, got 1"),
        ({"token_mixer": "attention", "num_heads": 64}, "rotary positions need an even head"),
        ({**BITNET, "head_dim": 31}, "an even head size, got head_dim 31"),
        ({**BITNET, "head_dim": 0}, r"head_dim 0 is out of range; it must lie in 1\.\.131072"),
        ({**BITNET, "num_heads": 8192}, r"num_heads \* head_dim 262144 is out of range"),
        ({**BITNET, "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({**BITNET, "num_kv_heads": 8}, r"num_kv_heads 8 is out of range; it must lie in 1\.\.4"),
        ({**BITNET, "num_kv_heads": 0}, "num_kv_heads 0 is out of range"),
        ({"num_kv_heads": 1}, "num_kv_heads belongs to token_mixer 'attention', got 'mlgru'"),
        ({"qk_norm": True}, "qk_norm belongs to token_mixer 'attention'"),
        ({"rope_scaling": YARN}, "rope_scaling belongs to token_mixer 'attention'"),
        ({**BITNET, "positions": "none", "rope_scaling": YARN}, "belongs to positions 'rotary'"),
        ({**BITNET, "rope_theta": 1, "rope_scaling": YARN}, "needs a rope_theta above 1, got 1"),
        ({**BITNET, "qk_norm": 1}, "qk_norm must be true or false, got 1"),
        ({**BITNET, "linear_norm": "some"}, "legal values are 'all', 'sub', 'none'"),
        ({**BITNET, "linear": "dense"}, "linear_norm 'sub' belongs to causal models with linear"),
        ({"linear_norm": "none"}, "linear_norm 'none' belongs to causal models"),
        ({**BITNET, "causal": False}, "linear_norm 'sub' belongs to causal models"),
        ({"rounding": "even"}, "rounding 'even' belongs to causal models"),
        ({**BITNET, "rounding": "down"}, "rounding 'down' is unknown"),
        ({**BITNET, "split_gate": "yes"}, "split_gate must be true or false, got 'yes'"),
        ({**BITNET, "channel_mixer": "none"}, 'belongs to channel_mixer "glu"'),
        ({**BITNET, "head_linear": "int8"}, "head_linear 'int8' is unknown"),
        ({"head_linear": "dense"}, "head_linear 'dense' belongs to causal models"),
        ({**GROUPS, "scale_group": 48}, "scale_group 48 is unknown; legal values: 0, 32, 64, 128"),
        ({**GROUPS, "scale_group": True}, "scale_group True is unknown"),
        ({**GROUPS, "scale_group": 128}, "does not divide the 64 inputs of q_proj, k_proj, v_proj"),
        ({**GROUPS, "head_dim": 2}, "scale_group 64 does not divide the 2 inputs of o_proj"),
        ({**GROUPS, "intermediate_size": 96}, "does not divide the 96 inputs of down_proj"),
        ({**GROUPS, "rounding": "up"}, "rounding 'up' belongs to models with int8 activations"),
        ({**BITNET, "embedding_linear": "ternary"}, "embedding_linear 'ternary' needs a scale_gr"),
        ({**GROUPS, "tie_embeddings": True, "head_linear": "dense"}, "a head that is tied to a t"),
        ({**GROUPS, "tie_embeddings": True, "embedding_linear": "dense"}, "head with scale groups"),
        ({**BITNET, "glu_activation": "gelu"}, 'ternary ones have "silu" or "relu2"'),
        ({**TREES, "activation": "relu2"}, "activation of trees 'relu2' is unknown"),
        ({**TREES, **GROUPS}, "does not go with channel_mixer 'fff'"),
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
