"""The forward pass in integers against the float oracle, its trace, and who is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from model_files import write_packed, write_training
from random_packed import random_arrays, write_arrays, write_random

import nomatmul
from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import Forms, PackedReader
from nomatmul.formats.tokenizer import load_tokenizer
from nomatmul.reference.activations import silu
from nomatmul.reference.integer.model import IntegerModel
from nomatmul.reference.integer.numerics import Formats
from nomatmul.reference.integer.trace import Trace
from nomatmul.reference.linear import IntegerLinear
from nomatmul.reference.model import ReferenceModel
from nomatmul.reference.weights import PackedWeights

SIZES = {"vocab_size": 40, "hidden_size": 48, "num_layers": 2, "intermediate_size": 72}
TREES = {"channel_mixer": "fff", "fff_trees": 3, "fff_depth": 2, "activation": "silu"}
MODELS = {
    "glu": {**SIZES, "use_lower_bound": True},
    "unbounded": {**SIZES, "use_lower_bound": False},
    "large eps": {**SIZES, "gate_norm_eps": 1e5},
    "trees": {**SIZES, **TREES},
    "one tree": {**SIZES, **TREES, "fff_trees": 1, "fff_depth": 4},
}
BOX = Path(nomatmul.__file__).parent / "box"
IDS = np.random.default_rng(5).integers(0, 40, (3, 12))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """{name: reader} of small models of random weights."""
    root, readers = tmp_path_factory.mktemp("integer"), {}
    for name, dials in MODELS.items():
        write_training(root / name / "source", ModelConfig(**dials), np.random.default_rng(7))
        write_packed(
            root / name / "packed", open_checkpoint(root / name / "source"), "1.6bit", "int8"
        )
        readers[name] = PackedReader(root / name / "packed")
    return readers


@pytest.fixture(scope="module")
def box():
    reader = PackedReader(BOX)
    return IntegerModel.from_packed(reader), ReferenceModel.from_packed(reader)


def differences(model: IntegerModel, reader: PackedReader) -> np.ndarray:
    """Of logits, as parts of their spread."""
    real = ReferenceModel.from_packed(reader).forward(IDS).logits_BTV
    logits, _ = model.forward(IDS)
    return np.abs(logits * model.logits_scale - real) / real.std()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_close_to_those_in_float(packed, name):
    off = differences(IntegerModel.from_packed(packed[name]), packed[name])
    # a single activation that falls on the other side of a tie is 1 / 127 of the largest of 48
    assert off.mean() < 0.03
    assert off.max() < 0.5


def test_wider_numbers_are_closer(packed):
    wide = Formats(
        vector_bits=32, vector_fraction=18, state_bits=32, state_fraction=20, weight_bits=18,
        table_bits=12,
    )  # fmt: skip
    narrow = Formats(
        vector_bits=16, vector_fraction=6, state_fraction=6, table_bits=5, weight_bits=6
    )
    off = [
        differences(IntegerModel.from_packed(packed["glu"], formats), packed["glu"]).mean()
        for formats in (wide, Formats(), narrow)
    ]
    assert off[0] <= 1.5 * off[1]
    assert off[1] < 0.3 * off[2]


def read_alike(linear: IntegerLinear, y: np.ndarray, trace: Trace, name: str, source: str) -> None:
    """Whether a BitLinear of float inputs y [K] quantised them, and scales its sums, as traced."""
    q, step = linear.quantised_input(y.astype(np.float32))
    off = np.abs(trace[f"{source}.quantised"] - q)
    assert off.max() <= 1
    assert (off != 0).sum() <= 2
    (m, e), expected = trace[f"{name}.factor"], float(np.ravel(linear.scale)[0]) * float(step[0])
    assert m * 2.0**e == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", ["glu", "unbounded", "large eps"])
@pytest.mark.parametrize("token", [0, 11, 39])
def test_every_norm_and_quantiser_is_that_of_the_oracle(packed, name, token):
    """From the same inputs, so that nothing adds up: eps, folds and scales, part by part."""
    model, oracle = (M.from_packed(packed[name]) for M in (IntegerModel, ReferenceModel))
    trace, weights = Trace(), PackedWeights(packed[name])
    model.step(token, model.new_state(), trace)
    unit, residual = 2.0**-12, 2.0**-model.fractions.residual
    x = trace["embed"] * residual
    for layer, block in enumerate(oracle.blocks):
        at, glu = f"layers.{layer}.mixer", f"layers.{layer}.channel"
        i, f, g, o = weights.linears(block.part.mixer, at)
        y = block.mixer_norm(x.astype(np.float32))
        for key, linear in (("f_proj", f), ("i_proj", i), ("g_proj", g)):
            read_alike(linear, y, trace, f"{at}.{key}", f"{at}.{key}")
        gate = weights.norm(f"{at}.g_norm", block.part.mixer.g_norm)(trace[f"{at}.g"] * unit)
        h = (trace[f"{at}.h"] * unit).astype(np.float32)
        read_alike(o, gate * silu(h), trace, f"{at}.o_proj", f"{at}.o_proj")
        x = trace[f"{at}.residual"] * residual
        gate_up, down = weights.linears(block.part.channel, glu)
        y = block.channel_norm(x.astype(np.float32))
        for key in ("gate_proj", "up_proj"):
            read_alike(gate_up, y, trace, f"{glu}.{key}", f"{glu}.gate_proj")
        u = trace[f"{glu}.u"] * 2.0 ** -model.fractions.channel[layer]
        read_alike(down, u, trace, f"{glu}.down_proj", f"{glu}.down_proj")
        x = trace[f"{glu}.residual"] * residual
    read_alike(oracle.head, oracle.final_norm(x.astype(np.float32)), trace, "head", "head")


@pytest.mark.parametrize("name", ["trees", "one tree"])
def test_paths_are_those_of_the_oracle_where_the_inputs_are_equal(packed, name):
    """The decisions of the first layer's trees, from the same int8 inputs."""
    model = IntegerModel.from_packed(packed[name])
    part = architecture_of(packed[name].config).blocks[0].channel
    found = PackedWeights(packed[name]).trees("layers.0.channel", part)
    for token in range(12):
        trace = Trace()
        model.step(token, model.new_state(), trace)
        q = trace["layers.0.channel.w_in.quantised"].astype(np.int8)
        acc_NTL, rows_NTL = found.visits(q[None])
        assert np.array_equal(trace["layers.0.channel.w_in.rows"], rows_NTL.reshape(-1))
        assert np.array_equal(trace["layers.0.channel.w_in.sums"], acc_NTL.reshape(-1))
        h = (trace["layers.0.channel.h"] * 2.0**-12).astype(np.float32)
        added = trace["layers.0.channel.residual"] - trace["layers.0.mixer.residual"]
        real = found.combine(h[None], rows_NTL.reshape(1, -1))[0]
        off = np.abs(added * 2.0**-model.fractions.residual - real)
        assert off.max() <= 0.02 * np.abs(real).max() + 2.0**-model.fractions.residual


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_whole_pass(packed, name):
    model = IntegerModel.from_packed(packed[name])
    logits_BTV, last = model.forward(IDS)
    chunks = [model.forward(IDS[:, :5])]
    chunks.append(model.forward(IDS[:, 5:], chunks[0][1]))
    assert np.array_equal(np.concatenate([part for part, _ in chunks], axis=1), logits_BTV)
    for row, ids in enumerate(IDS):
        state = model.new_state()
        for t, token in enumerate(ids):
            assert np.array_equal(model.step(int(token), state), logits_BTV[row, t])
        assert all(np.array_equal(a[0], b[row]) for a, b in zip(state, last, strict=True))


