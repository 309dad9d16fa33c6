"""The native graph: its description, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from encoder_files import DIALS, encoder_config
from engine_models import ATTENTION, CONFIG
from union_models import union

from nomatmul.engine import random_model
from nomatmul.engine.graph import describe
from nomatmul.engine.native import native
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.layout import Forms

DECODER = describe(CONFIG, Forms("int8", ternary="2bit"))
ENCODER = describe(encoder_config(**DIALS["trees"]), Forms("f32", dense="f32", rows="f32"))


def model(description, isa=None, threads=1):
    return native().Model(description, isa, threads)


def test_a_description_names_every_part():
    layer = DECODER["layers"][1]
    assert (layer["mixer"]["kind"], layer["channel"]["kind"]) == ("mlgru", "glu")
    assert layer["channel"]["gate_proj"] == {
        "kind": "ternary",
        "packing": "2bit",
        "norm_eps": CONFIG.linear_norm_eps,
        "rounding": "away",
        "scale_rows": 0,
        "outputs": 2 * CONFIG.mlp_size,
        "inputs": CONFIG.hidden_size,
    }
    assert DECODER["head"]["outputs"] == CONFIG.vocab_size
    assert DECODER["final_norm"]["exact"]
    assert (
        describe(union(), Forms("bf16", ternary="2bit", rows="2bit"))["layers"][0]["channel"][
            "form"
        ]
        == "ternary"
    )
    assert ENCODER["layers"][0]["channel"]["form"] == "f32"
    assert "head" not in ENCODER
    assert not ENCODER["final_norm"]["exact"]


def test_a_limit_of_positions_may_be_any_that_a_config_has():
    config = dataclasses.replace(ATTENTION, max_position_embeddings=2**31)
    session = random_model(config, threads=1).session()
    assert session.append([1, 2, 3]).shape == (config.vocab_size,)


def test_layers_may_differ():
    """A block without a channel mixer beside one with a GLU."""
    mixed = copy.deepcopy(DECODER)
    del mixed["layers"][1]["channel"], mixed["layers"][1]["channel_norm"]
    with pytest.raises(ValueError, match=r"no tensor layers.1.channel.gate_proj.packed"):
        model(mixed).set("layers.1.channel.gate_proj.packed", np.zeros((1, 32), np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["layers"][0]["mixer"].update(kind="mamba"),
            'mixer "mamba" is unknown: mlgru, attention,',
        ),
        (lambda d: d["embedding"].update(form="f8"), 'form "f8" is unknown: int8, int8-32,'),
        (lambda d: d["embedding"].update(vocabulary=0), "vocabulary is 0.0+, expected 1 to"),
        (lambda d: d.update(chunk=0), "chunk is 0.0+, expected 1 to 65536"),
        (lambda d: d["head"].update(packing="3bit"), 'packing "3bit" is unknown'),
        (lambda d: d["head"].update(rounding="down"), 'rounding "down" is unknown: away, even or'),
        (
            lambda d: d["head"].update(scale_rows=d["head"]["outputs"] - 1),
            r"head: blocks of \d+ rows do not divide",
        ),
        (
            lambda d: d["head"].update(kind="sparse"),
            'linear "sparse" is unknown: ternary, int8 or float',
        ),
        (lambda d: d["layers"][2]["mixer"].pop("i_proj"), "mlgru: i_proj is missing"),
        (lambda d: d.pop("final_norm"), "final_norm is missing"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(change, message):
    changed = copy.deepcopy(DECODER)
    change(changed)
    with pytest.raises(ValueError, match=message):
        model(changed)


def test_heads_that_do_not_fit_together_are_refused():
    attention = describe(
        ModelConfig(
            vocab_size=31, hidden_size=24, num_layers=2, intermediate_size=32,
            token_mixer="attention", num_heads=6, num_kv_heads=2, head_dim=8,
        ),
        Forms("int8", ternary="2bit"),
    )  # fmt: skip
    model(attention)
    for field, value in (("kv_heads", 4), ("heads", 3), ("head_size", 4)):
        changed = copy.deepcopy(attention)
        changed["layers"][0]["mixer"][field] = value
        with pytest.raises(ValueError, match=r"layers.0.mixer: heads and linears do not fit"):
            model(changed)
    changed = copy.deepcopy(attention)
    changed["layers"][1]["mixer"]["rotary"]["count"] = 3
    with pytest.raises(ValueError, match=r"layers.1.mixer: as many frequencies as half a head"):
        model(changed)
    changed = copy.deepcopy(attention)
    changed["kv"] = "f64"
    with pytest.raises(ValueError, match='kv "f64" is unknown: f16, int8 or f32'):
        model(changed)


def test_decoders_step_and_encoders_encode():
    ids, offsets = np.zeros(2, np.int32), np.array([0, 2])
    with pytest.raises(ValueError, match="call encode"):
        model(ENCODER).step([], [], [], "last")
    with pytest.raises(ValueError, match="call step"):
        model(DECODER).encode(ids, offsets)
    with pytest.raises(ValueError, match=r"tensors are missing, embedding.weight among them"):
        model(ENCODER).encode(ids, offsets)


def test_tensors_are_checked():
    core = model(ENCODER)
    with pytest.raises(ValueError, match=r"final_norm.weight has 12 bytes, expected 96"):
        core.set("final_norm.weight", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"final_norm.weight has the wrong dtype"):
        core.set("final_norm.weight", np.zeros(24, np.int8))
