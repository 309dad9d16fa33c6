"""The whole oracle against the authors' recorded trace, and against itself in other forms."""

from __future__ import annotations

import numpy as np
import pytest
from model_files import write_packed, write_published, write_training

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.quantise import from_bfloat16, to_bfloat16
from nomatmul.reference.mixers import Tokens
from nomatmul.reference.model import ReferenceModel

BLOCK_BOUND, MODEL_BOUND, SAME_ARGMAX = 2e-3, 2e-2, 0.98

VARIANTS = {
    "published": {},
    "no lower bound": {"use_lower_bound": False},
    "tied": {"tie_embeddings": True},
    "no channel mixer": {"channel_mixer": "none"},
    "ternary attention": {"token_mixer": "attention", "num_heads": 4},
    "transformer++": {"token_mixer": "attention", "linear": "dense", "num_heads": 2},
    "dense mlgru and ffn": {"linear": "dense", "channel_mixer": "ffn"},
    "awkward sizes": {"hidden_size": 33, "intermediate_size": 7, "vocab_size": 5},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request, tmp_path, rng) -> ReferenceModel:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_layers": 3, "intermediate_size": 40}
    write_training(tmp_path, ModelConfig(**{**sizes, **request.param}), rng)
    return ReferenceModel.load(tmp_path)


def ids_for(model: ReferenceModel, rng, *shape: int):
    return rng.integers(0, model.config.vocab_size, shape)


def relative(found, expected) -> float:
    """Root mean square of the error over that of the expected values."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_same(found, expected) -> None:
    """Equal up to float32 noise; an int8 rounding may flip where a step's result moved by it."""
    assert relative(found, expected) < 2e-2


@pytest.fixture(scope="module")
def published(tiny) -> ReferenceModel:
    return ReferenceModel.load(tiny)


@pytest.mark.parametrize("layer", [0, 1])
def test_each_block_fed_the_recorded_state(published, golden, layer):
    mask = golden["attention_mask"].astype(bool)
    block = published.blocks[layer]
    tokens = Tokens(mask, mask, np.zeros(mask.shape, np.int64))
    found, _, _ = block(golden[f"hidden.{layer}"], block.new_state(2), tokens)
    expected = golden[f"hidden.{layer + 1}"]
    assert relative(found, expected) < BLOCK_BOUND
    # Almost every token has no flipped rounding, and then only float32 noise is left.
    token = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(token) < 1e-6
    assert np.mean(token > 1e-5) < 0.05


def test_head_fed_the_recorded_state(published, golden):
    assert (
        relative(published.head(published.final_norm(golden["hidden.2"])), golden["logits"]) < 1e-6
    )


def test_whole_model_against_the_recorded_logits(published, golden):
    output = published.forward(golden["input_ids"], golden["attention_mask"], keep_inputs=True)
    np.testing.assert_array_equal(output.inputs[0], golden["hidden.0"])
    assert relative(output.logits_BTV, golden["logits"]) < MODEL_BOUND
    same = output.logits_BTV.argmax(-1) == golden["logits"].argmax(-1)
    assert same.mean() >= SAME_ARGMAX


def test_the_unfused_epsilon_does_not_reproduce_the_trace(tiny, golden):
    """The bound has teeth: 1e-8 in BitLinear's norm (the authors' unfused class) shows."""
    import dataclasses

    checkpoint = open_checkpoint(tiny)
    checkpoint.config = dataclasses.replace(checkpoint.config, linear_norm_eps=1e-8)
    model = ReferenceModel.from_checkpoint(checkpoint)
    block = model.blocks[0]
    mask = golden["attention_mask"].astype(bool)
    tokens = Tokens(mask, mask, np.zeros(mask.shape, np.int64))
    found, _, _ = block(golden["hidden.0"], block.new_state(2), tokens)
    token = np.linalg.norm(found - golden["hidden.1"], axis=-1)
    assert np.median(token / np.linalg.norm(golden["hidden.1"], axis=-1)) > 1e-5


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
def test_packed_equals_unpacked_but_for_the_embedding(tiny, golden, tmp_path, packing):
    checkpoint = open_checkpoint(tiny)
    write_packed(tmp_path / "p", checkpoint, packing)
    packed = ReferenceModel.from_packed(PackedReader(tmp_path / "p"))
    plain = ReferenceModel.from_checkpoint(checkpoint)
    plain.embedding_VD = from_bfloat16(to_bfloat16(plain.embedding_VD))
    ids = golden["input_ids"]
    np.testing.assert_array_equal(packed.forward(ids).logits_BTV, plain.forward(ids).logits_BTV)


