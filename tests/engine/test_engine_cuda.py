"""The triton kernels of the GPU engine in triton's interpreter, against the native core.

The interpreter computes on CPU tensors what the kernels say, so this covers the general path
(layouts, masks, order of the float steps, sessions) on a machine without a GPU. The persistent
kernel of decode.cu: test_engine_cuda_emulated.py; all on a real GPU: tests/gpu/test_engine_cuda.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_models import random_ids
from machine import need_triton
from support.interpreted import run_interpreted

from nomatmul.engine import load
from nomatmul.formats.config import ModelConfig

need_triton()

CONFIG = ModelConfig(vocab_size=67, hidden_size=42, num_layers=2, intermediate_size=51)

PROGRAM = """
import sys
import numpy as np
from nomatmul.engine import load
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.packed import PackedReader

directory, found = sys.argv[1:]
lm, reader = load(directory, device="cuda"), PackedReader(directory)
assert lm.backend.name == "cuda" and lm.backend.device.type == "cpu"
rng = np.random.default_rng(3)
for name, linear in architecture_of(lm.config).linears().items():
    q_TK = rng.integers(-128, 128, (3, linear.inputs)).astype(np.int8)
    t_NK, _ = reader.ternary(name)
    expected = q_TK.astype(np.int64) @ t_NK.astype(np.int64).T
    np.testing.assert_array_equal(lm.backend.accumulate(name, q_TK), expected, err_msg=name)
ids = np.load(found)["ids"]
lm.backend.chunk = 128
whole = lm.logits(ids)
session = lm.session()
session.append(ids[:5])
fork = session.fork()
session.save(found + ".state")
alone = [session.append([token]) for token in ids[5:8]]
np.testing.assert_array_equal(alone, whole[5:8])
np.testing.assert_array_equal(fork.append(ids[5:8]), whole[7])
again = lm.session(found + ".state")
assert again.position == 5
rows = lm.step([again, lm.session(), lm.session()], [ids[5:7], ids[:9], ids[:1]])
np.testing.assert_array_equal(rows, whole[[6, 8, 0]])
lm.backend.weights.stack["mixer_norm"][1, 3] = float("nan")
state_of = lambda session: np.stack(list(session.arrays().values()))
before = state_of(again)
try:
    again.append(ids[:2])
    raise SystemExit("values that are not finite went through")
except ValueError as error:
    assert "not finite" in str(error), error
assert again.position == 7 and np.array_equal(state_of(again), before)
parts = lm.footprint()
assert parts["core"] > 0 and parts["total"] >= parts["weights"]
np.savez(found, ids=ids, logits=whole)
"""


# Twenty seconds each in the interpreter: one of them is left to `make test-slow`.
@pytest.mark.parametrize(
    ("packing", "embedding"),
    [("2bit", "bf16"), pytest.param("1.6bit", "int8", marks=pytest.mark.slow)],
)
def test_general_path_has_the_bits_of_the_native_core(
    make_packed: Callable[..., Path],
    tmp_path: Path,
    interpreting_python: str,
    packing: str,
    embedding: str,
) -> None:
    directory, found = make_packed(CONFIG, packing, embedding), tmp_path / "found.npz"
    ids = random_ids(19, CONFIG.vocab_size)
    np.savez(found, ids=ids)
    run_interpreted(interpreting_python, PROGRAM, directory, found)
    expected = load(directory, threads=1).logits(ids)
    np.testing.assert_array_equal(np.load(found)["logits"], expected)


def test_what_a_captured_graph_reads_outlives_its_making(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay reads addresses: a tensor that is gone by then would be somebody else's memory."""
    import torch

    from nomatmul.engine.backends.cuda import graphs

    read = []

    class Forward:
        class weights:
            device = torch.device("cpu")

        def embed(self, ids: torch.Tensor) -> torch.Tensor:
            read.append(weakref.ref(ids))
            return ids

        def blocks(self, x: torch.Tensor, *given: object) -> torch.Tensor:
            for one in given:
                parts = one.__dict__.values() if isinstance(one, graphs.Stretches) else [one]
                read.extend(weakref.ref(t) for t in parts if isinstance(t, torch.Tensor))
            return x

        def head(self, x: torch.Tensor) -> torch.Tensor:
            return x

    monkeypatch.setattr(graphs, "captured", lambda run, device: (None, run().clone()))
    alone = graphs.Graph(Forward(), (2, 3), 4)
    prompt = graphs.PromptGraph(Forward(), (2, 3), 128, torch.zeros(8))
    gc.collect()
    assert len(read) == 4 + 5
    assert all(reference() is not None for reference in read)
    del alone, prompt
    gc.collect()
    assert all(reference() is None for reference in read)
