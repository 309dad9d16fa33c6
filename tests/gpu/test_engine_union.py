"""Union models (mlgru, fff, ternary) on a GPU: paths and integers equal to the numpy oracle's,
every way through the engine equal to every other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_models import state_of
from model_files import write_packed, write_training
from support.cuda_engine import assert_all_paths_agree, ids_of, poison
from union_models import oracle_trees

from nomatmul.engine import LanguageModel, load, random_model
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.reference.trees import combine

# hidden size, trees, depth, packing, embedding
CASES = {
    "odd sizes": (42, 5, 3, "2bit", "bf16"),
    "one deep tree": (257, 1, 8, "1.6bit", "int8"),
    "many trees": (640, 67, 4, "2bit", "int8"),
    "single nodes": (1, 3, 0, "2bit", "bf16"),
    "wide": (2600, 9, 2, "2bit", "int8"),
}


def union(size: int, trees: int, depth: int, vocabulary: int = 131) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=size, num_layers=2, channel_mixer="fff",
        activation="silu", fff_trees=trees, fff_depth=depth,
    )  # fmt: skip


@pytest.fixture(params=list(CASES))
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A packed directory of random weights and awkward sizes."""
    size, trees, depth, packing, embedding = CASES[request.param]
    write_training(tmp_path / "training", union(size, trees, depth), np.random.default_rng(1))
    checkpoint = open_checkpoint(tmp_path / "training")
    write_packed(tmp_path / "packed", checkpoint, packing, embedding)
    return tmp_path / "packed"


def tree_names(lm: LanguageModel) -> list[str]:
    return [f"{name}.rows" for name in architecture_of(lm.config).trees()]


def test_paths_and_accumulators_equal_the_oracles(packed: Path) -> None:
    lm, reader = load(packed, device="cuda"), PackedReader(packed)
    rng = np.random.default_rng(3)
    for name, trees in zip(tree_names(lm), oracle_trees(packed), strict=True):
        for tokens in (1, 7, 200):
            q_TD = rng.integers(-128, 128, (tokens, lm.config.hidden_size)).astype(np.int8)
            q_TD[0] = 0  # nothing but ties
            poison()
            rows_TA, acc_TA = lm.backend.walk(name, q_TD)
            expected_acc, expected_rows = trees.visits(q_TD)
            np.testing.assert_array_equal(rows_TA, expected_rows.reshape(tokens, -1))
            np.testing.assert_array_equal(acc_TA, expected_acc.reshape(tokens, -1))
            q_TA = rng.integers(-128, 128, rows_TA.shape).astype(np.int8)
            poison()
            acc_TD = lm.backend.combine(name, q_TA, rows_TA)
            expected_TD = combine(q_TA.astype(np.int32), rows_TA, trees.w_out_VD)
            np.testing.assert_array_equal(acc_TD, expected_TD)
    for name in architecture_of(lm.config).linears():
        q_TK = rng.integers(-128, 128, (9, lm.config.hidden_size)).astype(np.int8)
        t_NK, _ = reader.ternary(name)
        expected = q_TK.astype(np.int64) @ t_NK.astype(np.int64).T
        np.testing.assert_array_equal(lm.backend.accumulate(name, q_TK), expected)


def test_inside_the_model_every_integer_follows_from_the_one_before(packed: Path) -> None:
    """Paths follow from the walk's int8 inputs, sums from the int8 hidden values, in each layer."""
    lm = load(packed, device="cuda")
    lm.backend.forward.record = record = {}
    lm.backend.chunk = 128
    lm.logits(ids_of(lm, 100))
    size, row_bytes = lm.config.hidden_size, lm.backend.weights.stack["rows"].shape[-1]
    for name, trees in zip(tree_names(lm), oracle_trees(packed), strict=True):
        planes, acc_TA = (part.cpu().numpy() for part in record[f"{name}.in"])
        q_TD = planes.reshape(len(planes), 4, row_bytes).swapaxes(1, 2).reshape(len(planes), -1)
        rows_TA, q_TA = (part.cpu().numpy() for part in record[f"{name}.path"])
        expected_acc, expected_rows = trees.visits(q_TD[:, :size])
        np.testing.assert_array_equal(rows_TA, expected_rows.reshape(rows_TA.shape))
        np.testing.assert_array_equal(acc_TA, expected_acc.reshape(rows_TA.shape))
        acc_TD = record[f"{name}.out"][1].cpu().numpy()
        expected_TD = combine(q_TA.astype(np.int32), rows_TA, trees.w_out_VD)
        np.testing.assert_array_equal(acc_TD, expected_TD)


def test_logits_agree_with_the_oracle_and_all_paths_with_each_other(
    packed: Path, tmp_path: Path
) -> None:
    lm, slow = load(packed, device="cuda"), load(packed, backend="numpy")
    assert lm.backend.decoder is None
    assert_all_paths_agree(lm, slow, tmp_path)


def test_a_failed_step_changes_nothing() -> None:
    lm = random_model(union(96, 6, 3), device="cuda")
    session = lm.session()
    session.append([1, 2, 3])
    before = state_of(session)
    lm.backend.weights.stack["norm_out"].fill_(float("inf"))
    for ids in ([4], [4, 5]):
        with pytest.raises(ValueError, match="not finite"):
            session.append(ids)
        np.testing.assert_array_equal(state_of(session), before)


def test_the_persistent_kernel_is_refused_by_name(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOMATMUL_DECODE", "persistent")
    with pytest.raises(ValueError, match="persistent decoding kernel has no channel_mixer 'fff'"):
        load(packed, device="cuda")