def test_a_trace_names_what_the_page_says(packed):
    model = IntegerModel.from_packed(packed["glu"])
    trace = Trace()
    logits = model.step(3, model.new_state(), trace)
    root = ["root.scan", "root.square"]
    ends = ["root.mean", "root", "root.inverse"]
    read = ["scan", "inverse", "quantised", "scaled", "factor"]
    at, o, c, d = (
        f"layers.0.{n}" for n in ("mixer", "mixer.o_proj", "channel", "channel.down_proj")
    )
    expected = [
        *(["embed"]),
        *(f"{at}.{n}" for n in root + ends),
        *(f"{at}.{p}_proj.{n}" for p in "fig" for n in read),
        *(f"{at}.{p}_proj.sums" for p in "fig"),
        *(f"{at}.{n}" for n in "hgu"),
        *(f"{o}.{n}" for n in [*root, "gate.scan", "gate.square", "root.mean", "gate.mean"]),
        *(f"{o}.{n}" for n in ["root.sum", "root.eps", "root", "root.inverse", *read, "sums"]),
        f"{at}.residual",
        *(f"{c}.{n}" for n in root + ends),
        *(f"{c}.gate_proj.{n}" for n in read),
        *(f"{c}.up_proj.{n}" for n in ("scaled", "factor")),
        *(f"{c}.{n}" for n in ("gate_proj.sums", "up_proj.sums", "u")),
        *(f"{d}.{n}" for n in [*root, "root.mean", "root.eps", "root", "root.inverse", *read]),
        *(f"{d}.sums", f"{c}.residual"),
    ]
    second = [name.replace("layers.0", "layers.1") for name in expected[1:]]
    last = [f"head.{n}" for n in [*root, *ends, *read, "sums"]] + ["logits", "argmax"]
    assert trace.names == expected + second + last
    assert np.array_equal(trace["logits"], logits)
    assert trace["argmax"].tolist() == [int(np.argmax(logits))]
    assert trace["layers.0.mixer.root"].shape == (2,)
    assert trace["layers.0.channel.u"].shape == (72,)
    with pytest.raises(KeyError):
        trace["layers.2.mixer.u"]


