"""The native engine against the numpy oracle, and against what the authors' kernels recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_models import CONFIG, random_ids, state_of
from model_files import write_packed
from numpy.typing import NDArray

from nomatmul.engine import LanguageModel, load
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.packed import PackedReader
from nomatmul.reference.model import ReferenceModel

# Float steps differ by a few units of float32 noise; where that noise crosses the border between
# two int8 values, one quantised activation moves by 1 of up to 127 and its row by about 1e-3.
BLOCK_ERROR = 2e-3
MODEL_ERROR = 2e-2


def relative_error(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """RMS error over RMS of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("embedding", ["bf16", "int8"])
def test_logits_equal_the_oracles(
    make_packed: Callable[..., Path], packing: str, embedding: str
) -> None:
    directory = make_packed(CONFIG, packing, embedding)
    fast, slow = load(directory, threads=2), load(directory, backend="numpy")
    ids = random_ids(45)
    found, expected = fast.logits(ids), slow.logits(ids)
    np.testing.assert_array_equal(found, expected)
    states = fast.session(), slow.session()
    for session in states:
        session.append(ids)
    np.testing.assert_array_equal(state_of(states[0]), state_of(states[1]))


def test_accumulators_equal_the_oracles(make_packed: Callable[..., Path], packing: str) -> None:
    directory = make_packed(CONFIG, packing)
    lm, reader = load(directory, threads=1), PackedReader(directory)
    rng = np.random.default_rng(3)
    for name, linear in architecture_of(CONFIG).linears().items():
        q_TK = rng.integers(-128, 128, (7, linear.inputs)).astype(np.int8)
        t_NK, _ = reader.ternary(name)
        acc_TN = lm.backend.model.accumulate(name, q_TK)
        assert acc_TN.shape == (7, linear.outputs)
        np.testing.assert_array_equal(acc_TN, q_TK.astype(np.int64) @ t_NK.astype(np.int64).T)


def test_numpy_backend_behind_the_same_sessions(packed: Path, tmp_path: Path) -> None:
    lm = load(packed, backend="numpy")
    assert lm.backend.name == "numpy"
    ids = random_ids(12)
    whole = lm.logits(ids)
    session = lm.session()
    session.append(ids[:5])
    session.save(tmp_path / "state")
    session = lm.session(tmp_path / "state")
    # matrix products of numpy may sum in another order for other shapes
    np.testing.assert_allclose(session.append(ids[5:]), whole[-1], rtol=1e-4, atol=1e-4)
    rows = lm.step([lm.session(), lm.session()], [ids, ids[:3]])
    np.testing.assert_allclose(rows[1], whole[2], rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["2bit", "1.6bit"])
def golden_lm(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> LanguageModel:
    """The authors' tiny model, packed."""
    write_packed(tmp_path / "packed", open_checkpoint(tiny), request.param, "bf16")
    return load(tmp_path / "packed", threads=2)


def test_each_block_repeats_the_recorded_one(
    golden_lm: LanguageModel, golden: dict[str, NDArray[np.generic]]
) -> None:
    mask_BT = golden["attention_mask"].astype(bool)
    for layer in range(golden_lm.config.num_layers):
        for row, mask_T in enumerate(mask_BT):
            x_TD = np.ascontiguousarray(golden[f"hidden.{layer}"][row][mask_T], dtype=np.float32)
            golden_lm.backend.model.block(layer, x_TD, np.zeros(x_TD.shape[1], np.float32))
            expected_TD = golden[f"hidden.{layer + 1}"][row][mask_T]
            assert relative_error(x_TD, expected_TD) < BLOCK_ERROR, (layer, row)


def test_the_whole_model_repeats_the_recorded_one(
    golden_lm: LanguageModel, golden: dict[str, NDArray[np.generic]]
) -> None:
    # From the recorded embedding output: a packed embedding is rounded to bfloat16 (0.17 % here),
    # which moves enough int8 values of this tiny random model to change its logits by 3.6 %.
    same, count = 0, 0
    for row, mask_T in enumerate(golden["attention_mask"].astype(bool)):
        x_TD = np.ascontiguousarray(golden["hidden.0"][row][mask_T], dtype=np.float32)
        for layer in range(golden_lm.config.num_layers):
            golden_lm.backend.model.block(layer, x_TD, np.zeros(x_TD.shape[1], np.float32))
        logits_TV = golden_lm.backend.model.logits_of(x_TD)
        expected_TV = golden["logits"][row][mask_T]
        assert relative_error(logits_TV, expected_TV) < MODEL_ERROR, row
        same += int(np.sum(logits_TV.argmax(axis=1) == expected_TV.argmax(axis=1)))
        count += len(logits_TV)
    assert same >= 0.98 * count


def test_the_engine_adds_nothing_to_the_rounding_of_the_embedding(
    golden_lm: LanguageModel, golden: dict[str, NDArray[np.generic]]
) -> None:
    ids = golden["input_ids"][0][golden["attention_mask"][0].astype(bool)]
    oracle = ReferenceModel.load(golden_lm.path)
    np.testing.assert_array_equal(golden_lm.logits(ids), oracle.forward(ids).logits_BTV[0])
