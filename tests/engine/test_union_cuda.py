"""The GPU engine's FFF kernels in triton's interpreter: paths, integers and logits.

On a real GPU: tests/gpu/test_engine_union.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from engine_models import random_ids
from machine import need_triton
from support.interpreted import run_interpreted
from union_models import union

from nomatmul.engine import load

need_triton()

PROGRAM = """
import sys
import numpy as np
from nomatmul.engine import load
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.architecture import architecture_of
from nomatmul.reference.trees import combine
from nomatmul.reference.weights import PackedWeights

directory, found = sys.argv[1:]
lm, weights = load(directory, device="cuda"), PackedWeights(PackedReader(directory))
config, rng = lm.config, np.random.default_rng(3)
for at, part in architecture_of(config).trees().items():
    name, trees = f"{at}.rows", weights.trees(at, part)
    for tokens in (1, 3):
        q_TD = rng.integers(-128, 128, (tokens, config.hidden_size)).astype(np.int8)
        q_TD[0] = 0  # all ties: the left-most path
        rows_TA, acc_TA = lm.backend.walk(name, q_TD)
        expected_acc, expected_rows = trees.visits(q_TD)
        np.testing.assert_array_equal(rows_TA, expected_rows.reshape(tokens, -1))
        np.testing.assert_array_equal(acc_TA, expected_acc.reshape(tokens, -1))
        q_TA = rng.integers(-128, 128, rows_TA.shape).astype(np.int8)
        acc_TD = lm.backend.combine(name, q_TA, rows_TA)
        expected_TD = combine(q_TA.astype(np.int32), rows_TA, trees.w_out_VD)
        np.testing.assert_array_equal(acc_TD, expected_TD)
ids = np.load(found)["ids"]
whole = lm.logits(ids)
session = lm.session()
session.append(ids[:2])
fork = session.fork()
np.testing.assert_array_equal(session.append(ids[2:3]), whole[2])
rows = lm.step([fork, lm.session()], [ids[2:], ids[:2]])
np.testing.assert_array_equal(rows, whole[[3, 1]])
parts = lm.footprint()
row_bytes = lm.backend.weights.stack["rows"].shape[-1]
rows = 2 * part.rows + 4 * config.hidden_size
assert parts["core"] == config.num_layers * row_bytes * rows
lm.backend.weights.stack["norm_out"][0] = float("inf")
try:
    fork.append(ids[:2])
    raise SystemExit("values that are not finite went through")
except ValueError as error:
    assert "not finite" in str(error), error
np.savez(found, ids=ids, logits=whole)
"""

CONFIG = union(num_layers=1, vocab_size=67, hidden_size=42, fff_trees=5, fff_depth=2)


def test_paths_and_integers_equal_the_oracles_and_logits_the_native_cores(
    make_packed: Callable[..., Path], tmp_path: Path, interpreting_python: str
) -> None:
    directory, found = make_packed(CONFIG, "1.6bit", "int8"), tmp_path / "found.npz"
    ids = random_ids(4, CONFIG.vocab_size)
    np.savez(found, ids=ids)
    run_interpreted(interpreting_python, PROGRAM, directory, found)
    expected = load(directory, threads=1).logits(ids)
    np.testing.assert_array_equal(np.load(found)["logits"], expected)
