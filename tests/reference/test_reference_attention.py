"""Whole packed decoders with attention: the same bits however a text is cut, and close to their own
floats."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from random_packed import FAMILIES, family, write_arrays, write_random

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.packed import Forms, PackedReader
from nomatmul.formats.quantise import dequantised, quantise_rows, to_bfloat16, to_float16
from nomatmul.reference.model import ReferenceModel
from nomatmul.reference.weights import FloatWeights, PackedWeights


@pytest.fixture(params=FAMILIES)
def reader(request, tmp_path) -> PackedReader:
    config, forms = family(request.param)
    write_random(tmp_path / "m", config, forms)
    return PackedReader(tmp_path / "m")


def ids_for(reader: PackedReader, *shape: int):
    return np.random.default_rng(5).integers(0, reader.config.vocab_size, shape)


def float_weights(reader: PackedReader) -> FloatWeights:
    """The weights as a checkpoint of floats and whole numbers would give them."""

    def read(name: str):
        if "norm" in name:
            return reader.read_float32(name)
        return dequantised(*reader.matrix(name.removesuffix(".weight")))

    def quantised(name: str) -> Quantised | None:
        values, scale = reader.matrix(name.removesuffix(".weight"))
        if reader.config.scale_group or scale is None:
            return None
        return Quantised("ternary", values.shape, 0, scale, lambda rows: values[rows])

    return FloatWeights(read, quantised)


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kv", ["f16", "int8", "f32"])
def test_a_text_in_pieces_has_the_bits_of_the_whole(reader, kv):
    model = ReferenceModel.from_packed(reader, kv=kv)
    ids = ids_for(reader, 2, 19)
    whole = model.forward(ids)
    state, pieces = None, []
    for start, end in [(0, 1), (1, 7), (7, 8), (8, 19)]:
        output = model.forward(ids[:, start:end], state=state)
        state = output.state
        pieces.append(output.logits_BTV)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.logits_BTV)
    alone = model.forward(ids[1])
    np.testing.assert_array_equal(alone.logits_BTV[0], whole.logits_BTV[1])
    for layer, pieces_of in enumerate(whole.state.layers):
        for name in ("k", "v"):
            np.testing.assert_array_equal(pieces_of[name], state.layers[layer][name])
            if kv == "f16":
                kept = pieces_of[name]
                np.testing.assert_array_equal(to_float16(kept).astype(np.float32), kept)


def test_padding_in_front_changes_nothing(reader):
    model = ReferenceModel.from_packed(reader)
    ids = ids_for(reader, 9)
    padded = np.concatenate([ids[:3], ids])
    mask = np.array([0] * 3 + [1] * 9)
    found = model.forward(padded, mask).logits_BTV[0, 3:]
    # keys lie 3 positions further on, in other lanes
    assert relative(found, model.forward(ids).logits_BTV[0]) < 5e-2


def test_packed_models_are_close_to_their_floats(reader):
    ids = ids_for(reader, 2, 24)
    exact = ReferenceModel(reader.config, float_weights(reader)).forward(ids).logits_BTV
    found = ReferenceModel.from_packed(reader).forward(ids).logits_BTV
    rough = ReferenceModel.from_packed(reader, kv="int8").forward(ids).logits_BTV
    assert 0 < relative(found, exact) < 5e-2
    assert 0 < relative(rough, exact) < 8e-2
    assert not np.array_equal(rough, found)


@pytest.mark.parametrize("name", ["bitnet", "falcon", "embedding"])
def test_linears_of_int8_activations_are_the_same_packed_or_not(tmp_path, name):
    config, forms = family(name)
    write_random(tmp_path / "m", config, forms)
    reader = PackedReader(tmp_path / "m")
    rng = np.random.default_rng(2)
    ternary = [(n, p) for n, p in architecture_of(config).linears().items() if p.kind == "ternary"]
    assert len(ternary) >= 12
    for at, part in ternary:
        x = rng.standard_normal((3, part.inputs)).astype(np.float32)
        found = PackedWeights(reader).linear(at, part)(x)
        np.testing.assert_array_equal(found, float_weights(reader).linear(at, part)(x))


def test_a_sequence_may_not_be_longer_than_the_positions(reader):
    model = ReferenceModel.from_packed(reader)
    ids = ids_for(reader, 65)
    with pytest.raises(ValueError, match="a sequence of 65 tokens is longer than the 64 positions"):
        model.forward(ids)
    state = model.forward(ids[:60]).state
    model.forward(ids[60:64], state=state)
    with pytest.raises(ValueError, match="of 65 tokens is longer"):
        model.forward(ids[60:65], state=state)


def test_keys_that_float16_cannot_hold_are_refused(tmp_path):
    config, forms = family("llama")
    arrays = write_random(tmp_path / "m", config, forms)
    name = "layers.0.mixer.v_proj.weight"
    arrays[name] = to_bfloat16(np.full(arrays[name].shape, 1e6, np.float32))
    write_arrays(tmp_path / "n", config, forms, arrays)
    model = ReferenceModel.from_packed(PackedReader(tmp_path / "n"))
    with pytest.raises(ValueError, match="a key or value is not finite as f16"):
        model.forward([1, 2, 3])


def test_shared_heads_are_repeated_heads(tmp_path):
    """A model of two heads of keys equals one of four that holds each of them twice."""
    config, forms = family("bonsai")
    arrays = write_random(tmp_path / "two", config, forms)
    size = config.head_size
    for name, array in arrays.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = array.reshape(config.kv_heads, size, *array.shape[1:])
            arrays[name] = np.repeat(heads, 2, axis=0).reshape(-1, *array.shape[1:])
    whole = dataclasses.replace(config, num_kv_heads=None)
    write_arrays(tmp_path / "four", whole, forms, arrays)
    two, four = (
        ReferenceModel.from_packed(PackedReader(tmp_path / name)) for name in ("two", "four")
    )
    ids = np.arange(12)
    np.testing.assert_array_equal(two.forward(ids).logits_BTV, four.forward(ids).logits_BTV)


def test_a_tied_head_in_a_form_of_its_own(tmp_path):
    config, forms = family("bitnet")
    arrays = write_random(tmp_path / "one", config, dataclasses.replace(forms, embedding="f32"))
    own = Forms.of(config, embedding="f32", tied_head="int8")
    q, scale = quantise_rows(arrays["embedding.weight"])
    arrays |= {"head.weight": q, "head.scale": scale}
    write_arrays(tmp_path / "two", config, own, arrays)
    whole = Forms.of(config, embedding="int8")
    write_arrays(
        tmp_path / "int8",
        config,
        whole,
        {**arrays, "embedding.weight": q, "embedding.scale": scale},
    )
    one, two, int8 = (
        ReferenceModel.from_packed(PackedReader(tmp_path / name)).forward(np.arange(20))
        for name in ("one", "two", "int8")
    )
    np.testing.assert_array_equal(two.hidden_BTD, one.hidden_BTD)
    assert not np.array_equal(int8.hidden_BTD, one.hidden_BTD)
    assert 0 < relative(two.logits_BTV, one.logits_BTV) < 1e-2


def test_norms_of_heads_and_scaled_positions_matter(tmp_path):
    for name, dial in [("bonsai", {"qk_norm": False}), ("llama", {"rope_scaling": None})]:
        config, forms = family(name)
        arrays = write_random(tmp_path / name, config, forms)
        changed, _ = family(name, **dial)
        kept = {n: a for n, a in arrays.items() if dial != {"qk_norm": False} or "k_norm" not in n}
        write_arrays(tmp_path / f"{name}-changed", changed, forms, kept)
        models = [
            ReferenceModel.from_packed(PackedReader(tmp_path / each))
            for each in (name, f"{name}-changed")
        ]
        logits = [model.forward(np.arange(20)).logits_BTV for model in models]
        assert relative(*logits) > 1e-2