def test_a_trace_of_trees(packed):
    model, trace = IntegerModel.from_packed(packed["trees"]), Trace()
    model.step(3, model.new_state(), trace)
    at = "layers.1.channel"
    names = [name for name in trace.names if name.startswith(at)]
    walk = [f"{at}.w_in.factor", f"{at}.w_in.rows", f"{at}.w_in.sums", f"{at}.h", f"{at}.norm_out"]
    assert names[names.index(walk[0]) :][: len(walk)] == walk
    assert names[-4:] == [
        f"{at}.w_out.scaled", f"{at}.w_out.factor", f"{at}.w_out.sums", f"{at}.residual",
    ]  # fmt: skip
    assert trace[f"{at}.h"].shape == trace[f"{at}.norm_out"].shape == (9,)


def test_scores_are_log_probabilities_whatever_the_chunk(packed):
    model = IntegerModel.from_packed(packed["glu"])
    logits, _ = model.forward(IDS)
    real = logits.astype(np.float64) * model.logits_scale
    logprobs = real - np.log(np.exp(real).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(logprobs[:, :-1], IDS[:, 1:, None], -1)[..., 0]
    for chunk in (1, 5, 64):
        np.testing.assert_allclose(model.score(IDS, chunk), expected, atol=1e-9)


def test_the_box_says_what_it_says_in_float(box):
    model, oracle = box
    # a beginning, and what the oracle goes on with
    ids = [0, *load_tokenizer(BOX).encode("The river is", add_special_tokens=False).ids]
    for _ in range(12):
        ids.append(int(oracle.forward([ids]).logits_BTV[0, -1].argmax()))
    real = oracle.forward([ids]).logits_BTV[0]
    logits, _ = model.forward([ids])
    assert np.array_equal(logits[0].argmax(-1), real.argmax(-1))
    off = np.abs(logits[0] * model.logits_scale - real)
    assert off.mean() < 0.05 * real.std()


def test_an_embedding_of_floats_is_rounded_to_int8_rows(tmp_path):
    config = ModelConfig(**MODELS["glu"])
    tensors = write_training(tmp_path / "source", config, np.random.default_rng(1))
    checkpoint = open_checkpoint(tmp_path / "source")
    models = []
    for form in ("int8", "f32"):
        write_packed(tmp_path / form, checkpoint, "1.6bit", form)
        models.append(IntegerModel.from_packed(PackedReader(tmp_path / form)))
    values = [model.network.embedding * model.network.embedding_scale[:, None] for model in models]
    assert np.array_equal(values[0], values[1])
    assert np.abs(values[0] - tensors["embedding.weight"]).max() < 0.02
    assert np.array_equal(models[0].forward(IDS)[0], models[1].forward(IDS)[0])


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([[40]], r"token id 40 is out of range; the vocabulary is 0\.\.39"),
        ([[3, -1]], "token id -1 is out of range"),
        ([3], r"token ids must be integers \[B, T\], got int64 \(1,\)"),
        ([[0.5]], "token ids must be integers"),
        ([[]], "token ids must be integers"),
    ],
)
def test_bad_ids_are_refused(packed, ids, match):
    model = IntegerModel.from_packed(packed["glu"])
    for run in (model.forward, model.score):
        with pytest.raises(ValueError, match=match):
            run(ids)