def test_prefill_is_decode(model, rng):
    ids = ids_for(model, rng, 2, 9)
    whole = model.forward(ids)
    state, steps = None, []
    for t in range(9):
        output = model.forward(ids[:, t : t + 1], state=state)
        state = output.state
        steps.append(output.logits_BTV)
    assert_same(np.concatenate(steps, axis=1), whole.logits_BTV)


def test_batched_is_alone(model, rng):
    ids = ids_for(model, rng, 3, 7)
    batched = model.forward(ids).logits_BTV
    alone = np.concatenate([model.forward(row).logits_BTV for row in ids])
    assert_same(batched, alone)


@pytest.mark.parametrize("mask", ["0000111111", "1111110000", "0110110101"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_padded_is_unpadded(model, rng, mask, chunk):
    ids = ids_for(model, rng, 1, 6)
    mask = np.array([[int(c) for c in mask]])
    padded = ids_for(model, rng, 1, 10)
    padded[mask == 1] = ids[0]
    first = model.forward(padded, mask, chunk=chunk)
    plain = model.forward(ids)
    assert_same(first.logits_BTV[mask == 1][None], plain.logits_BTV)
    following = ids_for(model, rng, 1, 3)
    np.testing.assert_array_equal(first.state.positions_B, plain.state.positions_B)
    padded_on = model.forward(following, state=first.state).logits_BTV
    assert_same(padded_on, model.forward(following, state=plain.state).logits_BTV)


def test_a_forked_state_is_left_alone(model, rng):
    state = model.forward(ids_for(model, rng, 1, 5)).state
    kept = state.copy()
    following = ids_for(model, rng, 1, 4)
    first = model.forward(following, state=state).logits_BTV
    model.forward(ids_for(model, rng, 1, 4), state=kept)
    np.testing.assert_array_equal(model.forward(following, state=kept).logits_BTV, first)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunked_is_recurrent(tmp_path, rng, chunk):
    write_published(tmp_path, rng, num_hidden_layers=3)
    model = ReferenceModel.load(tmp_path)
    ids = ids_for(model, rng, 2, 21)
    plain, chunked = model.forward(ids), model.forward(ids, chunk=chunk)
    assert_same(chunked.logits_BTV, plain.logits_BTV)
    assert_same(chunked.state.layers[0]["h"], plain.state.layers[0]["h"])


def test_heads_only_reshape_in_a_published_model(tmp_path, rng):
    write_published(tmp_path, rng)
    ids = rng.integers(0, 48, (1, 8))
    one = ReferenceModel.load(tmp_path).forward(ids).logits_BTV
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("{", '{"num_heads": 8, ', 1))
    np.testing.assert_array_equal(ReferenceModel.load(tmp_path).forward(ids).logits_BTV, one)


def test_an_encoder_sees_both_ways(tmp_path, rng):
    config = ModelConfig(
        50, 32, 2, token_mixer="attention", channel_mixer="ffn", linear="dense", causal=False
    )
    write_training(tmp_path, config, rng)
    model = ReferenceModel.load(tmp_path)
    ids = rng.integers(0, 50, (1, 6))
    changed = ids.copy()
    changed[0, -1] = (changed[0, -1] + 1) % 50
    first, second = model.forward(ids).logits_BTV, model.forward(changed).logits_BTV
    assert np.abs(first[0, 0] - second[0, 0]).max() > 1e-3


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([], None, "must be a non-empty"),
        ([[]], None, "must be a non-empty"),
        ([0.5], None, "must be whole numbers"),
        ([3, -1], None, r"token id -1 is out of range; the vocabulary is 0\.\.47"),
        ([3, 48], None, "token id 48 is out of range"),
        ([3, 4], [1], r"attention_mask has shape \[1, 1\], the token ids \[1, 2\]"),
        ([3, 4], [1, 2], "must hold 0 and 1 only"),
    ],
)
def test_bad_input_is_refused(tmp_path, rng, ids, mask, message):
    write_published(tmp_path, rng)
    with pytest.raises(ValueError, match=message):
        ReferenceModel.load(tmp_path).forward(ids, mask)


def test_a_state_of_another_batch_is_refused(tmp_path, rng):
    write_published(tmp_path, rng)
    model = ReferenceModel.load(tmp_path)
    with pytest.raises(ValueError, match="the state holds 2 sequences, the input 1"):
        model.forward([1, 2], state=model.new_state(2))


def test_an_encoder_has_no_state_to_go_on_from(tmp_path, rng):
    config = ModelConfig(
        50, 32, 2, token_mixer="attention", channel_mixer="ffn", linear="dense", causal=False
    )
    write_training(tmp_path, config, rng)
    model = ReferenceModel.load(tmp_path)
    state = model.forward([1, 2]).state
    with pytest.raises(ValueError, match="an encoder has no state"):
        model.forward([3], state=state)
