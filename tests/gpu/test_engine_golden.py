"""The engine on a GPU repeats what the authors' kernels recorded (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_files import write_packed
from numpy.typing import NDArray

from nomatmul.engine import load
from nomatmul.formats.checkpoint import open_checkpoint

MODEL_ERROR = 2e-2  # as on the CPU, where tests/engine/test_engine_oracle.py gives the reason


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
def test_the_whole_model_repeats_the_recorded_one(
    packing: str, tiny: Path, golden: dict[str, NDArray[np.generic]], tmp_path: Path
) -> None:
    write_packed(tmp_path / "packed", open_checkpoint(tiny), packing, "f32")
    lm = load(tmp_path / "packed", device="cuda")
    same, count = 0, 0
    for row, mask_T in enumerate(golden["attention_mask"].astype(bool)):
        ids_T = golden["input_ids"][row][mask_T]
        found_TV, expected_TV = lm.logits(ids_T), golden["logits"][row][mask_T]
        error = np.sqrt(np.mean((found_TV - expected_TV) ** 2) / np.mean(expected_TV**2))
        assert error < MODEL_ERROR, row
        session = lm.session()  # token by token: the decoding path
        np.testing.assert_array_equal([session.append([t]) for t in ids_T[:24]], found_TV[:24])
        same += int(np.sum(found_TV.argmax(axis=1) == expected_TV.argmax(axis=1)))
        count += len(found_TV)
    assert same >= 0.98 * count