ATTENTION = {"token_mixer": "attention", "num_heads": 4}


@pytest.mark.parametrize(
    ("dials", "what"),
    [
        (ATTENTION, r"token_mixer 'attention' \(layer 0\)"),
        ({**ATTENTION, "causal": False, "linear": "dense"}, "models that are not causal"),
        ({"linear": "dense"}, r"linear 'dense' \(layers\.0\.mixer\.i_proj\)"),
        ({"channel_mixer": "ffn"}, r"channel_mixer 'ffn' \(layer 0\)"),
        ({"glu_activation": "relu2"}, r"glu_activation 'relu2' \(layer 0\)"),
        ({**TREES, "activation": "gelu"}, r"trees with activation 'gelu' \(layer 0\)"),
        ({**TREES, "fff_master_width": 8}, r"master leaf beside trees \(fff_master_width\)"),
        ({**ATTENTION, "linear_norm": "sub"}, r"without a norm inside \(layers\.0\.mixer\.q_proj"),
        (
            {**ATTENTION, "scale_group": 32, "hidden_size": 64, "intermediate_size": 96},
            r"scale a group of inputs \(layers\.0\.mixer\.q_proj",
        ),
        (
            {
                **ATTENTION,
                "embedding_linear": "ternary",
                "scale_group": 32,
                "hidden_size": 64,
                "intermediate_size": 96,
            },
            "embedding of kind",
        ),
        ({**ATTENTION, "head_linear": "dense"}, r"linear 'dense' \(head\)"),
    ],
)
def test_what_the_accelerator_lacks_is_named(dials, what):
    config = ModelConfig(**{**SIZES, **dials})
    assert not capability.runs(config, "hardware")
    found = list(capability.missing(config, "hardware"))
    assert any(re.search(what, words) for words in found), found
    with pytest.raises(ValueError, match=f"the accelerator has no {re.escape(found[0])}; nomatmul"):
        capability.check(config, "hardware")


@pytest.mark.parametrize("name", MODELS)
def test_what_the_accelerator_runs(name):
    assert capability.runs(ModelConfig(**MODELS[name]), "hardware")


def test_a_model_that_is_lacked_is_refused_before_its_weights_are_read(tmp_path):
    config = ModelConfig(**{**SIZES, **ATTENTION, "linear_norm": "sub"})
    write_random(tmp_path / "packed", config, Forms.of(config, embedding="int8"))
    with pytest.raises(ValueError, match="the accelerator has no token_mixer 'attention'"):
        IntegerModel.from_packed(PackedReader(tmp_path / "packed"))


@pytest.mark.parametrize("value", [-0.25, 1.5])
def test_a_lower_bound_that_is_none_is_refused(tmp_path, value):
    config = ModelConfig(**MODELS["glu"])
    forms = Forms.of(config, embedding="int8")
    arrays = random_arrays(config, forms)
    for layer in range(2):
        arrays[f"layers.{layer}.mixer.lower_bound"] = np.full(48, 0.5, np.float32)
    arrays["layers.1.mixer.lower_bound"][7] = value
    write_arrays(tmp_path / "packed", config, forms, arrays)
    with pytest.raises(ValueError, match=rf"layers\.1\.mixer\.lower_bound holds {value}, it must"):
        IntegerModel.from_packed(PackedReader(tmp_path / "packed"))


def test_an_input_that_the_outer_norm_kills_does_not_come_back(tmp_path):
    """w1 is rounded to 0 and w2 is large: else no bound would hold."""
    config = ModelConfig(**{**MODELS["glu"], "use_lower_bound": False})
    forms = Forms.of(config, embedding="int8")
    arrays = random_arrays(config, forms)
    arrays["layers.0.mixer_norm.weight"][5] = 1e-6
    arrays["layers.0.mixer.i_proj.norm.weight"][5] = 1e6
    write_arrays(tmp_path / "packed", config, forms, arrays)
    model = IntegerModel.from_packed(PackedReader(tmp_path / "packed"))
    enter = model.network.layers[0].mixer.enter
    weights = {branch.name: branch.weight.values for branch in enter.branches}
    assert enter.root.values[5] == 0
    assert weights["layers.0.mixer.i_proj"][5] == 0
    assert np.abs(weights["layers.0.mixer.i_proj"]).max() > 1 << 14
