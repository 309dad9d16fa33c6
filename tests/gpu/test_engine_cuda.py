"""The engine on a GPU: every path against the numpy oracle, and against each other bit for bit.

The native core need not be there. Accumulators are equal to the oracle's for equal int8 inputs;
logits of the paths (persistent kernel, captured graph, blocks of a prompt, batches) are equal to
each other, and close to the oracle's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_models import state_of
from model_files import write_packed, write_training
from support.cuda_engine import MODEL_ERROR, assert_all_paths_agree, ids_of, poison

from nomatmul.engine import load, random_model
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader

# hidden size, inner size (0: no channel mixer), vocabulary, packing, embedding
CASES = {
    "odd sizes": (42, 51, 67, "2bit", "bf16"),
    "base 3": (257, 700, 1003, "1.6bit", "int8"),
    "no channel": (40, 0, 50, "2bit", "int8"),
    "one": (1, 1, 2, "2bit", "bf16"),
    "wide": (640, 1728, 4100, "2bit", "int8"),
    "fours": (260, 700, 307, "2bit", "int8"),
}


@pytest.fixture(params=list(CASES))
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A packed directory of random weights and awkward sizes."""
    size, inner, vocabulary, packing, embedding = CASES[request.param]
    config = ModelConfig(
        hidden_size=size,
        intermediate_size=inner or None,
        channel_mixer="glu" if inner else "none",
        vocab_size=vocabulary,
        num_layers=2,
    )
    write_training(tmp_path / "training", config, np.random.default_rng(1))
    checkpoint = open_checkpoint(tmp_path / "training")
    write_packed(tmp_path / "packed", checkpoint, packing, embedding)
    return tmp_path / "packed"


def test_accumulators_equal_the_oracles(packed: Path) -> None:
    lm, reader = load(packed, device="cuda"), PackedReader(packed)
    rng = np.random.default_rng(3)
    for name, linear in architecture_of(lm.config).linears().items():
        t_NK, _ = reader.ternary(name)
        for tokens in (1, 7, 40, 70, 200):
            q_TK = rng.integers(-128, 128, (tokens, linear.inputs)).astype(np.int8)
            poison()
            acc_TN = lm.backend.accumulate(name, q_TK)
            assert acc_TN.shape == (tokens, linear.outputs)
            np.testing.assert_array_equal(
                acc_TN, q_TK.astype(np.int64) @ t_NK.astype(np.int64).T, err_msg=f"{name} {tokens}"
            )


def test_logits_agree_with_the_oracle_and_all_paths_with_each_other(
    packed: Path, tmp_path: Path
) -> None:
    lm, slow = load(packed, device="cuda"), load(packed, backend="numpy")
    assert_all_paths_agree(lm, slow, tmp_path)


def test_decoding_without_the_persistent_kernel(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(packed, device="cuda")
    monkeypatch.setenv("NOMATMUL_DECODE", "triton")
    plain = load(packed, device="cuda")
    assert plain.backend.decoder is None
    first, second = lm.session(), plain.session()
    for token in ids_of(lm, 12):
        np.testing.assert_array_equal(first.append([token]), second.append([token]))


def test_a_failed_step_changes_nothing() -> None:
    config = ModelConfig(hidden_size=96, num_layers=2, vocab_size=100, intermediate_size=128)
    lm = random_model(config, device="cuda")
    session = lm.session()
    session.append([1, 2, 3])
    before = state_of(session)
    if lm.backend.decoder is not None:
        lm.backend.decoder._keep["o_norm"].fill_(float("inf"))
    lm.backend.weights.stack["o_norm"].fill_(float("inf"))
    for ids in ([4], [4, 5]):
        with pytest.raises(ValueError, match="not finite"):
            session.append(ids)
        np.testing.assert_array_equal(state_of(session), before)
        assert session.position == 3


def test_too_little_memory_is_told_in_one_line() -> None:
    huge = ModelConfig(hidden_size=32768, intermediate_size=65536, num_layers=400, vocab_size=1000)
    with pytest.raises(ValueError, match=r"needs .* GB of device memory, cuda:0 has .* GB free"):
        random_model(huge, device="cuda")


def test_the_model_in_the_box_writes_the_same_text() -> None:
    lm, slow = load(device="cuda"), load(backend="numpy")
    ids = lm.prompt_ids("The river was")
    made = lm.generate_ids(ids, max_tokens=24)
    # The oracle's logits along the text that the GPU made: where its two likeliest tokens are
    # further apart than the rounding of a step, the choice must be the same.
    rows = slow.logits([*ids, *made])[len(ids) - 1 : -1]
    for token, row in zip(made, rows, strict=True):
        assert row.max() - row[token] < MODEL_ERROR * np.abs(row).max()


def test_the_self_test_of_doctor_passes() -> None:
    from nomatmul.engine import gpu_report

    report = gpu_report()
    assert report["available"]
    assert report["devices"]
    assert all(test["ok"] for test in report["self_test"]), report
