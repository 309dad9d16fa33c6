"""same_bits.py tells equal bits from close numbers, and names what one tree lacks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import same_bits


def test_bits_are_compared_and_not_values():
    one = np.ones(3, np.float32)
    old = {"same": one, "last bit": one, "sign of zero": one * 0, "gone": one, "shape": one}
    new = {
        "same": one.copy(),
        "last bit": np.nextafter(one, 2),
        "sign of zero": -one * 0,
        "shape": one[:2],
    }
    found = {row["name"]: row["difference"] for row in same_bits.compare(old, new)}
    assert found["same"] == 0
    assert 0 < found["last bit"] < 2e-7
    assert found["sign of zero"] != 0
    assert found["gone"] is None
    assert found["shape"] is None
    table = same_bits.to_table(same_bits.compare(old, new))
    assert "| gone | - | in one tree only |" in table
    assert "1 of 5 equal." in table


def test_trees_that_compute_nothing_are_not_the_same(tmp_path, capfd):
    (tmp_path / "nomatmul.py").write_text("raise RuntimeError('a broken tree')\n")
    tree = str(tmp_path)
    call = ["--old", tree, "--new", tree, "--only", "engine", "--out", str(tmp_path / "out")]
    assert same_bits.main(call) == 1
    assert "not all of it was computed" in capfd.readouterr().err
