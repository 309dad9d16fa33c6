"""The table of parts: names, shapes, state and operations; and who runs what."""

from __future__ import annotations

import pytest

from nomatmul.formats import capability
from nomatmul.formats.architecture import Piece, architecture_of
from nomatmul.formats.config import ModelConfig

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "intermediate_size": 40}
TREES = {"channel_mixer": "fff", "fff_trees": 2, "fff_depth": 2}
ENCODER = {"causal": False, "token_mixer": "attention", "linear": "dense", "num_heads": 4}


def config(**dials: object) -> ModelConfig:
    return ModelConfig(**{**SIZES, **dials})  # type: ignore[arg-type]  # dials of many types


def test_names_are_those_of_the_fields():
    model = architecture_of(config())
    assert list(model.linears())[:6] == [
        *(f"layers.0.mixer.{c}_proj" for c in "ifgo"),
        *("layers.0.channel.gate_proj", "layers.0.channel.down_proj"),
    ]
    assert list(model.norms()) == [
        *("layers.0.mixer_norm", "layers.0.mixer.g_norm", "layers.0.channel_norm"),
        *("layers.1.mixer_norm", "layers.1.mixer.g_norm", "layers.1.channel_norm", "final_norm"),
    ]
    shapes = model.tensors()
    assert shapes["layers.1.channel.gate_proj.weight"] == (80, 32)
    assert shapes["layers.1.channel.down_proj.norm.weight"] == (40,)
    assert shapes["lower_bounds"] == (2, 32)


def test_a_master_leaf_is_a_part_inside_a_part():
    model = architecture_of(config(**TREES, activation="silu", fff_master_width=8, fff_layers=[1]))
    assert "layers.1.channel.master.up_proj" in model.linears()
    assert "layers.0.channel.up_proj" in model.linears()
    assert list(model.trees()) == ["layers.1.channel"]
    assert model.tensors()["layers.1.channel.w_in"] == (14, 32)


def test_a_tied_head_has_no_weight_and_a_layer_norm_a_bias():
    shapes = architecture_of(config(**ENCODER, norm="layer", tie_embeddings=True)).tensors()
    assert "head.weight" not in shapes
    assert shapes["final_norm.bias"] == (32,)


def test_state_is_named_pieces():
    recurrent, attention = config(), config(token_mixer="attention", num_heads=4)
    assert architecture_of(recurrent).blocks[0].mixer.state() == (Piece("h", (32,)),)
    pieces = architecture_of(attention).blocks[0].mixer.state()
    assert [(p.name, p.shape, p.grows) for p in pieces] == [
        ("k", (4, 8), True),
        ("v", (4, 8), True),
    ]
    assert architecture_of(config(**ENCODER)).blocks[0].mixer.state() == ()


@pytest.mark.parametrize(
    ("dials", "channel", "masked"),
    [
        ({}, 3 * 32 * 40, 3 * 32 * 40),
        ({"channel_mixer": "ffn"}, 2 * 32 * 40, 2 * 32 * 40),
        (TREES, 2 * 32 * 2 * 3, 2 * 32 * 14),
        ({**TREES, "fff_master_width": 5}, 2 * 32 * (2 * 3 + 5), 2 * 32 * (14 + 5)),
    ],
)
def test_operations_of_a_token(dials: dict[str, object], channel: int, masked: int):
    block = architecture_of(config(**dials)).blocks[0]
    assert block.channel is not None
    assert block.channel.active_products() == channel
    assert block.channel.active_products(masked=True) == masked
    assert block.mixer.active_products() == 4 * 32 * 32


@pytest.mark.parametrize(
    ("dials", "backends"),
    [
        ({}, {"packed", "numpy", "native", "cuda", "persistent"}),
        ({**TREES, "activation": "silu"}, {"packed", "numpy", "native", "cuda"}),
        ({"channel_mixer": "none"}, {"packed", "numpy", "native", "cuda", "persistent"}),
        ({"token_mixer": "attention"}, {"packed", "numpy"}),
        ({"linear": "dense"}, {"numpy"}),
        (ENCODER, {"packed", "numpy", "native"}),
        ({**ENCODER, **TREES}, {"packed", "numpy", "native"}),
        ({"norm": "layer"}, set()),
    ],
)
def test_who_runs_what(dials: dict[str, object], backends: set[str]):
    model = config(**dials)
    names = ("packed", "numpy", "native", "cuda", "persistent")
    assert {name for name in names if capability.runs(model, name)} == backends
    for name in set(names) - backends:
        with pytest.raises(ValueError, match=r"has no .*nomatmul\.models runs it with torch"):
            capability.check(model, name)
