"""The table of parts: names, shapes, state and operations; and who runs what."""

from __future__ import annotations

import pytest

from nomatmul.formats import capability
from nomatmul.formats.architecture import (
    GLU,
    Attention,
    Embedding,
    Linear,
    Norm,
    Piece,
    architecture_of,
)
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
    assert [(p.name, p.shape, p.grows, p.dtype, p.nbytes) for p in pieces] == [
        ("k", (4, 8), True, "f16", 64),
        ("v", (4, 8), True, "f16", 64),
    ]
    assert Piece("h", (32,)).nbytes == 128
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


BITNET = {
    "token_mixer": "attention",
    "num_heads": 4,
    "num_kv_heads": 2,
    "split_gate": True,
    "linear_norm": "sub",
    "rounding": "even",
    "glu_activation": "relu2",
    "head_linear": "dense",
    "tie_embeddings": True,
}
BONSAI = {
    "token_mixer": "attention",
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 24,
    "qk_norm": True,
    "linear_norm": "none",
    "scale_group": 32,
    "embedding_linear": "ternary",
    "intermediate_size": 64,
}


def test_sub_norms_and_scales_of_halves():
    model = architecture_of(config(**BITNET))
    mixer, channel = model.blocks[1].mixer, model.blocks[1].channel
    assert isinstance(mixer, Attention)
    assert isinstance(channel, GLU)
    linears = model.linears()
    normed = [name for name, linear in linears.items() if linear.norm_eps is not None]
    assert normed == [
        f"layers.{n}.{at}" for n in (0, 1) for at in ("mixer.o_proj", "channel.down_proj")
    ]
    shapes = model.tensors()
    assert shapes["layers.1.mixer.o_proj.norm.weight"] == (32,)
    assert "layers.1.mixer.q_proj.norm.weight" not in shapes
    assert shapes["layers.1.mixer.k_proj.weight"] == (16, 32)
    assert (mixer.heads, mixer.kv_heads, mixer.head_size) == (4, 2, 8)
    assert channel.gate_proj.scale_shape == (2,)
    assert channel.down_proj.scale_shape == mixer.q_proj.scale_shape == (1,)
    assert {linear.rounding for linear in linears.values() if linear.kind == "ternary"} == {"even"}
    assert model.head == Linear("dense", 50, 32, None, tied=True)
    assert model.embedding == Embedding("dense", 50, 32)
    # per layer 32*32*2 + 16*32*2 + 3*32*40 weights, two block norms, norms of o and of down
    assert model.parameters() == 50 * 32 + 32 + 2 * (3072 + 3840 + 3 * 32 + 40)
    assert model.max_length == 2048
    assert architecture_of(config()).max_length is None


def test_group_scales_norms_of_heads_and_a_ternary_table():
    model = architecture_of(config(**BONSAI))
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Attention)
    assert mixer.q_norm == mixer.k_norm == Norm("rms", 24, 1e-6)
    assert "layers.1.mixer.q_norm" in model.norms()
    assert model.tensors()["layers.0.mixer.k_norm.weight"] == (24,)
    assert mixer.o_proj == Linear("ternary", 32, 96, None, False, 1, 32, "even")
    assert mixer.o_proj.scale_shape == (32, 3)
    assert model.blocks[0].mixer.active_products() == 2 * 32 * 96 + 2 * 32 * 24
    assert model.embedding == Embedding("ternary", 50, 32, 32)
    assert model.embedding.scale_shape == (50, 1)
    assert [piece.shape for piece in mixer.state()] == [(1, 24)] * 2


@pytest.mark.parametrize(
    ("dials", "backends"),
    [
        ({}, {"packed", "numpy", "native", "cuda", "persistent"}),
        ({**TREES, "activation": "silu"}, {"packed", "numpy", "native", "cuda"}),
        ({"channel_mixer": "none"}, {"packed", "numpy", "native", "cuda", "persistent"}),
        ({"token_mixer": "attention"}, {"packed", "numpy", "native"}),
        ({"linear": "dense"}, {"numpy"}),
        (ENCODER, {"packed", "numpy", "native"}),
        ({**ENCODER, **TREES}, {"packed", "numpy", "native"}),
        ({"norm": "layer"}, set()),
        ({"glu_activation": "relu2"}, {"packed", "numpy", "native"}),
        ({**ENCODER, "num_kv_heads": 2}, {"numpy"}),
        ({**ENCODER, "qk_norm": True}, {"numpy"}),
        ({**ENCODER, "head_dim": 4}, {"numpy"}),
        ({**ENCODER, "glu_activation": "relu2"}, {"numpy"}),
        (BITNET, {"packed", "numpy", "native"}),
        (BONSAI, {"packed", "numpy", "native"}),
    ],
)
def test_who_runs_what(dials: dict[str, object], backends: set[str]):
    model = config(**dials)
    names = ("packed", "numpy", "native", "cuda", "persistent")
    assert {name for name in names if capability.runs(model, name)} == backends
    for name in set(names) - backends:
        with pytest.raises(ValueError, match=r"has no .*nomatmul\.models runs it with torch"):
            capability.check(model, name)


def test_gate_and_up_lie_apart_where_each_has_a_norm():
    sizes = {"vocab_size": 8, "hidden_size": 32, "num_layers": 1, "intermediate_size": 64}
    dials = {"token_mixer": "attention", "rounding": "even", "split_gate": True}
    model = architecture_of(ModelConfig(**sizes, **dials, linear_norm="all"))
    shapes = model.tensors()
    for name in ("gate_proj", "up_proj"):
        assert shapes[f"layers.0.channel.{name}.weight"] == (64, 32)
        assert shapes[f"layers.0.channel.{name}.norm.weight"] == (32,)
    stacked = architecture_of(ModelConfig(**sizes, **dials, linear_norm="none"))
    assert stacked.tensors()["layers.0.channel.gate_proj.weight"] == (128, 32)
    assert stacked.linears()["layers.0.channel.gate_proj"].scale_rows == 64
